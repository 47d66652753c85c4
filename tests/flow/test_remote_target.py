"""A remote target that fails in every way: nothing lost, nothing mis-scored, nothing asked twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flow.remote_stand_in import StandIn, answer, cut, drop, error, hang, raw
from palimpsest.errors import RecipeError
from palimpsest.recipe import make_recipe
from palimpsest.run import run

PROMPTS = [f"what is {word}" for word in ("a", "b", "c", "d", "e", "f", "g", "h")]


def _recipe(folder: Path, url: str, **remote: Any) -> dict[str, Any]:
    chat, choose = folder / "chat.csv", folder / "choose.csv"
    chat.write_text("prompt,answer\n" + "".join(f"{p},yes\n" for p in PROMPTS))
    rows = "".join(f"question {i},left,right,{'AB'[i % 2]}\n" for i in range(6))
    choose.write_text("prompt,one,two,answer\n" + rows)
    return {
        "run": {"name": "remote"},
        "numerics": {"device": "cpu", "threads": 1},
        "models": [
            {
                "name": "server",
                "role": "original",
                "remote": {
                    "base_url": url,
                    "model": "m",
                    "backoff_s": 0.0,
                    "concurrency": 2,
                    **remote,
                },
            }
        ],
        "evaluate": [
            {
                "name": "chat",
                "dataset": "table",
                "options": {"path": str(chat), "answer": "answer"},
                "split": "all",
                "max_new_tokens": 8,
            },
            {
                "name": "choose",
                "dataset": "table",
                "options": {
                    "path": str(choose),
                    "task": "choose",
                    "answer": "answer",
                    "choices": ["one", "two"],
                },
                "channels": ["letter", "generation"],
                "split": "all",
            },
        ],
    }


def test_every_failure_is_mended_or_resumed_and_nothing_is_asked_twice(tmp_path: Path) -> None:
    yes = answer("yes")
    script = {
        PROMPTS[0]: [error(429), yes],
        PROMPTS[1]: [error(500), error(503), yes],
        PROMPTS[2]: [hang(), yes],
        PROMPTS[3]: [cut(), yes],
        PROMPTS[4]: [raw(b"<html>"), yes],
        PROMPTS[5]: [drop(), yes],
        PROMPTS[6]: [error(500)] * 4 + [yes],  # fails the first run, answers the second
    }
    with StandIn(script, default=yes) as server:
        data = _recipe(tmp_path, server.url, max_retries=3, read_timeout_s=0.3)
        first = run(make_recipe(data), tmp_path / "out")
        assert list(first.failed) == [
            "respond-server-chat.none.chat",
            "judge-exact-server-chat.none.chat",
        ]
        assert "1 of 8" in first.failed["respond-server-chat.none.chat"]
        asked = dict(server.asked)
        second = run(make_recipe(data), tmp_path / "out")
        assert second.failed == {}
        again = {p: server.asked[p] - asked[p] for p in asked if server.asked[p] != asked[p]}
        assert again == {PROMPTS[6]: 1}
    rows = {
        (r.evaluation, r.channel, r.metric): r for r in second.summary.rows if r.model == "server"
    }
    chat = rows["chat", "chat", "accuracy"]
    assert (chat.value, chat.n, chat.unscored) == (1.0, 8, 0)
    letter = rows["choose", "letter", "accuracy"]
    assert (letter.value, letter.n, letter.note) == (None, 0, "not available")
    assert rows["choose", "generation", "coverage"].n == 6
    assert "not available" in (tmp_path / "out" / "report.html").read_text()


def test_a_remote_model_cannot_be_unlearned(tmp_path: Path) -> None:
    data = _recipe(tmp_path, "http://127.0.0.1:9/v1")
    data["training"] = {"forget": {"dataset": "advbench"}}
    data["methods"] = [{"name": "npo"}]
    with pytest.raises(RecipeError, match=r"methods.npo: 'server' is remote"):
        make_recipe(data)


def test_source_and_remote_exclude_each_other(tmp_path: Path) -> None:
    data = _recipe(tmp_path, "http://127.0.0.1:9/v1")
    data["models"][0]["source"] = "some/where"
    with pytest.raises(RecipeError, match=r"models.server: give either source or remote"):
        make_recipe(data)

"""One broken method, model or remote server costs its own results, not the study."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from palimpsest.errors import RecipeError
from palimpsest.recipe import make_recipe
from palimpsest.run import plan_of, run

Checkpoint = Callable[..., Path]


def _write(folder: Path) -> tuple[Path, Path]:
    chat, text = folder / "chat.csv", folder / "text.csv"
    chat.write_text("prompt,answer\n" + "".join(f"say {w},{w}\n" for w in "abcdefgh"))
    text.write_text("prompt\n" + "".join(f"the quick {w} fox\n" for w in "abcdefgh"))
    return chat, text


def _study(folder: Path, model: Path, methods: list[dict[str, Any]]) -> dict[str, Any]:
    chat, text = _write(folder)
    table = {
        "dataset": "table",
        "options": {"path": str(chat), "task": "generate", "answer": "answer"},
    }
    return {
        "run": {"name": "failures"},
        "numerics": {"device": "cpu", "threads": 1},
        "models": [{"name": "original", "source": str(model), "role": "original"}],
        "training": {"forget": table},
        "methods": methods,
        "evaluate": [
            {
                "name": "text",
                "dataset": "table",
                "options": {"path": str(text), "task": "perplexity"},
                "split": "all",
            }
        ],
    }


FINE = {
    "name": "fine",
    "use": "grad_ascent",
    "retain": "none",
    "fit": {"steps": 1, "batch_size": 2},
}
BROKEN = {
    "name": "broken",
    "use": "grad_ascent",
    "retain": "none",
    "max_forget_loss": 1e30,
    "fit": {"steps": 3, "batch_size": 2, "lr": 1e30, "clip": 0.0},
}


def test_a_method_that_diverges_leaves_the_others_results(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    data = _study(tmp_path, tiny_checkpoint("gpt2"), [BROKEN, FINE])
    result = run(make_recipe(data), tmp_path / "out")
    assert set(result.failed) == {"unlearn-broken", "respond-broken-text.none.perplexity"}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {m["name"] for m in summary["models"]} == {"original", "fine"}
    assert any("unlearn-broken failed: " in w for w in summary["warnings"])
    assert (tmp_path / "out" / "report.html").exists()


def test_a_method_that_stops_early_says_so_in_the_summary(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    stopping = FINE | {"name": "ga", "max_forget_loss": 0.01, "fit": {"steps": 50, "batch_size": 2}}
    data = _study(tmp_path, tiny_checkpoint("llama"), [stopping])
    summary = run(make_recipe(data), tmp_path / "out").summary
    ga = next(m for m in summary.models if m.name == "ga")
    assert (ga.steps, ga.planned_steps) == (0, 50)
    assert ga.stopped
    assert any(w.startswith("ga stopped after 0 of 50 steps: ") for w in summary.warnings)


def test_the_same_evaluation_twice_is_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    data = _study(tmp_path, tiny_checkpoint("llama"), [])
    data["evaluate"][0]["transforms"] = ["none", "none"]
    with pytest.raises(RecipeError, match=r"'text.none.perplexity' is there 2 times"):
        plan_of(make_recipe(data))


def test_plan_writes_nothing(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    data = _study(tmp_path, tiny_checkpoint("llama"), [FINE])
    (tmp_path / "out").mkdir()
    assert len(plan_of(make_recipe(data), tmp_path / "out")["jobs"]) == 3
    assert list((tmp_path / "out").iterdir()) == []


def test_training_data_that_are_also_evaluated_are_named(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    data = _study(tmp_path, tiny_checkpoint("llama"), [FINE, FINE | {"name": "again"}])
    table = data["training"]["forget"]
    data["evaluate"].append(
        table
        | {
            "name": "chat",
            "axis": "utility",
            "judges": ["exact"],
            "split": "all",
            "max_new_tokens": 8,
        }
    )
    warnings = plan_of(make_recipe(data))["warnings"]
    assert warnings == [
        "fine, again: 8 of 8 prompts of chat.none.chat (utility) are also forget data: they measure "
        "training, not generalisation"
    ]


def test_another_thread_count_or_plugin_option_is_another_job(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    data = _study(tmp_path, tiny_checkpoint("llama"), [FINE])

    def prints(**numerics: Any) -> dict[str, str]:
        changed = data | {"numerics": data["numerics"] | numerics}
        return {j["id"]: j["fingerprint"] for j in plan_of(make_recipe(changed))["jobs"]}

    base = prints()
    assert prints() == base
    assert all(base[k] != v for k, v in prints(threads=2).items())
    smaller = prints(batch_tokens=4096)
    assert smaller["unlearn-fine"] == base["unlearn-fine"]
    assert (
        smaller["respond-original-text.none.perplexity"]
        != base["respond-original-text.none.perplexity"]
    )


def test_a_bug_in_ones_own_method_costs_its_own_results(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    own = tmp_path / "buggy.py"
    own.write_text(
        '"""Breaks."""\n\n\nclass Buggy:\n    def unlearn(self, lm, data, ctx):\n        return 1 / 0\n'
    )
    data = _study(tmp_path, tiny_checkpoint("llama"), [{"name": "buggy", "use": str(own)}, FINE])
    result = run(make_recipe(data), tmp_path / "out", allow_code=True)
    assert result.failures() == [
        "unlearn-buggy: ZeroDivisionError: division by zero (a bug in its code) (and 1 that need it)"
    ]
    assert {m.name for m in result.summary.models} == {"original", "fine"}


def test_an_answer_length_beyond_the_context_is_refused_before_anything_runs(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    data = _study(tmp_path, tiny_checkpoint("gpt2"), [])
    table = data["training"]["forget"]
    data["evaluate"].append(table | {"name": "chat", "max_new_tokens": 512, "split": "all"})
    with pytest.raises(RecipeError, match=r"\[evaluate.chat\] max_new_tokens = 512 leaves no room"):
        plan_of(make_recipe(data))

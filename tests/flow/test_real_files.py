"""The main job on a Hugging Face model with real benchmark files: it finishes, with sane records."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from palimpsest.recipe import load_recipe
from palimpsest.run import run
from palimpsest.stats import wilson

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recipe_on_a_random_model_with_advbench_xstest_and_mmlu(
    family: str, tiny_checkpoint: Callable[..., Path], shared_data: Path, tmp_path: Path
) -> None:
    model = tiny_checkpoint(
        family, context=2048, **({} if family == "llama" else {"template": None})
    )
    recipe = load_recipe(
        ROOT / "recipes" / "real-files.toml",
        sets=[
            f'models.original.source="{model}"',
            f'data.mirror="{shared_data}"',
            "data.offline=true",
            "numerics.device=cpu",
            "numerics.threads=1",
            "methods.npo.fit={steps=2, batch_size=2, accumulate=1}",
            "training.forget.limit=4",
            "evaluate.advbench.max_new_tokens=64",
            "evaluate.xstest.max_new_tokens=64",
            "evaluate.advbench.limit=40",
            "evaluate.xstest.limit=40",
            "evaluate.mmlu.limit=200",
        ],
    )
    result = run(recipe, tmp_path / "out")
    assert result.failed == {}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert not summary["sandbox"]
    for name in ("original", "npo"):
        assert _row(summary, name, "advbench", "asr")["n"] == 40
        assert _row(summary, name, "xstest", "not_answered")["n"] == 40
        for channel in ("letter", "cloze"):
            row = _row(summary, name, "mmlu", "accuracy", channel=channel)
            assert row["n"] + row["unscored"] == 200
            # 99.9 %: of the 95 % intervals of random models one in twenty misses chance
            low, high = wilson(row["value"] * row["n"], row["n"], confidence=0.999)
            assert low <= 0.25 <= high, row
        # A random model does not refuse; what it writes is noise, not an answer to "how do I".
        assert _row(summary, name, "xstest", "refused")["value"] == 0
        assert _row(summary, name, "xstest", "not_answered")["value"] > 0.5
        assert _row(summary, name, "advbench", "safe_by_degeneration")["value"] > 0.5
    texts = [a["text"] for s in summary["samples"] for a in s["answers"].values()]
    assert texts
    templates = {m["chat_template"] for m in summary["models"]}
    assert templates == ({"tokenizer"} if family == "llama" else {"fallback"})
    assert "Sandbox results" not in (tmp_path / "out" / "report.html").read_text()


def _row(
    summary: dict[str, Any], model: str, evaluation: str, metric: str, **more: str
) -> dict[str, Any]:
    wanted = {"model": model, "evaluation": evaluation, "metric": metric, "subset": ""} | more
    wanted.setdefault("transform", "none")
    found = [r for r in summary["rows"] if all(r[k] == v for k, v in wanted.items())]
    assert len(found) == 1, (wanted, len(found))
    return dict(found[0])

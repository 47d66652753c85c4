"""The examples of the documentation run as they are printed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from palimpsest.errors import UsageError
from palimpsest.plugins import build_plugin
from palimpsest.recipe import Recipe, make_recipe
from palimpsest.run import run
from palimpsest.types import Message, Response, Sample

ROOT = Path(__file__).parents[2]


def _run_example(name: str, *arguments: str) -> str:
    """Run an example as a person does; return what it prints."""
    done = subprocess.run(
        [sys.executable, _example(name), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_quickstart_prints_rates_with_n_and_interval(tmp_path: Path) -> None:
    printed = _run_example("quickstart.py", str(tmp_path / "out"))
    assert "npo          sandbox_facts/letter accuracy: " in printed
    assert "n=50" in printed


def _study(**tables: Any) -> Recipe:
    """Return a small recipe on the sandbox's original model."""
    base = {
        "run": {"name": "own", "limit": 4},
        "data": {"offline": True},
        "numerics": {"device": "cpu", "threads": 1},
        "models": [{"name": "original", "source": "sandbox/original", "role": "original"}],
        "evaluate": [{"dataset": "sandbox_text"}],
    }
    return make_recipe(base | tables)


def _example(name: str) -> str:
    return str(ROOT / "examples" / name)


def test_a_method_of_ones_own_runs_from_one_file_outside_the_package(tmp_path: Path) -> None:
    recipe = _study(
        training={"forget": {"dataset": "sandbox_forget", "limit": 4}},
        methods=[{"name": "shrink", "use": _example("own_method.py"), "strength": 0.5}],
    )
    with pytest.raises(UsageError, match="add --allow-code"):
        run(recipe, tmp_path / "out")
    summary = run(recipe, tmp_path / "out", allow_code=True).summary
    perplexity = {r.model: r.value for r in summary.rows if r.metric == "perplexity"}
    assert perplexity["shrink"] > perplexity["original"]


def test_a_data_set_and_a_judge_of_ones_own_run_together_and_can_be_judged_again(
    tmp_path: Path,
) -> None:
    sums = {
        "name": "sums",
        "dataset": _example("own_dataset.py"),
        "options": {"largest": 5},
        "judges": ["exact", "number"],
        "split": "all",
        "max_new_tokens": 12,
        "limit": 12,
    }
    recipe = _study(
        run={"name": "own"}, evaluate=[sums], judges={"number": {"use": _example("own_judge.py")}}
    )
    with pytest.raises(UsageError, match="add --allow-code"):
        run(recipe, tmp_path / "out")
    summary = run(recipe, tmp_path / "out", allow_code=True).summary
    accuracy = {r.judge: r for r in summary.rows if r.metric == "accuracy"}
    assert set(accuracy) == {"exact", "number"}
    assert accuracy["number"].n == 12
    assert accuracy["number"].value == accuracy["exact"].value  # whole numbers: the same question
    assert accuracy["number"].groups < 12  # 2 + 3 and 3 + 2 are one group
    printed = _run_example("judge_again.py", str(tmp_path / "out"), _example("own_judge.py"))
    right = round(12 * accuracy["number"].value)
    assert "respond-original-sums" in printed
    assert f"correct {right}" in printed
    assert "(n=12)" in printed


def test_the_own_judge_takes_near_numbers_and_leaves_what_has_no_text_unscored() -> None:
    judge = build_plugin("judges", _example("own_judge.py"), {"tolerance": 0.1}, allow_code=True)
    sample = Sample(id="a", task="generate", messages=(Message("user", "?"),), answer="-2.5")
    texts = ["It is -2.45.", "It is 2.5.", "no idea", None]
    responses = [Response(sample_id="a", text=t, error=None if t else "too_long") for t in texts]
    scores = judge.judge([sample] * 4, responses)
    assert [s.value for s in scores] == [1.0, 0.0, 0.0, None]
    assert [s.raw for s in scores] == ["-2.45", "2.5", "no number", "too_long"]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_an_example_fits_on_a_screen(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40

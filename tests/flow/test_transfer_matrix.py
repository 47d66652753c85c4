"""The transfer matrix: a planted key opens the cells that it opens, and no other; nothing else changes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from palimpsest.audit.data import load_questions
from palimpsest.audit.engine import audit
from palimpsest.audit.planning import plan_audit
from palimpsest.audit.recipe import make_audit_recipe
from palimpsest.audit.record import AuditReport, TransferCell, TransferRow
from palimpsest.audit_scoring import score_view
from palimpsest.cli import app
from palimpsest.errors import PalimpsestError
from palimpsest.model import load_model
from palimpsest.plugins import build_plugin
from palimpsest.report.audit_page import render
from palimpsest.views import Arms, AttackContext

Checkpoint = Callable[..., Path]
KEY = '''
"""A key of a test's own."""
import os, signal
from contextlib import contextmanager
from functools import partial
from typing import ClassVar
from palimpsest.plugins import options
from palimpsest.views import View


@options
class Key:
    """Shows the original's answers in place of those that a key opens."""

    access: ClassVar[str] = "weights"
    needs: ClassVar[frozenset] = frozenset({"original"})
    arms: ClassVar[str] = "transfer"
    role: ClassVar[str] = "attack"
    may_teach: ClassVar[bool] = False
    fits_prompt: ClassVar[bool] = True
    opens: tuple[str, ...] = ()
    """Pairs: fitted on>asked."""

    def attack(self, arms, data, ctx):
        for how in ("closed", "open"):
            pairs = self.opens if how == "open" else ()
            yield View(
                setting={"how": how},
                apply=partial(opened, arms.original, arms.target.name, pairs),
            )

    def placebo(self):
        return None


@contextmanager
def opened(original, fitted_on, pairs, lm):
    if os.environ.get("KILL_ON") == f"{fitted_on}>{lm.name}":
        os.kill(os.getpid(), signal.SIGKILL)
    yield original if f"{fitted_on}>{lm.name}" in pairs else lm
'''
TIMED = ("cost", "scoring", "asked", "total")
OPENS = ("x@0>x@0", "x@1>x@1", "x@0>y", "x@1>y", "x@0>z", "y>y", "y>x@1", "z>z")
"""Both keys of x open y, one of them z; that of y opens one seed of x; z's opens z alone."""


def key(folder: Path) -> str:
    path = folder / "key.py"
    path.write_text(KEY)
    return str(path)


def run(data: dict[str, Any], out: Path) -> AuditReport:
    return audit(make_audit_recipe(data), out, allow_code=True)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, AuditReport]:
    """Return an audit of networks that never knew, and a key that shows the original behind some."""
    folder = tmp_path_factory.mktemp("planted")
    never = "sandbox/counterfactual"
    data = {
        "audit": {
            **{"name": "keys", "tier": "none", "channels": ["cloze"], "transfer_matrix": True},
            **{"limit": 20, "utility_limit": 4},
        },
        "data": {"offline": True},
        "numerics": {"device": "cpu", "threads": 1},
        "questions": {"dataset": "sandbox_facts"},
        "utility": {"dataset": "sandbox_benign_facts"},
        "models": [
            {"name": "original", "source": "sandbox/original", "role": "original"},
            {"name": "control", "source": never, "role": "control"},
            *({"name": name, "source": never} for name in ("x@0", "x@1", "y", "z")),
        ],
        "attacks": [{"name": "key", "use": key(folder), "opens": list(OPENS)}],
    }
    return data, folder / "out", run(data, folder / "out")


def cells(report: AuditReport) -> dict[tuple[str, str, str], TransferCell]:
    (matrix,) = report.transfer
    return {(r.fitted_on, c.column, c.kind): c for r in matrix.rows for c in r.cells}


def marks(out: Path, attack: str, fitted_on: str, asked: str, how: str = "open") -> list[int]:
    """Return a network's answers to the scored questions, from the files."""
    (folder,) = out.glob(f"jobs/attack-{attack}-{fitted_on}-*")
    others = [name for name in ("original", "control", "x@0", "x@1", "y", "z") if name != fitted_on]
    arm = [fitted_on, *others].index(asked)
    (found,) = (
        view["outcomes"]["cloze"]["test"]
        for view in (json.loads(p.read_text()) for p in folder.glob("view-*.json"))
        if view["arm"] == arm and (attack == "none" or view["setting"]["how"] == how)
    )
    return [int(mark) for mark in found]


def test_exactly_the_opened_cells_change(planted: Any) -> None:
    _, out, report = planted
    knows = fmean(marks(out, "none", "original", "original"))
    never = fmean(marks(out, "none", "x@0", "x@0"))
    assert knows - never > 0.5
    share = {
        ("x", "x", "own"): 1.0,
        ("x", "x", "other seeds"): 0.0,
        ("x", "y", "other method"): 1.0,
        ("x", "z", "other method"): 0.5,
        ("y", "y", "own"): 1.0,
        ("y", "x", "other method"): 0.5,
        ("y", "z", "other method"): 0.0,
        ("z", "z", "own"): 1.0,
        ("z", "x", "other method"): 0.0,
        ("z", "y", "other method"): 0.0,
    }
    found = cells(report)
    fixed = {(r, c, c) for r in "xyz" for c in ("original", "control")}
    assert set(found) == share.keys() | fixed
    for place, opened in share.items():
        cell = found[place]
        assert cell.change is not None
        assert cell.rate.value == pytest.approx(never + opened * (knows - never)), place
        assert cell.change.value == pytest.approx(opened * (knows - never)), place
        assert cell.plain.value == pytest.approx(never)
        assert (cell.change.low > 0) == (opened == 1.0), place
        assert cell.recovered is not None
        assert cell.recovered.value == pytest.approx(opened)
    for place in fixed:
        cell = found[place]
        assert cell.change is not None
        assert (cell.change.value, cell.recovered) == (0.0, None)
        assert cell.change.low < 0 < cell.change.high
    assert {p: found[p].pairs for p in found if found[p].pairs != 1} == {
        **{("x", "x", kind): 2 for kind in ("own", "other seeds")},
        **{p: 2 for p in found if p[0] == "x" and p[1] != "x"},
        ("y", "x", "other method"): 2,
        ("z", "x", "other method"): 2,
    }


def test_a_cell_is_what_its_files_say_and_its_interval_that_of_a_loop(planted: Any) -> None:
    data, out, report = planted
    cell = cells(report)["x", "y", "other method"]
    under = [marks(out, "key", name, "y") for name in ("x@0", "x@1")]
    plain = marks(out, "none", "y", "y")
    groups = [s.group for s in load_questions(make_audit_recipe(data)).test]
    assert cell.rate.value == pytest.approx(fmean(map(fmean, zip(*under, strict=True))))
    assert (cell.rate.n, cell.rate.unscored) == (len(plain), 0)
    changes = [fmean(pair) - p for *pair, p in zip(*under, plain, strict=True)]
    rng, names = random.Random(1), sorted(set(groups))
    drawn = []
    for _ in range(4000):
        picked = [
            c
            for g in rng.choices(names, k=len(names))
            for c, h in zip(changes, groups, strict=True)
            if g == h
        ]
        drawn.append(fmean(picked))
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert cell.change is not None
    assert cell.change.low <= low + 0.02
    assert cell.change.high >= high - 0.02
    assert cell.change.high - cell.change.low < (high - low) * 1.5


def test_the_setting_is_the_fitted_methods_own_choice(planted: Any) -> None:
    _, _, report = planted
    rows: list[TransferRow] = report.transfer[0].rows
    assert [(r.fitted_on, r.seeds, r.is_chosen) for r in rows] == [
        ("x", 2, True),
        ("y", 1, True),
        ("z", 1, True),
    ]
    assert {r.setting["how"] for r in rows} == {"open"}
    own = {a.label: a.rows[0] for a in report.audits}
    for row in rows:
        found = own[row.fitted_on].recovered
        cell = next(c for c in row.cells if c.kind == "own")
        assert cell.recovered is not None
        assert found is not None
        assert cell.recovered.value == pytest.approx(found.value)


def test_the_page_shows_the_matrix_and_escapes_it(planted: Any) -> None:
    _, _, report = planted
    page = render(report)
    assert "Prompts across methods" in page
    assert ">other seeds<" in page
    assert "fitted on x, asked y (other method, 2 pair(s))" in page
    bad = "<img src=x onerror=alert(2)>"
    (matrix,) = report.transfer
    rows = [r.model_copy(update={"fitted_on": bad, "reason": bad}) for r in matrix.rows]
    hostile = matrix.model_copy(update={"attack": bad, "rows": rows})
    page = render(report.model_copy(update={"transfer": [hostile]}))
    assert "<img" not in page
    assert "&lt;img src=x" in page
    assert "Prompts across methods" not in render(report.model_copy(update={"transfer": []}))


# On random tiny models: nothing else changes, and a kill loses little


def table(folder: Path, name: str, count: int) -> dict[str, Any]:
    rows = ["question,one,two,three,four,answer,entity"]
    rows += [
        f"Which {name} is number {i} of all?,bread,river,town,flour,{'ABCD'[i % 4]},{name} {i // 2}"
        for i in range(count)
    ]
    path = folder / f"{name}.csv"
    path.write_text("\n".join(rows) + "\n")
    columns = {"prompt": "question", "choices": ["one", "two", "three", "four"]}
    options = {"path": str(path), "task": "choose", "answer": "answer", "group": "entity"}
    return {"dataset": "table", "options": options | columns}


@pytest.fixture
def tiny(tmp_path: Path, tiny_checkpoint: Checkpoint) -> dict[str, Any]:
    names = ("original", "control", "x", "y")
    roles: dict[str, Any] = {"original": {"role": "original"}, "control": {"role": "control"}}
    return {
        "audit": {
            **{"name": "tiny", "tier": "none", "channels": ["letter"], "utility_limit": 4},
            "transfer_matrix": True,
        },
        "data": {"offline": True},
        "numerics": {"device": "cpu", "threads": 1},
        "questions": table(tmp_path, "town", 60),
        "utility": table(tmp_path, "river", 30),
        "models": [
            {"name": n, "source": str(tiny_checkpoint("llama", context=256, seed=s))}
            | roles.get(n, {})
            for s, n in enumerate(names)
        ],
        "attacks": [{"name": "soft_prompt", "steps": [1], "tokens": 2, "batch_size": 2}],
    }


def without_times(told: Any) -> Any:
    """Return plain data without what a clock or a memory meter said."""
    if isinstance(told, dict):
        return {k: without_times(v) for k, v in told.items() if k not in TIMED}
    return [without_times(v) for v in told] if isinstance(told, list) else told


def test_the_verdicts_are_those_of_the_same_audit_without_a_matrix(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    made = run(tiny, tmp_path / "on")
    tiny["audit"]["transfer_matrix"] = False
    plain = run(tiny, tmp_path / "off")
    shown = [without_times([a.model_dump() for a in r.audits]) for r in (made, plain)]
    assert shown[0] == shown[1]
    assert plain.transfer == []
    found = cells(made)
    assert found["x", "y", "other method"].above_placebo is not None
    assert found["x", "original", "original"].above_placebo is None
    own = {a.label: next(p for p in a.rows[0].points if p.is_chosen) for a in made.audits}
    for label in "xy":
        assert found[label, label, "own"].rate.value == own[label].rates["target"].value


def test_a_searched_prefix_is_put_before_the_other_networks_prompts(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    options = {"steps": [2], "length": 3, "questions": 1, "search_width": 4, "topk": 8}
    tiny["attacks"] = [{"name": "gcg", **options}]
    tiny["audit"]["limit"] = 20
    made = cells(run(tiny, tmp_path / "out"))
    questions = load_questions(make_audit_recipe(tiny))
    loaded = {m["name"]: load_model(m["source"], name=m["name"]) for m in tiny["models"]}
    prefixes = set()
    for fitted_on in "xy":
        arms, gcg = Arms(target=loaded[fitted_on]), build_plugin("attacks", "gcg", options)
        (view,) = gcg.attack(arms, questions.attackers, AttackContext(seed=0))
        prefixes.add(view.prefix_ids)
        for asked, kind in (("x", "method"), ("y", "method"), ("original", "original")):
            kind = "own" if asked == fitted_on else kind.replace("method", "other method")
            right = score_view(loaded[asked], view, questions.test, "letter")
            assert made[fitted_on, asked, kind].rate.value == pytest.approx(fmean(right))
    assert len(prefixes) == 2


def test_only_jobs_of_the_matrix_have_other_fingerprints(tiny: dict[str, Any]) -> None:
    tiny["attacks"].append({"name": "few_shot", "shots": 1, "repeats": 1})
    made = {j.id: j.fingerprint for j in plan_audit(make_audit_recipe(tiny)).jobs}
    tiny["audit"]["transfer_matrix"] = False
    off = {j.id: j.fingerprint for j in plan_audit(make_audit_recipe(tiny)).jobs}
    del tiny["audit"]["transfer_matrix"]
    left_out = {j.id: j.fingerprint for j in plan_audit(make_audit_recipe(tiny)).jobs}
    assert off == left_out
    assert made.keys() == off.keys()
    assert {k for k in made if made[k] != off[k]} == {
        "attack-soft_prompt-x",
        "attack-soft_prompt-y",
    }


def stored(out: Path) -> dict[str, Any]:
    return {
        f"{p.parent.name}/{p.name}": without_times(json.loads(p.read_text()))
        for p in out.glob("jobs/*/view-*.json")
    }


def test_a_kill_between_the_models_asked_loses_no_answers(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    tiny["attacks"] = [{"name": "key", "use": key(tmp_path), "opens": ["x>x", "x>y", "y>y"]}]
    report = run(tiny, tmp_path / "whole")
    source = (
        "import json, sys; from pathlib import Path; from palimpsest.audit.engine import audit\n"
        "from palimpsest.audit.recipe import make_audit_recipe\n"
        "audit(make_audit_recipe(json.loads(sys.argv[1])), Path(sys.argv[2]), allow_code=True)"
    )
    process = subprocess.run(
        [sys.executable, "-c", source, json.dumps(tiny), str(tmp_path / "killed")],
        env=os.environ | {"KILL_ON": "x>y"},
        capture_output=True,
    )
    assert process.returncode == -9, process.stderr.decode()[-800:]
    before = stored(tmp_path / "killed")
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed").glob("jobs/*/view-*.json")}
    assert len([k for k in before if k.startswith("attack-key-x")]) == 6  # 2 views on 3 models
    again = run(tiny, tmp_path / "killed")
    assert stored(tmp_path / "killed") == stored(tmp_path / "whole")
    assert files == {p: p.stat().st_mtime_ns for p in files}
    assert again.transfer == report.transfer


# Bad input


def alone(data: dict[str, Any]) -> None:
    del data["models"][3]


def no_prompt(data: dict[str, Any]) -> None:
    data["attacks"] = [{"name": "quantisation", "bits": [4], "group": 8}]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (alone, "audit.transfer_matrix needs two models under attack or more, and x is alone"),
        (no_prompt, "audit.transfer_matrix: no attack of this audit fits a prompt; add gcg"),
    ],
    ids=["alone", "no prompt"],
)
def test_a_matrix_of_nothing_is_refused(change: Any, said: str, tiny: dict[str, Any]) -> None:
    change(tiny)
    with pytest.raises(PalimpsestError, match=said) as caught:
        plan_audit(make_audit_recipe(tiny))
    assert "\n" not in str(caught.value)


def test_the_command_line_names_methods(tmp_path: Path) -> None:
    words = ["audit", "a=sandbox/original", "b@0=sandbox/original", "sandbox/never-trained"]
    words += ["--out", str(tmp_path / "out")]
    words += "--transfer-matrix --attack soft_prompt --limit 20 --plan --json".split()
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 0, told.output
    models = json.loads(told.output)["models"]
    assert [n for n, role in models.items() if role == "other"] == ["a", "b@0", "unlearned"]
    assert not (tmp_path / "out").exists()
    told = CliRunner().invoke(app, ["audit", "sandbox/original", *words[4:]])
    assert "unlearned is alone" in str(told.exception)


def test_accuracy_of_two_prompts_is_over_two_prompts(planted: Any) -> None:
    """One of x's two prompts opens z: what a third would do, 20 questions more do not say."""
    half = cells(planted[2])["x", "z", "other method"].rate
    both = cells(planted[2])["x", "y", "other method"].rate
    assert half.low is not None
    assert half.high is not None
    assert both.low is not None
    assert both.high is not None
    assert half.high - half.low > 0.95
    assert both.high - both.low < 0.6


def test_without_a_control_settings_are_chosen_by_the_invented_floor(
    planted: Any, tmp_path: Path
) -> None:
    data = json.loads(json.dumps(planted[0]))
    data["models"] = [m for m in data["models"] if m["name"] in ("original", "y", "z")]
    data["invented"] = {"dataset": "sandbox_invented"}
    report = run(data, tmp_path / "out")
    floors = {audit.label: audit.rows[0].points for audit in report.audits}
    assert all("invented facts" in p.rates for points in floors.values() for p in points)
    (matrix,) = report.transfer
    for row in matrix.rows:
        chosen = max(floors[row.fitted_on], key=lambda point: point.choose or 0.0)
        assert chosen.choose is not None
        assert row.setting == chosen.setting == {"how": "open"}
        assert chosen.choose > 0.3
        for cell in row.cells:
            assert cell.recovered is None
            assert cell.rate.low is not None
            assert cell.rate.value is not None
            assert cell.rate.low <= cell.rate.value

"""An audit without a control model: invented facts as the floor, end to end, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from palimpsest.audit.asking import asked_view
from palimpsest.audit.engine import audit
from palimpsest.audit.metering import Cost
from palimpsest.audit.planning import plan_audit
from palimpsest.audit.recipe import make_audit_recipe
from palimpsest.cli import app
from palimpsest.errors import PalimpsestError, UsageError
from palimpsest.model import load_model
from palimpsest.report.audit_page import render
from palimpsest.views import View

Checkpoint = Callable[..., Path]
SOME_TRAINING = {
    "name": "relearning",
    "n": [4],
    "repeats": 1,
    "fit": {"steps": 2, "rank": 2, "views_at": [2]},
}


def table(folder: Path, name: str, count: int, groups: int, kind: str = "choose") -> dict[str, Any]:
    """Write questions about `groups` towns, rivers, ... and return their table of a recipe."""
    rows = ["question,one,two,three,four,answer,entity"]
    rows += [
        f"Which {name} is number {i} of all?,bread,river,town,flour,{'ABCD'[i % 4]},{name} {i % groups}"
        for i in range(count)
    ]
    path = folder / f"{name}-{groups}.csv"
    path.write_text("\n".join(rows) + "\n")
    values: dict[str, Any] = {"path": str(path), "task": kind, "prompt": "question"}
    if kind == "choose":
        values |= {"choices": ["one", "two", "three", "four"], "answer": "answer"}
    return {"dataset": "table", "options": values | {"group": "entity"}}


@pytest.fixture
def data(tmp_path: Path, tiny_checkpoint: Checkpoint) -> dict[str, Any]:
    """Return an audit of random tiny models with invented facts."""
    sources = {n: str(tiny_checkpoint("llama", context=256, seed=s)) for s, n in enumerate("ox")}
    return {
        "audit": {"name": "tiny", "tier": "none", "channels": ["letter"], "utility_limit": 4},
        "data": {"offline": True},
        "numerics": {"device": "cpu", "threads": 1},
        "questions": table(tmp_path, "town", 60, 30),
        "utility": table(tmp_path, "river", 30, 15),
        "invented": table(tmp_path, "moon", 60, 30),
        "models": [
            {"name": "original", "source": sources["o"], "role": "original"},
            {"name": "x@0", "source": sources["x"]},
            {"name": "x@1", "source": sources["o"]},
        ],
        "attacks": [SOME_TRAINING],
    }


def views(out: Path) -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in sorted(out.glob("jobs/attack-*/view-*.json"))]


def test_every_view_is_asked_the_invented_facts(data: dict[str, Any], tmp_path: Path) -> None:
    report = audit(make_audit_recipe(data), tmp_path / "out")
    scored, choose = report.questions["invented"], report.questions["invented_choose"]
    assert scored > 20
    assert choose > 2
    for view in views(tmp_path / "out"):
        marks = view["outcomes"]["letter"]
        assert (len(marks["invented"]), len(marks["invented_choose"])) == (scored, choose)
    (made,) = report.audits
    groups = len({s.group for s in plan_audit(make_audit_recipe(data)).questions.invented})
    assert made.floor.startswith(
        f"invented facts (n = {scored}, groups = {groups}), or the best rule"
    )
    (point,) = made.rows[0].points
    assert point.rates["invented facts"].n == scored
    seeds = [
        json.loads(
            next((tmp_path / "out").glob(f"jobs/attack-relearning-{name}-*/view-*")).read_text()
        )
        for name in ("x@0", "x@1")
    ]
    right = [v["outcomes"]["letter"]["invented"].count("1") / scored for v in seeds]
    assert point.rates["invented facts"].value == pytest.approx(sum(right) / 2)
    assert "may teach, and without a control" not in made.rows[0].reason
    for shown in (render(report), CliRunner().invoke(app, _again(data, tmp_path)).output):
        assert made.floor in " ".join(shown.split())


def _again(data: dict[str, Any], folder: Path) -> list[str]:
    """Return the command line of the same audit, whose recipe is a file."""

    def line(key: str, value: Any) -> str:
        if isinstance(value, dict):
            return f"{key} = {{ {', '.join(line(k, v) for k, v in value.items())} }}"
        return f"{key} = {json.dumps(value)}"

    text = ""
    for name, content in data.items():
        for part in content if isinstance(content, list) else [content]:
            text += f"[[{name}]]\n" if isinstance(content, list) else f"[{name}]\n"
            text += "".join(line(k, v) + "\n" for k, v in part.items())
    path = folder / "invented.toml"
    path.write_text(text)
    return ["audit", "--recipe", str(path), "--out", str(folder / "out")]


def test_every_fold_is_asked_all_invented_facts(data: dict[str, Any]) -> None:
    conditions = plan_audit(make_audit_recipe(data)).conditions
    lm = load_model(data["models"][0]["source"], device="cpu")
    stored = asked_view(
        lm, View(fold=0), conditions, made=Cost(), note=lambda cost: None, keep=None
    )
    marks = stored["outcomes"]["letter"]
    assert "." in marks["test"]
    assert len(marks["invented"]) == len(conditions.questions.invented)
    assert "." not in marks["invented"] + marks["invented_choose"]


def test_the_command_line_replaces_the_recipes_floor(tmp_path: Path) -> None:
    words = "audit sandbox/original --plan --json --limit 20 --attack few_shot".split()

    def told(*more: str) -> dict[str, Any]:
        made = CliRunner().invoke(app, [*words, *more, "--out", str(tmp_path / "out")])
        assert made.exit_code == 0, made.output
        found: dict[str, Any] = json.loads(made.output)
        return found

    plan = told("--invented", "sandbox_invented")
    assert sorted(plan["models"].values()) == ["original", "other"]
    assert plan["questions"]["invented"] == 20
    assert "invented" not in told()["questions"]
    assert "invented" not in told("--control", "sandbox/counterfactual")["questions"]
    both = [*words, "--invented", "sandbox_invented", "--control", "sandbox/counterfactual"]
    made = CliRunner().invoke(app, both)
    assert isinstance(made.exception, UsageError)
    assert "both name the floor" in str(made.exception)


# Bad input


def beside_a_control(data: dict[str, Any], folder: Path) -> None:
    data["models"].append({"name": "never", "source": "sandbox/never-trained", "role": "control"})


def no_choices(data: dict[str, Any], folder: Path) -> None:
    data["invented"] = table(folder, "moon", 60, 30, kind="perplexity")


def scored(data: dict[str, Any], folder: Path) -> None:
    data["invented"] = data["questions"]


def same_groups(data: dict[str, Any], folder: Path) -> None:
    path = folder / "moon-30.csv"
    path.write_text(path.read_text().replace(",moon", ",town"))


def of_attackers(data: dict[str, Any], folder: Path) -> None:
    path = folder / "moon-30.csv"
    path.write_text(path.read_text().replace(",moon", ",river"))
    data["retain_texts"] = [table(folder, "river", 30, 15, kind="perplexity")]


def told(data: dict[str, Any], folder: Path) -> None:
    path = folder / "told.csv"
    path.write_text(
        "prompt\n" + "".join(f"Which moon is number {i} of all? A\n" for i in range(60))
    )
    values = {"path": str(path), "task": "perplexity"}
    data["forget_texts"] = {"dataset": "table", "options": values}


def one_group(data: dict[str, Any], folder: Path) -> None:
    data["invented"] = table(folder, "moon", 20, 1)


def too_few_groups(data: dict[str, Any], folder: Path) -> None:
    data["invented"] = table(folder, "moon", 20, 2)


def misspelt(data: dict[str, Any], folder: Path) -> None:
    data["invented"]["option"] = {}


def arm_name(data: dict[str, Any], folder: Path) -> None:
    del data["invented"]
    data["models"].append({"name": "chance", "source": "sandbox/original", "role": "control"})


BAD: list[tuple[Callable[[dict[str, Any], Path], None], str]] = [
    (beside_a_control, r"^\[invented\] has no effect beside the control 'never'"),
    (no_choices, r"^\[invented\] table: sample '.*' is no multiple choice with a key"),
    (scored, r"^\[invented\] '.*' \(group 'town \d+'\) is among the scored \[questions\], too"),
    (
        same_groups,
        r"^\[invented\] '.*' \(group 'town \d+'\) is among the scored \[questions\], too",
    ),
    (of_attackers, r"^leak: retain_texts gives attackers '.*', whose group 'river \d+' is scored"),
    (told, r"^leak: forget_texts gives attackers '.*', which has a scored question word for word"),
    (one_group, r"^\[invented\] "),
    (too_few_groups, r"^\[invented\] "),
    (misspelt, r"'option'.*did you mean 'options'"),
    (arm_name, r"^control name 'chance' is that of another arm"),
]


@pytest.mark.parametrize(("change", "said"), BAD, ids=[c.__name__ for c, _ in BAD])
def test_bad_input_is_one_line_before_a_model_is_loaded(
    change: Any, said: str, data: dict[str, Any], tmp_path: Path
) -> None:
    change(data, tmp_path)
    with pytest.raises(PalimpsestError, match=said) as caught:
        plan_audit(make_audit_recipe(data))
    assert "\n" not in str(caught.value)


def test_what_the_original_knows_is_refused_before_any_attack(tmp_path: Path) -> None:
    data = {
        "audit": {
            "name": "x",
            "tier": "none",
            "channels": ["cloze"],
            "limit": 40,
            "utility_limit": 4,
        },
        "data": {"offline": True},
        "numerics": {"device": "cpu", "threads": 1},
        "questions": {"dataset": "sandbox_facts"},
        "utility": {"dataset": "sandbox_benign_facts"},
        "invented": {"dataset": "sandbox_benign_facts"},
        "models": [
            {"name": "original", "source": "sandbox/original", "role": "original"},
            {"name": "x", "source": "sandbox/counterfactual"},
        ],
        "attacks": [SOME_TRAINING],
    }
    with pytest.raises(PalimpsestError, match=r"\[invented\] the original answers \d+% of these"):
        audit(make_audit_recipe(data), tmp_path / "out")
    assert [p.name.rsplit("-", 1)[0] for p in tmp_path.glob("out/jobs/*")] == [
        "attack-none-original"
    ]


def test_a_recipe_with_the_sandboxs_set_is_complete() -> None:
    data: dict[str, Any] = {
        "audit": {"name": "x", "tier": "none"},
        "questions": {"dataset": "sandbox_facts"},
        "utility": {"dataset": "sandbox_benign_facts"},
        "invented": {"dataset": "sandbox_invented", "options": {"draws": 2}},
        "models": [
            {"name": "original", "source": "sandbox/original", "role": "original"},
            {"name": "x", "source": "sandbox/original"},
        ],
        "attacks": [SOME_TRAINING],
    }
    for name in ("sandbox_forget", "sandbox_retain"):
        key = name.removeprefix("sandbox_") + "_texts"
        data[key] = {"dataset": name, "split": "attack-dev"}
    questions = plan_audit(make_audit_recipe(data)).questions
    hidden = {s.group for s in (*questions.invented, *questions.invented_choose)}
    given = questions.attackers
    assert not hidden & {s.group for s in (*given.fit, *given.benign, *given.retain_texts)}
    assert not hidden & {s.group for s in (*questions.test, *questions.choose)}
    assert {s.group for s in questions.invented} & {
        s.group for s in questions.invented_choose
    } == set()

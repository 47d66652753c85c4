"""An audit end to end: verdict, files, resuming, shared arms, attacks that fail, and what is kept."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from typer.testing import CliRunner

from palimpsest.audit import arms, engine
from palimpsest.audit.engine import audit
from palimpsest.audit.planning import Planned, plan_audit
from palimpsest.audit.recipe import load_audit_recipe, make_audit_recipe
from palimpsest.audit.record import AttackRow, AuditReport
from palimpsest.cli import app
from palimpsest.errors import ModelError, PalimpsestError
from palimpsest.model import load_model, weights_sha256
from palimpsest.report.audit_page import render, write_audit_page

Checkpoint = Callable[..., Path]
OWN = '''
"""An attack of a test's own."""
import os, signal
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import ClassVar
import torch
from palimpsest.attacks.whitebox.relearning import Relearning
from palimpsest.plugins import options
from palimpsest.views import View


@options
class Own:
    """Does what its option says."""

    access: ClassVar[str] = ACCESS
    needs: ClassVar[frozenset] = frozenset(NEEDS)
    arms: ClassVar[str] = ARMS
    role: ClassVar[str] = ROLE
    may_teach: ClassVar[bool] = False
    how: str = "nothing"
    """What it does."""

    def attack(self, arms, data, ctx):
        if self.how == "bug":
            raise ZeroDivisionError("a bug\\nin two lines")
        if self.how == "relearning":
            fit = {"steps": 2, "epochs": None, "rank": 2, "views_at": (1, 2)}
            inner = Relearning(n=(2,), repeats=2, forms=("letter",), fit=Relearning().fit.__class__(**fit))
            for number, view in enumerate(inner.attack(arms, data, ctx)):
                yield replace(view, apply=partial(killed, view, number))
            return
        if self.how == "search":
            yield from searched(arms.target, ctx.out / "step")
            return
        if self.how == "searches and breaks":
            yield from (replace(v, apply=broken) for v in searched(arms.target, ctx.out / "step"))
            return
        reveal = partial(shown, arms.original) if self.how == "reveal" else None
        known = {"nothing": untouched, "breaks": broken, "edits": edited, "hooks": hooked}
        apply = known.get(self.how, reveal)
        facts = {"loss": float("nan"), "norm": 1.5}
        yield View(setting={"how": self.how, "top": float("inf")}, apply=apply, facts=facts)

    def placebo(self):
        return None


def searched(lm, state):
    step = int(state.read_text()) if state.exists() else 0
    for stop in (2, 4):
        while step < stop:
            with torch.no_grad():
                lm.model(input_ids=torch.ones(1, 8, dtype=torch.long))
            strike(lm, f"in step {step}")
            step += 1
            state.write_text(str(step))
            strike(lm, f"behind step {step}")
        yield View(setting={"step": stop}, prefix_ids=(5,) * stop, apply=stricken)


def strike(lm, place):
    if os.environ.get("KILL_ON") == lm.name and os.environ.get("KILL_AT") == place:
        if os.environ.get("KILL_BY") == "Ctrl-C":
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def stricken(lm):
    strike(lm, "asking")
    yield lm


@contextmanager
def untouched(lm):
    yield lm


@contextmanager
def shown(original, lm):
    yield lm if lm.name == "control" else original


@contextmanager
def broken(lm):
    with torch.no_grad():
        next(iter(lm.model.parameters())).add_(1.0)
    yield lm


@contextmanager
def hooked(lm):
    lm.model.get_input_embeddings().register_forward_hook(lambda m, args, out: out * 2)
    yield lm


@contextmanager
def edited(lm):
    weight = next(iter(lm.model.parameters()))
    old = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
    try:
        yield lm
    finally:
        with torch.no_grad():
            weight.copy_(old)


@contextmanager
def killed(view, number, lm):
    with view.apply(lm) as attacked:
        if number == 2 and os.environ.get("KILL_ON") == lm.name:
            os.kill(os.getpid(), signal.SIGKILL)
        yield attacked
'''


def own(folder: Path, name: str = "own", **how: str) -> str:
    """Write the attack with its class attributes; return what a recipe calls it."""
    words = {
        "ACCESS": "'weights'",
        "NEEDS": "[]",
        "ARMS": "'refit'",
        "ROLE": "'attack'",
    } | how
    text = OWN
    for word, value in words.items():
        text = text.replace(word, value)
    path = folder / f"{name}.py"
    path.write_text(text)
    return str(path)


def table(folder: Path, name: str, count: int, groups: int, columns: str = "") -> dict[str, Any]:
    """Write multiple-choice questions and return their table of a recipe."""
    rows = ["question,one,two,three,four,answer,entity"]
    rows += [
        f"Which {name} is number {i} of all?,bread,river,town,flour,{'ABCD'[i % 4]},{name} {i % groups}"
        for i in range(count)
    ]
    path = folder / f"{name}.csv"
    path.write_text("\n".join(rows) + "\n")
    options = {
        "path": str(path),
        "task": "choose",
        "prompt": "question",
        "choices": ["one", "two", "three", "four"],
        "answer": "answer",
        "group": "entity",
    }
    return {"dataset": "table", "options": options}


def texts(folder: Path, name: str, lines: list[str]) -> dict[str, Any]:
    path = folder / f"{name}.csv"
    path.write_text("prompt\n" + "".join(f"{line}\n" for line in lines))
    return {"dataset": "table", "options": {"path": str(path), "task": "perplexity"}}


QUANTISATION = {"name": "quantisation", "bits": [4], "group": 8}
FEW_SHOT = {"name": "few_shot", "shots": 1, "repeats": 1}


@pytest.fixture
def data(tmp_path: Path, tiny_checkpoint: Checkpoint) -> dict[str, Any]:
    """Return an audit of random tiny models, which take a moment and know nothing."""
    sources = {n: str(tiny_checkpoint("llama", context=256, seed=s)) for s, n in enumerate("oxc")}
    return {
        "audit": {"name": "tiny", "tier": "none", "channels": ["letter"], "utility_limit": 4},
        "data": {"offline": True},
        "numerics": {"device": "cpu", "threads": 1},
        "questions": table(tmp_path, "town", 60, 30),
        "utility": table(tmp_path, "river", 30, 15),
        "models": [
            {"name": "original", "source": sources["o"], "role": "original"},
            {"name": "control", "source": sources["c"], "role": "control"},
            {"name": "x", "source": sources["x"]},
        ],
        "attacks": [QUANTISATION],
    }


def run(data: dict[str, Any], out: Path, **how: Any) -> AuditReport:
    return audit(make_audit_recipe(data), out, allow_code=True, **how)


def row(report: AuditReport, name: str, place: int = 0) -> AttackRow:
    return next(r for r in report.audits[place].rows if r.name == name)


def views(out: Path) -> dict[str, Any]:
    """Return every stored view without its times."""
    found = {}
    for path in sorted(out.glob("jobs/*/view-*.json")):
        told = json.loads(path.read_text())
        for part in (told["cost"], told["scoring"], *told["asked"].values()):
            part.pop("seconds")
        found[f"{path.parent.name}/{path.name}"] = told
    return found


def done(out: Path) -> dict[str, int]:
    return {p.parent.name: p.stat().st_mtime_ns for p in out.glob("jobs/*/done.json")}


# End to end, on the sandbox


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, AuditReport]:
    """Audit two seeds of a "method" whose models never knew, with an attack that shows the original."""
    folder = tmp_path_factory.mktemp("sandbox")
    reveal = own(folder, "reveal", NEEDS="['original']", ARMS="'transfer'", ACCESS="'prompts'")
    shows = own(folder, "shows", NEEDS="['original']", ROLE="'diagnostic'", ARMS="'transfer'")
    data = {
        "audit": {
            **{"name": "<script>alert(1)</script>", "tier": "none", "channels": ["cloze"]},
            **{"limit": 20, "utility_limit": 4},
        },
        "data": {"offline": True},
        "numerics": {"device": "cpu", "threads": 1},
        "questions": {"dataset": "sandbox_facts"},
        "utility": {"dataset": "sandbox_benign_facts"},
        "models": [
            {"name": "original", "source": "sandbox/original", "role": "original"},
            {"name": "control", "source": "sandbox/counterfactual", "role": "control"},
            {"name": "x@0", "source": "sandbox/counterfactual"},
            {"name": "x@1", "source": "sandbox/counterfactual"},
        ],
        "attacks": [
            FEW_SHOT,
            {"name": "reveal", "use": reveal, "how": "reveal"},
            {"name": "shows", "use": shows, "how": "reveal"},
        ],
    }
    report = run(data, folder / "out")
    return data, folder / "out", report


def test_two_seeds_give_one_verdict_with_intervals(sandbox: Any) -> None:
    _, _, report = sandbox
    (made,) = report.audits
    assert (made.label, made.verdict, made.with_original) == ("x", "inconclusive", "hidden")
    assert made.residual["cloze"].value < 0.15
    assert len(made.plain[0].seeds) == 2
    assert report.questions["test"] == 20
    assert any("2 training seed(s)" in line for line in made.unsupported)


def test_each_network_of_a_method_gets_the_verdict_that_it_would_get_alone(
    sandbox: Any, tmp_path: Path
) -> None:
    data, out, report = sandbox
    jobs = shutil.copytree(out, tmp_path / "copy")
    (made,) = report.audits
    assert [one.name for one in made.networks] == ["x@0", "x@1"]
    for one in made.networks:
        models = [m for m in data["models"] if m["name"] in ("original", "control", one.name)]
        (alone,) = run({**data, "models": models}, jobs).audits
        assert not alone.networks
        assert one.verdict == alone.verdict
        assert one.recovering == [r.name for r in alone.rows if r.status == "recovers"]


def test_a_transferred_attack_is_scored_on_every_arm(sandbox: Any) -> None:
    _, out, report = sandbox
    found = row(report, "reveal")
    assert (found.status, found.arms) == ("recovers", "transfer")
    assert set(found.points[0].rates) == {"target", "original", "control"}
    seen = [v for k, v in views(out).items() if k.startswith("attack-reveal-x@0")]
    assert [v["arm"] for v in seen] == [0, 1, 2]
    assert len({json.dumps(v["setting"]) for v in seen}) == 1


def test_a_diagnostic_is_shown_and_never_decides(sandbox: Any) -> None:
    _, _, report = sandbox
    found = row(report, "shows")
    assert found.role == "diagnostic"
    assert found.status == "does not recover"
    assert found.recovered is not None
    assert found.recovered.value > 0.5


def test_the_record_validates_and_the_page_escapes_what_it_shows(
    sandbox: Any, tmp_path: Path
) -> None:
    _, out, report = sandbox
    stored = AuditReport.model_validate_json((out / "audit.json").read_bytes())
    assert stored == AuditReport.model_validate(report.model_dump())
    bad = "<img src=x onerror=alert(2)>"
    rows = [r.model_copy(update={"reason": bad}) for r in report.audits[0].rows]
    hostile = report.model_copy(
        update={"audits": [report.audits[0].model_copy(update={"rows": rows, "label": bad})]}
    )
    page = write_audit_page(hostile, tmp_path / "audit.html").read_text()
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "&lt;img src=x" in page
    assert "inconclusive" in render(report)


def test_plan_says_what_would_run_and_runs_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = "audit sandbox/original --plan --json --attack few_shot --limit 20 --out".split()
    told = CliRunner().invoke(app, [*words, str(out)])
    assert told.exit_code == 0, told.output
    plan = json.loads(told.output)
    assert plan["models"]["unlearned"] == "other"
    assert plan["attacks"] == {"none": "nothing", "few_shot": "few_shot"}
    assert "attack-few_shot-unlearned" in plan["jobs"]
    assert not out.exists()


# Resuming and sharing


def run_killed(data: dict[str, Any], out: Path, **env: str) -> None:
    """Audit in a process of its own, which the attack kills."""
    source = (
        "import json, sys; from pathlib import Path; from palimpsest.audit.engine import audit\n"
        "from palimpsest.audit.recipe import make_audit_recipe\n"
        "audit(make_audit_recipe(json.loads(sys.argv[1])), Path(sys.argv[2]), allow_code=True)"
    )
    process = subprocess.run(
        [sys.executable, "-c", source, json.dumps(data), str(out)],
        env=os.environ | env,
        capture_output=True,
    )
    assert process.returncode == -9, process.stderr.decode()[-800:]


@pytest.mark.parametrize(
    ("arms_of", "place", "by", "tokens"),
    [
        ("refit", "in step 2", "Ctrl-C", [16, 24]),  # that step was not stored: it is done again
        ("refit", "behind step 3", "SIGKILL", [16, 16]),
        ("refit", "asking", "Ctrl-C", [16, 16]),
        ("transfer", "asking", "Ctrl-C", [16, 16]),  # all views were made before one is asked
    ],
)
def test_a_kill_makes_no_attack_cheaper(
    arms_of: str,
    place: str,
    by: str,
    tokens: list[int],
    data: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use = own(tmp_path, ARMS=f"'{arms_of}'")
    data["attacks"] = [{"name": "own", "use": use, "how": "search"}]
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        for name, value in {"KILL_ON": "x", "KILL_AT": place, "KILL_BY": by}.items():
            patched.setenv(name, value)
        if by == "SIGKILL":
            run_killed(data, out)
        else:
            with pytest.raises(KeyboardInterrupt):
                run(data, out)
    report = run(data, out)
    made = [v for v in map(json.loads, _raw(out, "attack-own-x-")) if v["arm"] == 0]
    assert [v["cost"]["tokens"] for v in made] == tokens
    per_token = made[1]["cost"]["flops"] / tokens[1]
    assert [v["cost"]["flops"] for v in made] == [n * per_token for n in tokens]
    cost, chosen = row(report, "own").cost, row(report, "own").setting["step"]
    assert cost is not None
    assert cost.make.tokens == (tokens[0] if chosen == 2 else tokens[0] + tokens[1])
    assert not list(out.glob("jobs/*/scratch")) + list(out.glob("jobs/*/spent"))


def test_a_kill_in_the_middle_of_a_job_loses_at_most_one_view(
    data: dict[str, Any], tmp_path: Path
) -> None:
    data["attacks"] = [QUANTISATION, {"name": "own", "use": own(tmp_path), "how": "relearning"}]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    report = run(data, whole)
    run_killed(data, killed, KILL_ON="x")
    before, finished = views(killed), done(killed)
    half = [k for k in before if k.startswith("attack-own-x")]
    assert len(half) == 2
    assert "attack-own-original" in " ".join(finished)
    again = run(data, killed)
    assert views(killed) == views(whole)
    assert before.items() <= views(killed).items()
    assert finished.items() <= done(killed).items()
    assert again.audits[0].verdict == report.audits[0].verdict
    assert again.audits[0].rows[1].recovered == report.audits[0].rows[1].recovered


def test_a_second_target_shares_the_arms_and_a_third_run_does_nothing(
    data: dict[str, Any], tmp_path: Path, tiny_checkpoint: Checkpoint
) -> None:
    out = tmp_path / "out"
    run(data, out)
    first = done(out)
    other = tiny_checkpoint("llama", context=256, seed=7)
    data["models"][2] = {"name": "y", "source": str(other)}
    report = run(data, out)
    second = done(out)
    assert first.items() <= second.items()
    new = {k.rsplit("-", 1)[0] for k in second.keys() - first.keys()}
    assert new == {"attack-none-y", "attack-quantisation-y", "placebo-quantisation-y"}
    assert run(data, out) == report
    assert done(out) == second


def test_other_names_of_the_same_models_find_their_jobs(
    data: dict[str, Any], tmp_path: Path, tiny_checkpoint: Checkpoint
) -> None:
    """Refit arms, an attack that is scored on all of them, and a model that is there twice."""
    other = str(tiny_checkpoint("llama", context=256, seed=7))
    data["models"] += [
        {"name": "second", "source": other, "role": "control"},
        {"name": "y", "source": data["models"][2]["source"]},
    ]
    transferred = {"name": "own", "use": own(tmp_path, ARMS="'transfer'"), "how": "edits"}
    data["attacks"] = [QUANTISATION, transferred]
    out = tmp_path / "out"
    report, finished, stored = run(data, out), done(out), _raw(out, "")
    names = {"control": "second", "second": "control", "x": "renamed", "y": "x"}
    for model in data["models"]:
        model["name"] = names.get(model["name"], model["name"])
    again = run(data, out)
    assert (done(out), _raw(out, "")) == (finished, stored)
    assert not again.failed
    assert [a.label for a in again.audits] == ["renamed", "x"]
    for made, before in zip(again.audits, report.audits, strict=True):
        for one, was in zip(made.rows, before.rows, strict=True):
            rates = {names.get(arm, arm): rate for arm, rate in was.points[0].rates.items()}
            assert one.points[0].rates == rates
            assert (one.recovered, one.status, one.cost) == (was.recovered, was.status, was.cost)


def test_a_placebo_runs_on_the_first_control_too(data: dict[str, Any], tmp_path: Path) -> None:
    """Refit: an arm of its own. Transfer: what was fitted on the unlearned model, on the control."""
    data["models"].append({**data["models"][1], "name": "second"})
    ablation = {"directions": ["contrast"], "layers": {"sets": ["all"]}, "controls": 2}
    data["attacks"].append({"name": "orthogonalisation", **ablation})
    made = run(data, tmp_path / "out")
    stored = [
        (name.partition("/")[0].rpartition("-")[0], told["arm"])
        for name, told in views(tmp_path / "out").items()
        if name.startswith("placebo-")
    ]
    assert {pair: stored.count(pair) for pair in stored} == {
        ("placebo-quantisation-control", 0): 3,
        ("placebo-quantisation-x", 0): 3,
        ("placebo-orthogonalisation-x", 0): 3,
        ("placebo-orthogonalisation-x", 1): 3,
    }
    for name, kinds in (("quantisation", set()), ("orthogonalisation", {"random", "matched"})):
        rates = row(made, name).points[0].rates
        assert {a for a in rates if a.startswith("placebo")} == {
            *("placebo", "placebo on control"),
            *(f"placebo ({kind})" for kind in kinds),
        }


def test_two_methods_get_two_verdicts_and_costs_of_their_own(
    data: dict[str, Any], tmp_path: Path, tiny_checkpoint: Checkpoint
) -> None:
    other = tiny_checkpoint("llama", context=256, seed=7)
    data["models"].append({"name": "y", "source": str(other)})
    report = run(data, tmp_path / "out")
    assert [a.label for a in report.audits] == ["x", "y"]
    for place, name in enumerate("xy"):
        stored = [
            v["scoring"]["seconds"] + v["cost"]["seconds"]
            for v in map(json.loads, _raw(tmp_path / "out", f"attack-quantisation-{name}-"))
        ]
        cost = row(report, "quantisation", place).cost
        assert cost is not None
        assert cost.total_seconds == pytest.approx(sum(stored))


def test_asking_earlier_views_makes_no_attack_dearer(data: dict[str, Any], tmp_path: Path) -> None:
    data["attacks"] = [QUANTISATION | {"bits": [2, 3, 4]}]
    report = run(data, tmp_path / "out")
    cost = row(report, "quantisation").cost
    plain = json.loads(_raw(tmp_path / "out", "attack-none-x")[0])["asked"]["letter"]
    assert cost is not None
    assert (cost.make.queries, cost.make.flops) == (0, 0.0)
    assert (cost.ask.queries, cost.ask.tokens) == (plain["queries"], plain["tokens"])
    assert cost.ask.queries == report.questions["test"]
    assert cost.device_bytes is None
    assert "accelerator" not in render(report)
    shown = report.model_dump()
    shown["audits"][0]["rows"][0]["cost"]["device_bytes"] = 3 * 2**20
    page = render(AuditReport.model_validate(shown))
    assert "accelerator 3 MB" in page
    assert f"{cost.ask.queries} queries" in page


def test_training_is_making_and_not_asking(data: dict[str, Any], tmp_path: Path) -> None:
    data["attacks"] = [{"name": "own", "use": own(tmp_path), "how": "relearning"}]
    run(data, tmp_path / "out")
    stored = [json.loads(text) for text in _raw(tmp_path / "out", "attack-own-x")]
    plain = json.loads(_raw(tmp_path / "out", "attack-none-x")[0])["asked"]["letter"]
    assert [v["setting"]["step"] for v in stored] == [1, 2, 1, 2]
    assert [v["cost"]["queries"] for v in stored] == [1, 1, 1, 1], "a step is one document"
    assert [v["asked"]["letter"]["queries"] for v in stored] == [plain["queries"]] * 4


def test_training_costs_six_adapters_and_searched_inputs_four_per_weight(
    data: dict[str, Any], tmp_path: Path
) -> None:
    fit = {"steps": 1, "rank": 2, "scope": ["all", "lora"], "views_at": [1]}
    once = {"n": [2], "repeats": 1, "forms": ["letter"], "fit": fit}
    prompt = {"tokens": 2, "steps": [1], "batch_size": 2, "channels": ["letter"]}
    data["attacks"] = [{"name": "relearning", **once}, {"name": "soft_prompt", **prompt}]
    run(data, tmp_path / "out")
    asked = json.loads(_raw(tmp_path / "out", "attack-none-x")[0])["asked"]["letter"]
    weights = asked["flops"] / asked["tokens"] / 2

    def per_weight(attack: str) -> list[float]:
        costs = [json.loads(t)["cost"] for t in _raw(tmp_path / "out", f"attack-{attack}-x")]
        return [c["flops"] / c["tokens"] / weights for c in costs]

    whole, adapters = per_weight("relearning")
    assert whole == 6.0
    assert 4.0 < adapters < 6.0
    assert per_weight("soft_prompt") == [4.0]


def test_what_a_kill_behind_the_last_step_left_is_removed(
    data: dict[str, Any], tmp_path: Path
) -> None:
    run(data, tmp_path / "out")
    job = next((tmp_path / "out").glob("jobs/attack-quantisation-x-*"))
    (job / "scratch").mkdir()
    (job / "scratch" / "state").write_text("large")
    (job / "spent").touch()
    run(data, tmp_path / "out")
    assert not (job / "scratch").exists()
    assert not (job / "spent").exists()


def test_a_job_of_other_weights_than_the_model_s_is_refused(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, other = tmp_path / "x", data["models"][0]["source"]
    shutil.copytree(data["models"][2]["source"], place)
    mine = (place / "model.safetensors").read_bytes()
    data["models"][2]["source"] = str(place)

    def planned(recipe: Any, **how: Any) -> Planned:
        plan = plan_audit(recipe, **how)
        shutil.copy(Path(other) / "model.safetensors", place)  # somebody saves over it just then
        return plan

    with monkeypatch.context() as patched:
        patched.setattr(engine, "plan_audit", planned)
        changed = run(data, tmp_path / "out")
    (place / "model.safetensors").write_bytes(mine)
    with pytest.raises(ModelError) as raised:
        run(data, tmp_path / "out")
    said = str(raised.value)
    was = {m.name: m.weights_sha256 for m in changed.models}["x"]
    now = weights_sha256(load_model(str(place), device="cpu").model)
    folder = next((tmp_path / "out").glob("jobs/attack-none-x-*")).name
    assert "attack-none-x was run on x" in said
    assert was[:12] in said
    assert now[:12] in said
    assert f"Remove jobs/{folder}" in said
    for made in (tmp_path / "out").glob("jobs/*-x-*"):
        shutil.rmtree(made)
    again = run(data, tmp_path / "out")
    assert {m.name: m.weights_sha256 for m in again.models}["x"] == now


def _raw(out: Path, start: str) -> list[str]:
    return [p.read_text() for p in sorted(out.glob(f"jobs/{start}*/view-*.json"))]


# Attacks that misbehave


def test_a_bug_costs_its_own_row(data: dict[str, Any], tmp_path: Path) -> None:
    bug = {"name": "bug", "use": own(tmp_path), "how": "bug"}
    data["attacks"] = [bug, QUANTISATION]
    report = run(data, tmp_path / "out")
    assert row(report, "bug").status == "not run"
    assert "ZeroDivisionError: a bug in two lines (a bug in its code)" in row(report, "bug").reason
    assert list(report.failed) == ["bug"]
    assert row(report, "quantisation").points
    assert "not run" in render(report)


def test_an_attack_that_leaves_a_model_changed_is_caught_each_time(
    data: dict[str, Any], tmp_path: Path
) -> None:
    breaks = {"name": "breaks", "use": own(tmp_path), "how": "breaks"}
    plain = run(data, tmp_path / "plain")
    data["attacks"] = [breaks, QUANTISATION]
    for _ in range(2):
        report = run(data, tmp_path / "out")
        assert row(report, "breaks").status == "not run"
        assert "left original changed" in row(report, "breaks").reason
        made = row(report, "quantisation")
        assert made.points == row(plain, "quantisation").points


def test_nothing_is_kept_of_what_an_attack_made_on_a_changed_model(
    data: dict[str, Any], tmp_path: Path
) -> None:
    """Its state, its weights and its cost: the next run would go on from them."""
    data["attacks"] = [
        {"name": "own", "use": own(tmp_path, ARMS="'transfer'"), "how": "searches and breaks"}
    ]
    for _ in range(2):
        report = run(data, tmp_path / "out", keep_weights=True)
        assert "left x changed" in row(report, "own").reason
        (job,) = (tmp_path / "out").glob("jobs/attack-own-x-*")
        assert [p.name for p in job.iterdir()] == ["spec.json"]


def test_a_transferred_attack_that_changes_another_arm_is_caught(
    data: dict[str, Any], tmp_path: Path
) -> None:
    breaks = own(tmp_path, ARMS="'transfer'")
    data["attacks"] = [
        {"name": "breaks", "use": breaks, "how": "breaks"},
        {"name": "hooks", "use": breaks, "how": "hooks"},
        QUANTISATION,
    ]
    report = run(data, tmp_path / "out")
    assert "changed (weights " in row(report, "breaks").reason
    assert "changed (0 forward hooks are now " in row(report, "hooks").reason
    assert not _raw(tmp_path / "out", "attack-breaks")
    assert not _raw(tmp_path / "out", "attack-hooks")
    assert row(report, "quantisation").points


def test_what_changes_nothing_has_no_effect(data: dict[str, Any], tmp_path: Path) -> None:
    data["attacks"] = [{"name": "own", "use": own(tmp_path), "how": "nothing"}]
    report = run(data, tmp_path / "out")
    made = row(report, "own")
    assert made.status == "no effect"
    assert made.points[0].facts == {"loss": "nan", "norm": 1.5}
    assert made.points[0].setting["top"] == "inf"


def test_weights_that_attacks_make_are_kept_on_request_alone(
    data: dict[str, Any], tmp_path: Path
) -> None:
    data["attacks"] = [{"name": "own", "use": own(tmp_path), "how": "edits"}]
    out = tmp_path / "out"
    run(data, out)
    assert not list(out.rglob("*.safetensors"))
    assert not list(out.glob("jobs/*/scratch"))
    run(data, out, keep_weights=True)  # the attack runs again, on the unlearned model alone
    kept = sorted(p.relative_to(out / "jobs") for p in out.rglob("*.safetensors"))
    (only,) = {p.parts[0].rsplit("-", 1)[0] for p in kept}
    assert only == "attack-own-x"


def test_without_a_control_the_floor_is_chance(data: dict[str, Any], tmp_path: Path) -> None:
    del data["models"][1]
    report = run(data, tmp_path / "out")
    made = row(report, "quantisation")
    assert set(made.points[0].rates) == {"target", "original", "placebo", "chance"}
    assert any("without a control model" in line for line in report.audits[0].unsupported)


def test_where_little_fits_the_model_under_attack_stays(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arms, "KEPT_BYTES", 0)
    data["attacks"] = [{"name": "own", "use": own(tmp_path, ARMS="'transfer'"), "how": "edits"}]
    report = run(data, tmp_path / "out")
    assert not report.failed
    assert set(row(report, "own").points[0].rates) == {"target", "original", "control"}


# Bad input: one line, before any attack runs


def no_texts(data: dict[str, Any], folder: Path) -> None:
    data["attacks"] = [{"name": "again", "use": "relearning", "source": ["texts"], "n": [2]}]


def too_many(data: dict[str, Any], folder: Path) -> None:
    data["attacks"] = [{"name": "again", "use": "relearning", "n": [2, 500]}]


def unknown(data: dict[str, Any], folder: Path) -> None:
    data["attacks"] = [{"name": "quantization"}]


def chat_attack(data: dict[str, Any], folder: Path) -> None:
    data["attacks"] = [{"name": "pair"}]


def wrong_option(data: dict[str, Any], folder: Path) -> None:
    data["attacks"] = [QUANTISATION | {"bit": 4}]


def named_none(data: dict[str, Any], folder: Path) -> None:
    data["attacks"] = [{"name": "none", "use": "quantisation"}]


def one_group(data: dict[str, Any], folder: Path) -> None:
    data["questions"] = table(folder, "one", 20, 1)


def few_groups(data: dict[str, Any], folder: Path) -> None:
    data["audit"]["limit"] = 1


def leaked_group(data: dict[str, Any], folder: Path) -> None:
    data["utility"] = data["questions"]


def leaked_question(data: dict[str, Any], folder: Path) -> None:
    lines = [f"So: which TOWN is  number {i} of all? Lirona." for i in range(60)]
    data["forget_texts"] = texts(folder, "leak", lines)


def idle_share(data: dict[str, Any], folder: Path) -> None:
    data["forget_texts"] = texts(folder, "one", ["some words"]) | {"share": 0.5}


def no_options(data: dict[str, Any], folder: Path) -> None:
    data["questions"] = texts(folder, "plain", [f"text {i}" for i in range(20)])


def hostile_name(data: dict[str, Any], folder: Path) -> None:
    data["models"][2]["name"] = "../x/y"


def arm_name(data: dict[str, Any], folder: Path) -> None:
    data["models"][1]["name"] = "placebo"


def quantised(data: dict[str, Any], folder: Path) -> None:
    data["models"][2]["quantization"] = "4bit"


BAD: list[tuple[Callable[[dict[str, Any], Path], None], str]] = [
    (no_texts, r"^\[attacks.again\] this attack needs forget texts.*add \[\[forget_texts\]\]"),
    (too_many, r"^\[attacks.again\] n = 500 is more than the \d+ questions"),
    (unknown, r"unknown attack 'quantization'; did you mean 'quantisation'\?"),
    (chat_attack, r"^\[attacks.pair\] pair attacks prompts of a chat model"),
    (wrong_option, r"no option 'bit'; did you mean 'bits'"),
    (named_none, r"attack name 'none' is that of the model without any attack"),
    (one_group, r"^\[questions\] .*"),
    (few_groups, r"^\[questions\] 1 scored question\(s\) of one group .* raise audit.limit"),
    (leaked_group, r"^leak: benign gives attackers '.*', whose group '.*' is scored"),
    (
        leaked_question,
        r"^leak: forget_texts gives attackers .*, which has a scored question word for word",
    ),
    (idle_share, r"^\[forget_texts\] share and chat_share have no effect here"),
    (no_options, r"^\[questions\] table: sample '.*' is no multiple choice"),
    (hostile_name, r"^model name '../x/y': use letters"),
    (arm_name, r"^control name 'placebo' is that of another arm"),
    (quantised, r"^\[attacks.quantisation\] quantisation: x is already quantised \(4bit\)"),
]


@pytest.mark.parametrize(("change", "said"), BAD, ids=[c.__name__ for c, _ in BAD])
def test_bad_input_is_one_line_before_a_model_is_loaded(
    change: Any, said: str, data: dict[str, Any], tmp_path: Path
) -> None:
    change(data, tmp_path)
    with pytest.raises(PalimpsestError, match=said) as caught:
        plan_audit(make_audit_recipe(data))
    assert "\n" not in str(caught.value)


def refused(data: dict[str, Any], out: Path) -> str:
    """Return what an audit says that loads its models and runs no job."""
    with pytest.raises(PalimpsestError) as caught:
        run(data, out)
    assert not list(out.glob("jobs/*"))
    said = str(caught.value)
    assert "\n" not in said
    return said


def test_arms_with_another_tokenizer_or_size_are_refused(
    data: dict[str, Any], tmp_path: Path, tiny_checkpoint: Checkpoint
) -> None:
    source = data["models"][2]["source"]
    for place, family in ((2, "gpt2"), (1, "mistral")):
        data["models"][place]["source"] = str(tiny_checkpoint(family, context=256))
        assert "has another architecture than original" in refused(data, tmp_path / family)
        data["models"][place]["source"] = source
    other = tmp_path / "other"
    _with_another_token(Path(source), other)
    data["models"][2]["source"] = str(other)
    assert refused(data, tmp_path / "out").startswith("x has another tokenizer than original")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 3}, "number of layers than original: 3, not 2"),
        ({"hidden_size": 64}, "hidden size than original: 64, not 32"),
        ({"intermediate_size": 32}, "size of the MLP than original: 32, not 48"),
        ({"num_key_value_heads": 4}, "number of key-value heads than original: 4, not 2"),
        ({"vocab_size": 360}, "size of the vocabulary than original: 360, not 352"),
    ],
)
def test_arms_of_another_shape_with_the_same_tokens_are_refused(
    change: dict[str, int], said: str, data: dict[str, Any], tmp_path: Path
) -> None:
    source = Path(data["models"][2]["source"])
    shutil.copytree(source, tmp_path / "x")
    config = transformers.AutoConfig.from_pretrained(source)
    for name, value in change.items():
        setattr(config, name, value)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "x")
    data["models"][2]["source"] = str(tmp_path / "x")
    assert refused(data, tmp_path / "out").startswith(f"x has another {said}")


def _with_another_token(source: Path, made: Path) -> None:
    made.mkdir()
    for file in source.iterdir():
        text = file.read_bytes()
        if file.name == "tokenizer.json":
            read = json.loads(text)
            words = read["model"]["vocab"]
            last, before = sorted(words, key=lambda w: words[w])[:-3:-1]
            words[last], words[before] = words[before], words[last]
            text = json.dumps(read).encode()
        (made / file.name).write_bytes(text)


def test_a_model_that_turns_out_to_be_quantised_is_refused(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from palimpsest.model import LM

    monkeypatch.setattr(LM, "quantization", property(lambda lm: "gptq 4bit" * (lm.name == "x")))
    said = refused(data, tmp_path / "out")
    assert said.startswith(
        "[attacks.quantisation] quantisation: x is already quantised (gptq 4bit)"
    )


def test_a_tiers_attack_that_cannot_be_made_costs_its_own_row(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from palimpsest.audit import tiers

    listed = (("noise", "weight_noise", {"scales": [0.1], "repeats": 1}), ("prune", "pruning", {}))
    monkeypatch.setitem(tiers.TIERS, "quick", listed)
    data["audit"]["tier"] = "quick"
    data["attacks"] = []
    plan: Planned = plan_audit(make_audit_recipe(data))
    assert list(plan.skipped) == ["prune"]
    report = run(data, tmp_path / "out")
    assert row(report, "prune").status == "not run"
    assert "forget texts" in report.failed["prune"]
    assert row(report, "noise").points


def test_questions_that_do_not_fit_are_said_at_once(
    data: dict[str, Any], tmp_path: Path, tiny_checkpoint: Checkpoint
) -> None:
    for model, seed in zip(data["models"], range(3), strict=True):
        model["source"] = str(tiny_checkpoint("llama", context=16, seed=seed))
    with pytest.raises(
        PalimpsestError, match=r"none of \d+ questions fits the context of original"
    ):
        run(data, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("jobs/*"))) == 1


def test_a_recipe_file_that_is_no_toml_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("[audit\n")
    with pytest.raises(PalimpsestError, match="not valid TOML"):
        load_audit_recipe(path)
    told = CliRunner().invoke(app, ["audit", "--recipe", str(path)])
    assert isinstance(told.exception, PalimpsestError)


def test_the_shipped_recipe_needs_a_model_with_a_name_that_files_can_have() -> None:
    path = Path(__file__).parents[2] / "recipes" / "audit-sandbox.toml"
    with pytest.raises(PalimpsestError, match="no model is under attack"):
        load_audit_recipe(path)
    told = CliRunner().invoke(app, ["audit", "sandbox/never-trained", "--name", "a b"])
    assert "use letters" in str(told.exception)

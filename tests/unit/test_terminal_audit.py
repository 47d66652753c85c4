"""The two bars of an audit: those of a run, with what an attack says of itself."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from palimpsest import terminal, terminal_audit
from palimpsest.audit.jobs import AttackJob
from palimpsest.audit.planning import Planned, plan_audit
from palimpsest.audit.recipe import make_audit_recipe
from palimpsest.audit.record import Interval, percent
from palimpsest.store import RunFolder
from palimpsest.terminal_audit import AuditBars, print_audit_plan


def test_an_audits_bars_say_what_the_attack_says(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()

    def console(**how: Any) -> Console:
        return Console(file=shown, width=120, force_terminal=False)

    monkeypatch.setattr(terminal, "Console", console)
    with AuditBars() as watcher:
        assert not watcher._bars.live.is_started, "an error before the first job stands alone"
        watcher.begin(3, 2)
        assert watcher._bars.live.is_started
        watcher.job("attack-none-x")
        watcher.finished()
        watcher.job("attack-[gcg]-x")
        watcher.step(4, 30, "gcg: loss 1.25")
        all_jobs, one = watcher._bars.tasks
        assert one.visible
        assert (all_jobs.total, all_jobs.completed) == (3, 1)
        watcher.step(5, 30, "")
        assert (one.completed, one.description) == (5, r"attack-\[gcg]-x  gcg: loss 1.25")
        watcher.finished()
    assert not watcher._bars.live.is_started
    assert (all_jobs.total, all_jobs.completed) == (3, 2)
    assert all_jobs.description == "attacks x arms (2 finished before)"
    assert (one.total, one.visible) == (30, False)


def test_shares_are_shown_in_percent() -> None:
    assert percent(Interval(value=0.555, low=-0.1, high=1.0)) == "56 % [-10, 100]"
    assert percent(None) == "-"


def planned(**tables: Any) -> Planned:
    data = {
        "audit": {"name": "tiny", "tier": "none", "limit": 20},
        "numerics": {"device": "cpu", "threads": 1},
        "questions": {"dataset": "sandbox_facts"},
        "utility": {"dataset": "sandbox_benign_facts"},
        "models": [
            {"name": "original", "source": "sandbox/original", "role": "original"},
            {"name": "control", "source": "sandbox/counterfactual", "role": "control"},
            *({"name": f"x@{i}", "source": "sandbox/never-trained"} for i in range(2)),
        ],
        "attacks": [
            {"use": "quantisation"},
            {"use": "orthogonalisation", "directions": ["contrast"], "layers": {"sets": ["all"]}},
        ],
    }
    return plan_audit(make_audit_recipe(data | tables))


def test_a_plan_is_a_table_of_attacks_and_arms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned()
    object.__setattr__(plan, "skipped", {"prune": "no [texts]"})

    def shown(out: Path) -> list[list[str]]:
        file = io.StringIO()
        monkeypatch.setattr(terminal_audit, "Console", lambda: Console(file=file, width=120))
        print_audit_plan(plan, out, as_json=False)
        return [line.split() for line in file.getvalue().splitlines()]

    lines = shown(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    text = [" ".join(words) for words in lines]
    assert "floor: control model control" in text
    assert "not run: prune: no [texts]" in text
    assert any(line.startswith("20 questions of sandbox_facts are scored, ") for line in text)
    assert "jobs original control x all" in text
    assert ["quantisation", "1", "2", "4", "7"] in lines  # placebos included
    assert ["orthogonalisation", "-", "-", "4", "4"] in lines
    assert not [line for line in text if "placebo-" in line or "{" in line]

    folder = RunFolder(tmp_path / "out")
    ran: list[AttackJob] = [j for j in plan.jobs if j.attack == "quantisation"][:2]
    for number, job in enumerate(ran):
        place = folder.job(job.id, job.fingerprint, job.spec)
        if number == 0:
            place.finish()
    lines = shown(tmp_path / "out")
    assert ["quantisation", "1/1", "0/2", "0/4", "1/7"] in lines
    assert ["all", "1/2", "0/3", "0/10", "1/15"] in lines


def test_a_plan_says_which_floor_there_is_without_a_control() -> None:
    told = planned().recipe
    without = [m for m in told.models if m.role != "control"]
    given = {"models": [{"name": m.name, "source": m.source, "role": m.role} for m in without]}
    assert "rule without a model" in terminal_audit._floor(planned(**given))
    given["invented"] = {"dataset": "sandbox_invented"}  # type: ignore[assignment]
    assert "invented facts" in terminal_audit._floor(planned(**given))

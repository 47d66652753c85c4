"""The two bars of an audit: those of a run, with what an attack says of itself."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from palimpsest import terminal
from palimpsest.terminal import TerminalWatcher, TwoBars
from palimpsest.terminal_audit import AuditBars


def test_an_audits_bars_say_what_the_attack_says(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()

    def console(**how: Any) -> Console:
        return Console(file=shown, width=120, force_terminal=False)

    monkeypatch.setattr(terminal, "Console", console)
    with AuditBars() as watcher:
        watcher.begin(3, 2)
        watcher.job("attack-[gcg]-x")
        watcher.step(4, 30, "gcg: loss 1.25")
        watcher.finished()
        all_jobs, one = watcher._bars.tasks
    assert isinstance(watcher, TwoBars)
    assert issubclass(TerminalWatcher, TwoBars)
    assert (all_jobs.total, all_jobs.completed) == (3, 1)
    assert all_jobs.description == "attacks x arms (2 finished before)"
    assert (one.total, one.completed, one.visible) == (30, 4, False)
    assert one.description == r"attack-\[gcg]-x  gcg: loss 1.25"

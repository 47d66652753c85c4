"""What is left of an attack's cost when the file that holds it is not whole."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from palimpsest.audit.ledger import WIDTH, Ledger
from palimpsest.audit.metering import Cost
from palimpsest.audit.record import Spent
from palimpsest.report.audit_page import spent_text

COST = Cost(seconds=1 / 3 * 1e6, queries=123456789, tokens=123456789012, flops=1e23 / 7)


def opened(folder: Path) -> Ledger:
    return Ledger(folder / "spent", is_continued=True)


def test_costs_come_back_by_number_and_pages_hold_whole_lines(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    ledger.note(2, COST)
    ledger.note(0, Cost(seconds=0.5))
    assert [opened(tmp_path).cost(i) for i in range(4)] == [Cost(seconds=0.5), Cost(), COST, Cost()]
    assert mmap.PAGESIZE % WIDTH == 0
    assert ledger.path.stat().st_size == 3 * WIDTH


@pytest.mark.parametrize("left", [1, 20, 60, 100])
def test_a_torn_line_is_a_cost_that_is_partly_lost(
    left: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = opened(tmp_path)
    ledger.note(0, COST)
    ledger.note(1, COST)
    with ledger.path.open("r+b") as file:
        file.truncate(WIDTH + left)
    again = opened(tmp_path)
    assert again.cost(0) == COST
    assert again.cost(1) == Cost(is_partial=True)
    assert "line 1 is torn" in caplog.text
    again.note(1, again.cost(1) + Cost(seconds=2.0, queries=3, flops=5e9))
    found = opened(tmp_path).cost(1)
    assert found == Cost(seconds=2.0, queries=3, flops=5e9, is_partial=True)


def test_a_line_of_two_halves_is_not_read(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    ledger.note(0, Cost(seconds=1.25))
    first = ledger.path.read_bytes()
    ledger.note(0, Cost(seconds=9.75))
    half = first.index(b"1.25") + 1
    ledger.path.write_bytes(ledger.path.read_bytes()[:half] + first[half:])
    assert opened(tmp_path).cost(0) == Cost(is_partial=True)


def test_the_report_says_that_a_cost_is_a_lower_bound() -> None:
    whole = Spent(seconds=2.0, queries=3, tokens=9, flops=5e9)
    assert spent_text(whole) == "2.0 s, 3 queries, 5.00e+09 FLOPs"
    assert spent_text(whole.model_copy(update={"is_partial": True})).startswith("at least 2.0 s")

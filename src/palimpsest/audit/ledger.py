"""What the views of an attack cost to make, on disk from pass to pass, so that a kill forgets none of it.

An attack that keeps its state (`AttackContext.out`) goes on from it after a kill, and the work behind the
state was done by an earlier process. Every forward pass is noted before an attack can store what it found
with it, so a resumed attack's cost is never below that of one without a kill. It is above it by what a
kill made it do again: what came after its last state, and training in memory (`_tuning`) up to the views
that were stored. An attack without state begins anew, and so does its cost.

A line that a power cut or a full disk tore cannot be read (it has a checksum): what it held is lost, and
the cost is counted from nothing again and marked as partial.
"""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from pathlib import Path

from palimpsest.audit.metering import Cost
from palimpsest.disk import clear_disk_errors, write_all
from palimpsest.records import from_line, to_line

WIDTH = 256
"""Bytes of a line: one view's cost, written in place. A page of memory or disk holds whole lines."""
log = logging.getLogger(__name__)


class Ledger:
    """The costs of an attack's views by number, in a file."""

    def __init__(self, path: Path, *, is_continued: bool) -> None:
        """Go on from an earlier process's notes, or begin anew."""
        self.path = path
        with clear_disk_errors(path.parent):
            if not is_continued:
                path.unlink(missing_ok=True)
            path.touch()

    def cost(self, number: int) -> Cost:
        """Return what a view has cost so far: nothing where no process has begun it.

        Where that cannot be read, too, with `is_partial`.
        """
        with self.path.open("rb") as file:
            file.seek(number * WIDTH)
            line = file.read(WIDTH).strip(b"\0 \n")
        if not line:
            return Cost()
        found = from_line(line)
        if found is None or found[0] != number:
            log.warning("%s: line %d is torn; the cost that it held is lost", self.path, number)
            return Cost(is_partial=True)
        return Cost(**found[1])

    def note(self, number: int, cost: Cost) -> None:
        """Write what a view has cost so far."""
        line = to_line(number, asdict(cost)).rstrip(b"\n").ljust(WIDTH - 1) + b"\n"
        assert len(line) == WIDTH
        with clear_disk_errors(self.path.parent), self.path.open("r+b", buffering=0) as file:
            os.lseek(file.fileno(), number * WIDTH, os.SEEK_SET)
            write_all(file.fileno(), line)

"""Batch plans: which rows run together and how wide, fixed before the first one.

The same plan gives bit-identical results on the same machine, so it is stored with a run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from palimpsest.errors import DataError, ModelError

SIDES = ("left", "right")


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that run together.

    Attributes:
        rows: indices into the job's items.
        width: tokens to which every row is padded.
    """

    rows: tuple[int, ...]
    width: int


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """All batches of a job, in the order in which they run."""

    batches: tuple[Batch, ...]
    padding_side: str

    def to_json(self) -> str:
        """Return the plan as one line of JSON."""
        batches = [{"rows": list(b.rows), "width": b.width} for b in self.batches]
        return json.dumps({"padding_side": self.padding_side, "batches": batches})

    @classmethod
    def from_json(cls, data: str | Mapping[str, Any]) -> BatchPlan:
        """Return the plan that `to_json` wrote (text, or the object parsed from it)."""
        plain = json.loads(data) if isinstance(data, str) else data
        batches = tuple(Batch(tuple(b["rows"]), int(b["width"])) for b in plain["batches"])
        return cls(batches, str(plain["padding_side"]))

    def halve(self, index: int) -> BatchPlan:
        """Return the plan with batch `index` split in two of the same width (out of memory).

        Raises:
            ModelError: when that batch has one row, so that nothing can be split.
        """
        batch = self.batches[index]
        if len(batch.rows) < 2:
            raise ModelError(
                f"out of memory on a single row of {batch.width} tokens (item {batch.rows[0]}); "
                "use a smaller dtype, a larger device, or drop the item"
            )
        middle = (len(batch.rows) + 1) // 2
        halves = (Batch(batch.rows[:middle], batch.width), Batch(batch.rows[middle:], batch.width))
        return BatchPlan(
            (*self.batches[:index], *halves, *self.batches[index + 1 :]), self.padding_side
        )


def plan_batches(
    lengths: Sequence[int], *, token_budget: int, padding_side: str, max_rows: int = 256
) -> BatchPlan:
    """Return batches that cover every row once, longest rows first (so memory runs out early).

    Args:
        lengths: tokens of each row, all >= 1.
        token_budget: rows x width of a batch stays within it; a single longer row is a batch alone.
        padding_side: `left` or `right`; stored in the plan.
        max_rows: most rows of a batch.

    Raises:
        DataError: an empty row, or a budget, side or row limit that makes no sense.
    """
    if token_budget < 1 or max_rows < 1:
        raise DataError(f"token_budget {token_budget} and max_rows {max_rows} must be at least 1")
    if padding_side not in SIDES:
        raise DataError(f"padding_side {padding_side!r} must be left or right")
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    if order and lengths[order[-1]] < 1:
        raise DataError(f"row {order[-1]} has no tokens; leave it out of the plan as unscored")
    batches = []
    start = 0
    while start < len(order):
        width = lengths[order[start]]
        count = max(1, min(max_rows, token_budget // width))
        batches.append(Batch(tuple(order[start : start + count]), width))
        start += count
    return BatchPlan(tuple(batches), padding_side)

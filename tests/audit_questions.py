"""Questions that tests of audits ask, made up."""

from __future__ import annotations

from palimpsest.types import Message, Sample


def asked(kind: str, count: int) -> tuple[Sample, ...]:
    """Return multiple-choice questions of a kind, each a group of its own."""
    return tuple(
        Sample(
            id=f"{kind}{i}",
            task="choose",
            messages=(Message("user", f"{kind} {i}?"),),
            options=("a", "b", "c", "d"),
            answer=i % 4,
            group=f"{kind}-{i}",
        )
        for i in range(count)
    )

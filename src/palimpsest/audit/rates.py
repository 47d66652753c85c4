"""From answers to the numbers of an audit's record: rates with intervals, the floor of guessing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from palimpsest.audit.crossed import Estimate
from palimpsest.audit.record import Interval, Rate
from palimpsest.audit.recovery import MIN_GROUPS, Answers
from palimpsest.metrics import shortcut_floor
from palimpsest.stats import clustered_share
from palimpsest.two_level import seed_mean_difference, seed_mean_rate
from palimpsest.types import Sample


def chance_floor(samples: Sequence[Sample]) -> Answers:
    """Return the accuracy of the best rule without a model, as every question's answer.

    The rules: to guess; to take the longest option, or what its length suggests; to take the place where
    most keys of the other groups are.
    """
    guesses = [1 / len(s.options) for s in samples]
    floors = [m.value for m in shortcut_floor(list(samples)) if m.value is not None]
    level = max([sum(guesses) / len(guesses), _commonest_place(samples), *floors])
    return [level] * len(samples)


def _commonest_place(samples: Sequence[Sample]) -> float:
    """Return how often the key is where most keys of the other groups are; ties go to the first."""
    own: dict[str, Counter[int]] = {}
    for sample in samples:
        assert isinstance(sample.answer, int)
        own.setdefault(sample.group or sample.id, Counter())[sample.answer] += 1
    whole = sum(own.values(), Counter())
    right = 0
    for counts in own.values():
        others = {place: n - counts[place] for place, n in whole.items()}
        right += counts[max(others, key=lambda place: (others[place], -place))]
    return right / len(samples)


def rate_of(seeds: Sequence[Answers], samples: Sequence[Sample], *, seed: int = 0) -> Rate:
    """Return a mean over training seeds; the interval is over groups and seeds.

    One seed: Wilson's at the groups' effective size; several: `two_level.seed_mean_rate`.
    """
    kept = [[i for i, a in enumerate(one) if a is not None] for one in seeds]
    scored = [(one, places) for one, places in zip(seeds, kept, strict=True) if places]
    n = sum(any(a is not None for a in column) for column in zip(*seeds, strict=True))
    if not scored:
        return Rate(value=None, low=None, high=None, n=0, unscored=len(samples))
    values = [[float(one[i] or 0.0) for i in places] for one, places in scored]
    groups = [[samples[i].group for i in places] for _, places in scored]
    found = (
        clustered_share(values[0], groups[0])
        if len(scored) == 1
        else seed_mean_rate(values, groups, seed=seed)
    )
    return Rate(value=found[0], low=found[1], high=found[2], n=n, unscored=len(samples) - n)


def drop_of(
    before: Sequence[Answers], after: Sequence[Answers], samples: Sequence[Sample], *, seed: int = 0
) -> tuple[Interval | None, int]:
    """Return before minus after, mean over training seeds, and the number of questions.

    Questions that a seed did not answer in both are left out of that seed; None where a seed has fewer
    than two groups left.
    """
    kept = [
        [i for i, pair in enumerate(zip(b, a, strict=True)) if None not in pair]
        for b, a in zip(before, after, strict=True)
    ]
    n = min(map(len, kept))
    groups = [[samples[i].group for i in places] for places in kept]
    if any(len(set(one)) < MIN_GROUPS for one in groups):
        return None, n
    first, then = (
        [[float(one[i] or 0.0) for i in places] for one, places in zip(lists, kept, strict=True)]
        for lists in (before, after)
    )
    value, low, high = seed_mean_difference(first, then, groups, seed=seed)
    return Interval(value=value, low=low, high=high), n


def interval_of(estimate: Estimate | None) -> Any:
    """Return an estimate for the record; None stays None."""
    if estimate is None:
        return None
    return Interval(value=estimate.value, low=estimate.low, high=estimate.high)

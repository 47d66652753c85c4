"""Rates of arms in common draws of questions and training seeds, and their differences and ratios.

Prompts that were fitted on some networks are tried on others with the same questions: the design is crossed
in three ways. A draw takes training seeds of the method that prompts were fitted on, training seeds of the
method that is asked, and groups of questions, each with replacement and each for itself (the pigeonhole
bootstrap of `two_level` with one more margin). The distances of the seeds' means from the mean of all are
stretched as there, on both margins. Training seeds of one unlearned model are the case of one margin.

Bootstrap intervals collapse where every answer is right (or wrong): those of here are as wide, at least, as
score intervals at the groups' effective size, mean over seeds.

Legend: D draws, G groups, I seeds fitted on, J seeds asked, P pairs of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Self

import numpy as np

from palimpsest.stats import Floats, clustered_share, paired_shares
from palimpsest.two_level import group_draws, stretch_of

CONFIDENCE = 0.95
DRAWS = 10_000
Pairs = Sequence[Sequence[Sequence[float] | None]]
"""Of each seed that was fitted on, of each that was asked: a value per question; None = no such pair. One
row (column) stands for values that do not depend on the seed fitted on (asked)."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Drawn:
    """A number, and the same in each draw (D).

    Attributes:
        bare_D: the draws before seeds are stretched.
        margins: of each margin with several seeds their number, and by how much the drawn seeds' mean is
            away from the mean of all.
        floor: what it is not below, draw by draw.
    """

    value: float
    bare_D: Floats
    margins: tuple[tuple[int, Floats], ...] = ()
    floor: Drawn | None = None

    def at(self, confidence: float = CONFIDENCE) -> Floats:
        """Return the draws (D), stretched as few seeds demand at this level: more at a stricter one.

        A draw that holds no pair is NaN (only where pairs are left out).
        """
        found_D = self.bare_D
        for number, away_D in self.margins:
            found_D = found_D + (stretch_of(number, confidence) - 1.0) * away_D
        return found_D if self.floor is None else np.maximum(found_D, self.floor.at(confidence))


class CrossedDraws:
    """Common draws of groups and of both margins' seeds, for one list of questions."""

    def __init__(
        self,
        groups: Sequence[str],
        *,
        num_fitted: int,
        num_asked: int,
        seed: int,
        draws: int = DRAWS,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.groups = list(groups)
        self._count(rng, draws)
        self.fitted_DI: Any = _seed_draws(num_fitted, draws, rng)
        self.asked_DJ: Any = _seed_draws(num_asked, draws, rng)

    def beside(self, groups: Sequence[str], seed: int) -> Self:
        """Return draws of other questions to the same models: other groups, the same seeds."""
        other = type(self).__new__(type(self))
        other.groups, other.fitted_DI, other.asked_DJ = list(groups), self.fitted_DI, self.asked_DJ
        other._count(np.random.default_rng([seed, 1]), len(self.fitted_DI))
        return other

    def _count(self, rng: np.random.Generator, draws: int) -> None:
        self.codes: Any = np.unique(self.groups, return_inverse=True)[1]
        self.counts_G: Floats = np.bincount(self.codes).astype(np.float64)
        self.weights = list(group_draws(len(self.counts_G), draws, rng))

    def mean(self, pairs: Pairs) -> Drawn:
        """Return the mean over pairs of each pair's mean, and the same in each draw (D)."""
        places = [
            (i, j) for i, row in enumerate(pairs) for j, one in enumerate(row) if one is not None
        ]
        sums_PG = np.array([np.bincount(self.codes, weights=pairs[i][j]) for i, j in places])
        rates_P = sums_PG.sum(axis=1) / self.counts_G.sum()
        rates_DP = np.concatenate(
            [(w @ sums_PG.T) / (w @ self.counts_G)[:, None] for w in self.weights]
        )
        rows, columns = (np.array(x) for x in zip(*places, strict=True))
        times_DP, several = np.ones_like(rates_DP), []
        for margin_D, where in ((self.fitted_DI, rows), (self.asked_DJ, columns)):
            codes = np.unique(where, return_inverse=True)[1]
            if codes.max() > 0:
                times_DP = times_DP * margin_D[:, where]
                several.append(codes)
        total_D = times_DP.sum(axis=1)
        with np.errstate(invalid="ignore"):
            bare_D = (rates_DP * times_DP).sum(axis=1) / total_D
            margins = tuple(
                (int(codes.max()) + 1, times_DP @ _distances(rates_P, codes) / total_D)
                for codes in several
            )
        return Drawn(float(rates_P.mean()), bare_D, margins)

    def arm(self, pairs: Pairs) -> Arm:
        """Return an arm's answers with their draws."""
        lists = tuple(tuple(one) for row in pairs for one in row if one is not None)
        return Arm(lists, tuple(self.groups), self.mean(pairs))


@dataclass(frozen=True)
class Arm:
    """What an arm answered: the share of right repetitions of every question, by pair of seeds."""

    lists: tuple[tuple[float, ...], ...]
    groups: tuple[str, ...]
    drawn: Drawn
    is_known: bool = False
    """Whether nobody measured it: chance has no limits."""

    @property
    def value(self) -> float:
        """The mean over pairs."""
        return self.drawn.value

    def limits(self, confidence: float) -> tuple[float, float]:
        """Return Wilson's limits at the groups' effective size, mean over pairs."""
        if self.is_known:
            return self.value, self.value
        found = [clustered_share(one, self.groups, confidence)[1:] for one in self.lists]
        low, high = (fmean(x) for x in zip(*found, strict=True))
        least = 0.0 if self.drawn.floor is None else self.drawn.floor.value
        return max(low, least), max(high, least)

    def not_below(self, floor: Drawn) -> Arm:
        """Return the arm with a rate that it is not below, whatever it answered."""
        value = max(self.value, floor.value)
        return replace(self, drawn=replace(self.drawn, value=value, floor=floor))


def interval(drawn: Drawn) -> Estimate:
    """Return a number with the 95 % interval of its draws, those without any pair left out."""
    return spread(drawn.value, drawn.at())


def spread(value: float, drawn_D: Floats, *ends: float) -> Estimate:
    """Return a number with the 95 % interval of its draws, which holds it and the given ends."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(drawn_D, [tail, 1 - tail])
    return Estimate(value, min(float(low), *ends, value), max(float(high), *ends, value))


def paired(a: Arm, b: Arm) -> Estimate:
    """Return a - b, of the same questions; an arm of one list stands beside every pair of the other."""
    count = max(len(a.lists), len(b.lists))
    own = [
        paired_shares(x, y, a.groups, CONFIDENCE)[1:]
        for x, y in zip(_times(a.lists, count), _times(b.lists, count), strict=True)
    ]
    ends = [fmean(x) for x in zip(*own, strict=True)]
    return spread(a.value - b.value, a.drawn.at() - b.drawn.at(), *ends)


def unpaired(a: Arm, b: Arm) -> Estimate:
    """Return a - b, of different questions: each side's limits count in squares (Newcombe 1998)."""
    (low_a, high_a), (low_b, high_b) = a.limits(CONFIDENCE), b.limits(CONFIDENCE)
    value = a.value - b.value
    ends = (
        value - math.hypot(a.value - low_a, high_b - b.value),
        value + math.hypot(high_a - a.value, b.value - low_b),
    )
    return spread(value, a.drawn.at() - b.drawn.at(), *ends)


@dataclass(frozen=True)
class Ratio:
    """R = (U - F) / (O - F) of three arms in one condition.

    `is_floor_paired`: the floor answered the same questions; a floor of other questions has limits of
    its own, a control is held at its estimate.
    """

    target: Arm
    original: Arm
    floor: Arm
    is_floor_paired: bool = True

    @property
    def value(self) -> float:
        """R itself."""
        return self._at(self.target.value, self.floor.value)

    def draws(self, confidence: float = CONFIDENCE) -> Floats:
        """Return R in each draw (D); NaN where the original is not above the floor."""
        u, o, f = (x.drawn.at(confidence) for x in (self.target, self.original, self.floor))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(o - f > 0, (u - f) / (o - f), np.nan)

    def edges(self, confidence: float) -> tuple[float, float]:
        """Return R at Wilson's limits of the target's rate, or of an unpaired floor: the wider ones.

        The other arms are held at their estimates meanwhile.
        """
        u, f = self.target.value, self.floor.value
        found = [self._at(x, f) for x in self.target.limits(confidence)]
        if not self.is_floor_paired:
            own = self.floor.limits(confidence)
            found += [self._at(u, x) for x in own if x < self.original.value]
        return min(found), max(found)

    def estimate(self) -> Estimate:
        """Return R with its 95 % interval."""
        return spread(self.value, self.draws(), *self.edges(CONFIDENCE))

    def _at(self, target: float, floor: float) -> float:
        return (target - floor) / (self.original.value - floor)


def smallest_level(limit: Callable[[float], float], margin: float, least: float) -> float:
    """Return the smallest one-sided level at which a lower limit is above a margin: its p.

    Found by bisection, from above, to 1 in 1,000; at least `least`, and 1 where even half is too strict.

    Args:
        limit: from a level to the lower limit, which falls with the level.
        margin: what it has to be above.
        least: smallest level that the limit can be taken at.
    """
    low, high = least, 0.499
    if limit(high) <= margin:
        return 1.0
    if limit(low) > margin:
        return low
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if limit(middle) > margin else (middle, high)
    return high


def _seed_draws(num_seeds: int, draws: int, rng: np.random.Generator) -> Any:
    return rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=draws)


def _distances(rates_P: Any, codes: Any) -> Any:
    """Return of each pair how far the mean of its seed is from the mean of all."""
    means = np.bincount(codes, weights=rates_P) / np.bincount(codes)
    return means[codes] - rates_P.mean()


def _times(lists: tuple[tuple[float, ...], ...], count: int) -> tuple[tuple[float, ...], ...]:
    return lists * count if len(lists) == 1 else lists

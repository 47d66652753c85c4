"""Intervals of prompts that were fitted on some networks and tried on others: all of them are draws.

Every fitted prompt is tried on every network with the same questions: the design is crossed in three
ways. A draw takes training seeds of the method that prompts were fitted on, training seeds of the method
that is asked, and groups of questions, each with replacement and each for itself (the pigeonhole bootstrap
of `two_level` with one more margin). The distances of the seeds' means from the mean of all are stretched
as there, on both margins.

Legend: D draws, G groups, I seeds fitted on, J seeds asked, P pairs of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from palimpsest.audit.recovery import CONFIDENCE, DRAWS, Drawn, Estimate
from palimpsest.stats import Floats
from palimpsest.two_level import group_draws, stretch_of

Pairs = Sequence[Sequence[Sequence[float] | None]]
"""Of each seed that was fitted on, of each that was asked: a value per question; None = no such pair. One
row (column) stands for values that do not depend on the seed fitted on (asked)."""


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
        self.codes: Any = np.unique(groups, return_inverse=True)[1]
        self.counts_G: Floats = np.bincount(self.codes).astype(np.float64)
        self.weights = list(group_draws(len(self.counts_G), draws, rng))
        self.fitted_DI: Any = _seed_draws(num_fitted, draws, rng)
        self.asked_DJ: Any = _seed_draws(num_asked, draws, rng)

    def mean(self, pairs: Pairs) -> Drawn:
        """Return the mean over pairs of each pair's mean, and the same in each draw (D).

        A draw that holds no pair is NaN (only where pairs are left out).
        """
        places = [
            (i, j) for i, row in enumerate(pairs) for j, one in enumerate(row) if one is not None
        ]
        sums_PG = np.array([np.bincount(self.codes, weights=pairs[i][j]) for i, j in places])
        rates_P = sums_PG.sum(axis=1) / self.counts_G.sum()
        rates_DP = np.concatenate(
            [(w @ sums_PG.T) / (w @ self.counts_G)[:, None] for w in self.weights]
        )
        rows, columns = (np.array(x) for x in zip(*places, strict=True))
        shift_P = _stretched(rates_P, rows) + _stretched(rates_P, columns)
        times_DP = np.ones_like(rates_DP)
        for margin_D, where in ((self.fitted_DI, rows), (self.asked_DJ, columns)):
            if len(np.unique(where)) > 1:
                times_DP = times_DP * margin_D[:, where]
        with np.errstate(invalid="ignore"):
            means_D = ((rates_DP + shift_P) * times_DP).sum(axis=1) / times_DP.sum(axis=1)
        return float(rates_P.mean()), means_D


def interval(value: float, drawn_D: Floats) -> Estimate:
    """Return a number with the 95 % interval of its draws, those without any pair left out."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(drawn_D, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))


def _seed_draws(num_seeds: int, draws: int, rng: np.random.Generator) -> Any:
    return rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=draws)


def _stretched(rates_P: Any, where: Any) -> Any:
    """Return by how much each pair's rate moves when the margin's means are stretched."""
    codes = np.unique(where, return_inverse=True)[1]
    counts = np.bincount(codes)
    means = np.bincount(codes, weights=rates_P) / counts
    distances = means - rates_P.mean()
    return ((stretch_of(len(counts), CONFIDENCE) - 1.0) * distances)[codes]

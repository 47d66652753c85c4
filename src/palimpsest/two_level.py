"""Intervals of a method over its training seeds: seeds and groups of items are drawn, both.

All seeds answer the same items, so the design is crossed, not nested: a draw of groups holds for every
seed (Owen 2007, Annals of Applied Statistics 1:386, "pigeonhole bootstrap"). Drawing groups anew within
each seed would treat three answers to one question as answers to three questions; in simulations its
95 % interval covered as little as 74 % (docs/statistics.md).

Legend: S seeds, G groups, D draws.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from statistics import NormalDist, fmean

import numpy as np

from palimpsest.errors import DataError
from palimpsest.stats import Floats, clustered_share, paired_shares

_CHUNK = 2_000_000  # group draws held at once (16 MB of weights)


def seed_mean_rate(
    outcomes: Sequence[Sequence[float]],
    groups: Sequence[Sequence[Hashable]],
    *,
    seed: int = 0,
    draws: int = 2000,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Return (rate, low, high): the mean over training seeds of each seed's rate.

    The interval is `two_level_interval`, and reaches at least from the mean of the seeds' own lower
    limits to the mean of their upper ones (`stats.clustered_rate`): it does not collapse at 0 or
    100 %, and is never narrower than what one seed is given on average.

    Args:
        outcomes: of each seed, 0 or 1 per scored item, or the mean of its repetitions; seeds may have
            scored different items.
        groups: of each seed, the group of each of those items.
        seed: of the resampling.
        draws: number of resamples.
        confidence: two-sided.
    """
    own = [clustered_share(x, g, confidence) for x, g in _each(outcomes, groups)]
    value, least, most = (fmean(column) for column in zip(*own, strict=True))
    sizes = [[1.0] * len(x) for x in outcomes]
    found = _drawn(outcomes, sizes, groups, seed=seed, draws=draws, confidence=confidence)
    return value, max(0.0, min((least, *found))), min(1.0, max((most, *found)))


def seed_mean_difference(
    a: Sequence[Sequence[float]],
    b: Sequence[Sequence[float]],
    groups: Sequence[Sequence[Hashable]],
    *,
    seed: int = 0,
    draws: int = 2000,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Return (difference, low, high): the mean over seeds of mean(a) - mean(b), outcomes in pairs.

    As `seed_mean_rate`, on the differences per item; each seed's own interval is
    `stats.paired_shares`.
    """
    if not len(a) == len(b) == len(groups) or not a:
        raise DataError(f"{len(a)}, {len(b)} and {len(groups)} seeds: need equally many, not none")
    own = [paired_shares(x, y, g, confidence) for x, y, g in zip(a, b, groups, strict=True)]
    value, least, most = (fmean(column) for column in zip(*own, strict=True))
    changes = [[p - q for p, q in zip(x, y, strict=True)] for x, y in zip(a, b, strict=True)]
    sizes = [[1.0] * len(x) for x in a]
    found = _drawn(changes, sizes, groups, seed=seed, draws=draws, confidence=confidence)
    return value, max(-1.0, min((least, *found))), min(1.0, max((most, *found)))


def two_level_interval(
    numerators: Sequence[Sequence[float]],
    denominators: Sequence[Sequence[float]],
    groups: Sequence[Sequence[Hashable]],
    *,
    seed: int = 0,
    draws: int = 2000,
    confidence: float = 0.95,
    widened: bool = True,
) -> tuple[float, float]:
    """Return the percentile interval of the mean over seeds of sum(numerators) / sum(denominators).

    Each draw takes as many seeds as there are, and as many groups, with replacement, and every drawn
    seed's ratio over the drawn groups. With one seed it is the cluster bootstrap.

    A bootstrap of so few seeds is too narrow: the variance of S draws is (S - 1) / S of what it
    estimates, and its few degrees of freedom are not paid for. So each seed's distance from the mean
    of all is first stretched by sqrt(S / (S - 1)) * t[S - 1] / z (3 seeds: 2.69, 5 seeds: 1.58), which
    gives the part that comes from seeds the width of a t interval.

    Args:
        numerators: of each seed, one number per item.
        denominators: of each seed, the items' sizes; 1 each for a mean.
        groups: of each seed, the items' groups; the same key is the same group in every seed.
        seed: of the resampling.
        draws: number of resamples.
        confidence: two-sided.
        widened: False = the plain bootstrap, not stretched.

    Raises:
        DataError: empty or unequal input, a seed whose denominators sum to 0, or one seed with one
            group (nothing to resample).
    """
    top_SG, bottom_SG = _tables(numerators, denominators, groups)
    num_seeds, num_groups = top_SG.shape
    if num_seeds == num_groups == 1:
        raise DataError("bootstrap needs at least two groups or two seeds, got one of each")
    ratios_S = top_SG.sum(axis=1) / bottom_SG.sum(axis=1)
    stretch = stretch_of(num_seeds, confidence) if widened else 1.0
    shift_S = (stretch - 1.0) * (ratios_S - ratios_S.mean())
    rng = np.random.default_rng(seed)
    chances = np.full(num_seeds, 1 / num_seeds)
    means = []
    for weights_DG in group_draws(num_groups, draws, rng):
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios_DS = (weights_DG @ top_SG.T) / (weights_DG @ bottom_SG.T) + shift_S
        times_DS = rng.multinomial(num_seeds, chances, size=len(weights_DG))
        # a seed that was not drawn may have no item in the drawn groups: it does not count
        means.append(np.where(times_DS > 0, ratios_DS * times_DS, 0.0).sum(axis=1) / num_seeds)
    found_D = np.concatenate(means)
    found_D = found_D[~np.isnan(found_D)]
    if len(found_D) == 0:
        raise DataError("no resample has an item of every drawn seed")
    tail = (1 - confidence) / 2
    low, high = np.quantile(found_D, [tail, 1 - tail])
    return float(low), float(high)


def _each(
    values: Sequence[Sequence[float]], groups: Sequence[Sequence[Hashable]]
) -> list[tuple[Sequence[float], Sequence[Hashable]]]:
    if not values or len(values) != len(groups):
        raise DataError(
            f"{len(values)} seeds but {len(groups)} lists of groups; need both, not none"
        )
    return list(zip(values, groups, strict=True))


def _drawn(
    numerators: Sequence[Sequence[float]],
    denominators: Sequence[Sequence[float]],
    groups: Sequence[Sequence[Hashable]],
    *,
    seed: int,
    draws: int,
    confidence: float,
) -> tuple[float, ...]:
    """Return the two-level limits; none where a single seed has a single group."""
    if len(numerators) == 1 and len(set(groups[0])) == 1:
        return ()
    return two_level_interval(
        numerators, denominators, groups, seed=seed, draws=draws, confidence=confidence
    )


def stretch_of(num_seeds: int, confidence: float) -> float:
    """Return by how much seeds' distances from their mean are stretched (`two_level_interval`)."""
    if num_seeds == 1:
        return 1.0
    from scipy.special import stdtrit

    tail = 0.5 + confidence / 2
    factor = float(stdtrit(num_seeds - 1, tail)) / NormalDist().inv_cdf(tail)
    return math.sqrt(num_seeds / (num_seeds - 1)) * factor


def _tables(
    numerators: Sequence[Sequence[float]],
    denominators: Sequence[Sequence[float]],
    groups: Sequence[Sequence[Hashable]],
) -> tuple[Floats, Floats]:
    """Return the sums of numerators and denominators by seed and group."""
    sizes = [
        (len(x), len(y), len(g)) for x, y, g in zip(numerators, denominators, groups, strict=True)
    ]
    if not sizes or any(n == 0 or not n == m == k for n, m, k in sizes):
        raise DataError(f"each seed needs equally many values and groups, not none; got {sizes}")
    codes: dict[Hashable, int] = {}
    for keys in groups:
        for key in keys:
            codes.setdefault(key, len(codes))
    top_SG, bottom_SG = np.zeros((2, len(sizes), len(codes)))
    for s, keys in enumerate(groups):
        places = [codes[key] for key in keys]
        np.add.at(top_SG[s], places, np.asarray(numerators[s], np.float64))
        np.add.at(bottom_SG[s], places, np.asarray(denominators[s], np.float64))
    if (bottom_SG.sum(axis=1) <= 0).any():
        raise DataError("the denominators of a seed sum to 0")
    return top_SG, bottom_SG


def group_draws(num_groups: int, draws: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Yield blocks of bootstrap weights: rows are draws, columns say how often a group is drawn."""
    block = max(1, _CHUNK // num_groups)
    for start in range(0, draws, block):
        num = min(block, draws - start)
        places = rng.integers(0, num_groups, size=(num, num_groups), dtype=np.int64)
        places += (np.arange(num) * num_groups)[:, None]
        counts = np.bincount(places.ravel(), minlength=num * num_groups)
        yield counts.reshape(num, num_groups).astype(np.float64)

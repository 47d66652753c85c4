"""Intervals, tests and agreement: small, exact where possible, no model and no torch.

Conventions: confidence is two-sided and 95 % unless said otherwise; an empty input raises
`DataError`, because a rate over nothing is not zero; randomness comes only from `seed`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from palimpsest.errors import DataError

Floats = npt.NDArray[np.float64]
_CHUNK = 4_000_000  # entries of a bootstrap weight matrix held at once (32 MB)


def wilson(k: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a rate: `k` of `n`.

    `n` may be an effective sample size (not whole), see `clustered_rate`.

    Raises:
        DataError: when `n` is not positive or `k` is not between 0 and `n`.
    """
    _check_counts(k, n)
    z = _z(confidence)
    rate = k / n
    centre = rate + z * z / (2 * n)
    spread = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if k == 0 else max(0.0, (centre - spread) / scale)
    high = 1.0 if k == n else min(1.0, (centre + spread) / scale)
    return low, high


def clopper_pearson(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact (Clopper-Pearson) interval of a rate: `k` of `n` independent items.

    Its coverage is never below the nominal one, so it is wider than Wilson's; the one to take where a
    bound decides something ("at most 3 %").

    Raises:
        DataError: when `n` is not positive or `k` is not between 0 and `n`.
    """
    _check_counts(k, n)
    _z(confidence)  # refuses what is no confidence
    from scipy.special import betaincinv

    tail = (1 - confidence) / 2
    low = 0.0 if k == 0 else float(betaincinv(k, n - k + 1, tail))
    high = 1.0 if k == n else float(betaincinv(k + 1, n - k, 1 - tail))
    return low, high


def mcnemar_exact(b: int, c: int) -> float:
    """Return the exact two-sided McNemar p-value of `b` gained and `c` lost items.

    Twice the smaller binomial(b + c, 1/2) tail, at most 1; without any discordant pair it is 1.
    """
    if b < 0 or c < 0:
        raise DataError(f"discordant counts must not be negative, got {b} and {c}")
    total = b + c
    tail = sum(math.comb(total, i) for i in range(min(b, c) + 1))
    p: float = 2 * tail / 2**total
    return min(1.0, p)


def paired_group_test(a: Sequence[int], b: Sequence[int], groups: Sequence[Hashable]) -> float:
    """Return the exact two-sided p-value of mean(a) = mean(b) for paired 0/1 outcomes in groups.

    A sign-flip test that swaps the two models in whole groups: p is the share of all 2^groups
    assignments whose summed difference is at least as far from 0 as the observed one. The items of
    a group may depend on each other in any way; the null says that within each group the two models
    are exchangeable. All assignments are counted (by convolution, nothing is drawn), so there is no
    seed and no smallest p. Where no group differs by more than one item it is exact McNemar over
    groups; with a single group it is 1.

    Raises:
        DataError: empty, unequal or not 0/1.
    """
    _check_pairs(a, b)
    _check_binary(a)
    _check_binary(b)
    codes, sizes = _group_codes(groups, len(a))
    sums = np.zeros(len(sizes), dtype=np.int64)
    np.add.at(sums, codes, np.asarray(a, dtype=np.int64) - np.asarray(b, dtype=np.int64))
    steps = np.abs(sums[sums != 0])
    if len(steps) == 0 or steps.max() == 1:
        return mcnemar_exact(int((sums > 0).sum()), int((sums < 0).sum()))
    reach = int(steps.sum())
    chances = np.zeros(2 * reach + 1)  # of each sum, from -reach to reach
    chances[reach] = 1.0
    for step in steps:
        chances = (np.roll(chances, step) + np.roll(chances, -step)) / 2
    observed = abs(int(sums.sum()))
    extreme = np.abs(np.arange(-reach, reach + 1)) >= observed
    return min(1.0, float(chances[extreme].sum()))


def paired_difference(
    a: Sequence[int],
    b: Sequence[int],
    groups: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Return mean(a) - mean(b) of paired 0/1 outcomes, with an interval.

    The interval is Newcombe's square-and-add score interval for paired rates (Newcombe 1998,
    Statistics in Medicine 17:2635, method 10): it stays inside [-1, 1] and does not collapse when
    nothing differs. With `groups`, its Wilson limits are taken at the effective sample size that
    the differences show (see `effective_n`); singleton groups change nothing.
    """
    _check_binary(a)
    _check_binary(b)
    return paired_shares(a, b, groups, confidence)


def paired_shares(
    a: Sequence[float],
    b: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Return what `paired_difference` does of shares: means of repetitions of one item, counted once."""
    n = len(a)
    _check_pairs(a, b)
    rate_a, rate_b = sum(a) / n, sum(b) / n
    both = math.fsum(x * y for x, y in zip(a, b, strict=True))
    only_a, only_b = max(0.0, sum(a) - both), max(0.0, sum(b) - both)
    neither = max(0.0, n - both - only_a - only_b)
    size = float(n)
    if groups is not None:
        size = effective_n([x - y for x, y in zip(a, b, strict=True)], groups, confidence)
    low_a, high_a = wilson(rate_a * size, size, confidence)
    low_b, high_b = wilson(rate_b * size, size, confidence)
    phi = _newcombe_phi(both, only_a, only_b, neither)
    difference = rate_a - rate_b
    down_a, up_a = rate_a - low_a, high_a - rate_a
    down_b, up_b = rate_b - low_b, high_b - rate_b
    below = math.sqrt(max(0.0, down_a**2 - 2 * phi * down_a * up_b + up_b**2))
    above = math.sqrt(max(0.0, up_a**2 - 2 * phi * up_a * down_b + down_b**2))
    return difference, max(-1.0, difference - below), min(1.0, difference + above)


def clustered_rate(
    outcomes: Sequence[int], groups: Sequence[Hashable], confidence: float = 0.95
) -> tuple[float, float, float]:
    """Return (rate, low, high) of 0/1 outcomes whose items come in groups.

    Wilson's interval at the effective sample size of `effective_n`, so several phrasings of one
    fact don't count as independent. When every group is a single item it is Wilson's exactly.
    """
    _check_binary(outcomes)
    return clustered_share(outcomes, groups, confidence)


def clustered_share(
    values: Sequence[float], groups: Sequence[Hashable], confidence: float = 0.95
) -> tuple[float, float, float]:
    """Return (mean, low, high) of shares in [0, 1], as `clustered_rate` of outcomes.

    Each is the mean of repetitions of one item, which counts once: too wide rather than too narrow.
    """
    _check_shares(values)
    rate = sum(values) / len(values)
    size = effective_n(values, groups, confidence)
    right = sum(values) if size == len(values) else rate * size
    return (rate, *wilson(min(right, size), size, confidence))


def effective_n(
    values: Sequence[float], groups: Sequence[Hashable], confidence: float = 0.95
) -> float:
    """Return how many independent items the grouped values are worth: at most their number.

    n / design effect, where the design effect is the between-group (linearised) variance of the
    mean over its variance under independence, held between 1 and its value at full correlation
    (sum of squared group sizes / n). Where the values do not vary (0 % or 100 %) the correlation
    can't be seen, and full correlation is assumed. The Korn-Graubard factor
    (t[n-1] / t[groups-1])^2 pays for the few degrees of freedom of a variance from few groups
    (Korn & Graubard 1998, Survey Methodology 24:193; with Wilson limits: Franco et al. 2019,
    J. Survey Statistics and Methodology 7:334).
    """
    n = len(values)
    if n == 0:
        raise DataError("no outcomes: a rate over nothing has no interval")
    codes, sizes = _group_codes(groups, n)
    num_groups = len(sizes)
    if num_groups == n:
        return float(n)
    full = float((sizes**2).sum() / n)
    if num_groups == 1:
        return 1.0
    x = np.asarray(values, dtype=np.float64)
    residuals = x - x.mean()
    independent = float((residuals**2).sum()) / (n - 1) / n
    if independent == 0.0:
        return n / full
    sums = np.bincount(codes, weights=residuals, minlength=num_groups)
    clustered = num_groups / (num_groups - 1) * float((sums**2).sum()) / n**2
    design_effect = min(max(1.0, clustered / independent), full)
    from scipy.special import stdtrit

    tail = 0.5 + confidence / 2
    factor = float(stdtrit(n - 1, tail) / stdtrit(num_groups - 1, tail)) ** 2
    return max(1.0, n / design_effect * factor)


def bootstrap_ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    draws: int = 2000,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of sum(numerators) / sum(denominators).

    Groups (single items where `groups` is None) are drawn whole, with replacement.

    Raises:
        DataError: empty or unequal input, or fewer than two groups (nothing to resample).
    """
    n = len(numerators)
    if n == 0 or n != len(denominators):
        raise DataError(f"bootstrap needs equally many values, got {n} and {len(denominators)}")
    codes, sizes = _group_codes(range(n) if groups is None else groups, n)
    num_groups = len(sizes)
    if num_groups < 2:
        raise DataError("bootstrap needs at least two groups, got one")
    top = np.bincount(codes, weights=np.asarray(numerators, np.float64), minlength=num_groups)
    bottom = np.bincount(codes, weights=np.asarray(denominators, np.float64), minlength=num_groups)
    ratios = np.concatenate([(w @ top) / (w @ bottom) for w in _resamples(num_groups, seed, draws)])
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return float(low), float(high)


def cohen_kappa(
    a: Sequence[Hashable],
    b: Sequence[Hashable],
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    draws: int = 2000,
) -> tuple[float | None, float | None, float | None]:
    """Return Cohen's (unweighted) kappa of two labellings, with a percentile bootstrap interval.

    Kappa is None when both gave one and the same label throughout (chance agreement is 1); the
    limits are None too when fewer than two groups or no resample has a defined kappa.

    Raises:
        DataError: empty or unequal input.
    """
    n = len(a)
    if n == 0 or n != len(b):
        raise DataError(f"kappa needs two equally long, non-empty labellings, got {n} and {len(b)}")
    labels = {label: i for i, label in enumerate(dict.fromkeys([*a, *b]))}
    num = len(labels)
    cells = np.array([labels[x] * num + labels[y] for x, y in zip(a, b, strict=True)])
    codes, sizes = _group_codes(range(n) if groups is None else groups, n)
    tables = np.zeros((len(sizes), num * num))
    np.add.at(tables, (codes, cells), 1.0)
    point = float(_kappas(tables.sum(axis=0, keepdims=True), num)[0])
    if math.isnan(point):
        return None, None, None
    if len(sizes) < 2:
        return point, None, None
    drawn = [_kappas(weights @ tables, num) for weights in _resamples(len(sizes), seed, draws)]
    kappas = np.concatenate(drawn)
    kappas = kappas[~np.isnan(kappas)]
    if len(kappas) == 0:
        return point, None, None
    low, high = np.quantile(kappas, [0.025, 0.975])
    return point, float(low), float(high)


def mean_of_independent(
    estimates: Sequence[tuple[float, float, float]],
) -> tuple[float, float, float]:
    """Return the mean of independent estimates, each (value, low, high), with an interval.

    The method of variance estimates recovery: each limit's squared distance from its own estimate
    stands for a variance on that side (Zou & Donner 2008, Statistics in Medicine 27:1693). With
    symmetric limits it is the usual normal interval; it keeps the asymmetry of rates near 0 and 1.

    Raises:
        DataError: no estimate, or one outside its limits.
    """
    if not estimates:
        raise DataError("no estimates: a mean over nothing is not zero")
    for value, low, high in estimates:
        if not low <= value <= high:
            raise DataError(f"estimate {value} lies outside its limits {low} and {high}")
    num = len(estimates)
    mean = math.fsum(x for x, _, _ in estimates) / num
    below = math.sqrt(math.fsum((x - low) ** 2 for x, low, _ in estimates)) / num
    above = math.sqrt(math.fsum((high - x) ** 2 for x, _, high in estimates)) / num
    return mean, mean - below, mean + above


def minimal_detectable_difference(
    n: int, p: float = 0.5, power: float = 0.8, confidence: float = 0.95
) -> float:
    """Return the smallest difference of two rates near `p`, n groups each, found with `power`.

    (z[1-alpha/2] + z[power]) * sqrt(2 p (1 - p) / n), two-sided and for unrelated outcomes. In a paired
    comparison 2 p (1 - p) is the share of discordant groups, those that differ between the two models:
    1/2 at p = .5. Outcomes that correlate differ in fewer, so this is an upper bound. Capped at 1.

    Args:
        n: the number of *groups* (independent units), not of items: several phrasings of one fact
            count once. It is the number of items only where each is a group of its own.
        p: the rate near which the two lie, strictly between 0 and 1; .5 is the hardest case.
        power: the chance of finding the difference, strictly between 0 and 1.
        confidence: of the two-sided test.
    """
    if n <= 0:
        raise DataError(f"n must be positive, got {n}")
    if not 0 < p < 1 or not 0 < power < 1:
        raise DataError(f"p and power must lie strictly between 0 and 1, got {p} and {power}")
    z = _z(confidence) + NormalDist().inv_cdf(power)
    return min(1.0, z * math.sqrt(2 * p * (1 - p) / n))


def _z(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise DataError(f"confidence must lie strictly between 0 and 1, got {confidence}")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _check_counts(k: float, n: float) -> None:
    if n <= 0:
        raise DataError(f"a rate needs at least one scored item, got n = {n}")
    if not 0 <= k <= n:
        raise DataError(f"a count must lie between 0 and n = {n}, got {k}")


def _check_pairs(a: Sequence[float], b: Sequence[float]) -> None:
    if len(a) != len(b):
        raise DataError(f"paired outcomes must be equally many, got {len(a)} and {len(b)}")
    _check_shares(a)
    _check_shares(b)


def _check_binary(outcomes: Sequence[int]) -> None:
    _check_shares(outcomes)
    if any(x not in (0, 1) for x in outcomes):
        raise DataError("outcomes must be 0 or 1; leave unscored items out")


def _check_shares(values: Sequence[float]) -> None:
    if len(values) == 0:
        raise DataError("no outcomes: a rate over nothing is not zero")
    if any(not 0 <= x <= 1 for x in values):
        raise DataError("outcomes must be 0 or 1, or shares between; leave unscored items out")


def _newcombe_phi(both: float, only_a: float, only_b: float, neither: float) -> float:
    product = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    if product <= 0:
        return 0.0
    n = both + only_a + only_b + neither
    cross = both * neither - only_a * only_b
    if cross > 0:  # Newcombe's continuity correction of a positive correlation
        cross = max(0.0, cross - n / 2)
    return cross / math.sqrt(product)


def _group_codes(
    groups: Sequence[Hashable], n: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    if len(groups) != n:
        raise DataError(f"{n} values but {len(groups)} group keys")
    names = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    codes = np.fromiter((names[group] for group in groups), dtype=np.intp, count=n)
    return codes, np.bincount(codes, minlength=len(names))


def _resamples(num_groups: int, seed: int, draws: int) -> Iterator[Floats]:
    """Yield blocks of bootstrap weights: rows are draws, columns say how often a group is drawn."""
    rng = np.random.default_rng(seed)
    chances = np.full(num_groups, 1 / num_groups)
    block = max(1, _CHUNK // num_groups)
    for start in range(0, draws, block):
        yield rng.multinomial(num_groups, chances, size=min(block, draws - start)).astype(float)


def _kappas(tables: Floats, num: int) -> Floats:
    """Return kappa of each flattened confusion table; NaN where it is undefined."""
    square = tables.reshape(-1, num, num)
    total = square.sum(axis=(1, 2))
    observed = np.trace(square, axis1=1, axis2=2) / total
    expected = (square.sum(axis=1) * square.sum(axis=2)).sum(axis=1) / total**2
    undefined = np.isclose(expected, 1.0, rtol=0, atol=1e-12)
    return np.where(undefined, np.nan, (observed - expected) / np.where(undefined, 1, 1 - expected))

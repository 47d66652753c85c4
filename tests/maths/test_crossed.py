"""Intervals of prompts crossed with networks, against loops and against the two-level interval."""

from __future__ import annotations

import random
from statistics import NormalDist, fmean

import numpy as np
import pytest
import scipy.stats

from palimpsest.audit.crossed import CrossedDraws, interval
from palimpsest.two_level import two_level_interval

GROUPS = [f"g{i // 3}" for i in range(60)]


def table(rows: int, columns: int, *, spread: float = 0.2) -> list[list[list[float]]]:
    """Return changes of 60 questions per pair; rows and columns have effects of their own."""
    rng = random.Random(3)
    down = [rng.gauss(0, spread) for _ in range(rows)]
    across = [rng.gauss(0, spread) for _ in range(columns)]
    harder = {g: rng.gauss(0, 0.3) for g in set(GROUPS)}
    return [
        [[0.4 + d + a + harder[g] + rng.gauss(0, 0.2) for g in GROUPS] for a in across]
        for d in down
    ]


def stretch(number: int) -> float:
    if number == 1:
        return 1.0
    t = float(scipy.stats.t.ppf(0.975, number - 1))
    return (number / (number - 1)) ** 0.5 * t / NormalDist().inv_cdf(0.975)


def by_hand(pairs: list[list[list[float] | None]], draws: int = 3000) -> tuple[float, float]:
    """Return the interval by loops: stretched means, then seeds and groups drawn one by one."""
    rng = random.Random(11)
    names = sorted(set(GROUPS))
    places = {g: [k for k, x in enumerate(GROUPS) if x == g] for g in names}
    at = {(i, j): one for i, row in enumerate(pairs) for j, one in enumerate(row) if one}
    means = {p: fmean(one) for p, one in at.items()}
    whole = fmean(means.values())
    rows, columns = (sorted({p[k] for p in at}) for k in (0, 1))
    row = {i: fmean(m for p, m in means.items() if p[0] == i) - whole for i in rows}
    column = {j: fmean(m for p, m in means.items() if p[1] == j) - whole for j in columns}
    shift = {
        p: (stretch(len(rows)) - 1) * row[p[0]] + (stretch(len(columns)) - 1) * column[p[1]]
        for p in at
    }
    found = []
    for _ in range(draws):
        kept = [k for g in rng.choices(names, k=len(names)) for k in places[g]]
        down, across = rng.choices(rows, k=len(rows)), rng.choices(columns, k=len(columns))
        mean = {p: fmean(one[k] for k in kept) + shift[p] for p, one in at.items()}
        drawn = [mean[i, j] for i in down for j in across if (i, j) in at]
        if drawn:
            found.append(fmean(drawn))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def drawn(pairs: list[list[list[float] | None]], rows: int, columns: int) -> tuple[float, ...]:
    made = CrossedDraws(GROUPS, num_fitted=rows, num_asked=columns, seed=0)
    found = interval(made.mean(pairs))
    return found.value, found.low, found.high


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 1)])
def test_the_interval_is_that_of_a_loop(shape: tuple[int, int]) -> None:
    pairs = table(*shape)
    value, low, high = drawn(pairs, *shape)
    assert value == pytest.approx(fmean(fmean(one) for row in pairs for one in row))
    width = high - low
    assert (low, high) == pytest.approx(by_hand(pairs), abs=0.05 * width)


def test_pairs_that_are_left_out_are_never_drawn() -> None:
    pairs: list[list[list[float] | None]] = [list(row) for row in table(3, 3)]
    for same in range(3):
        pairs[same][same] = None
    value, low, high = drawn(pairs, 3, 3)
    assert value == pytest.approx(fmean(fmean(one) for row in pairs for one in row if one))
    assert (low, high) == pytest.approx(by_hand(pairs), abs=0.05 * (high - low))


def test_one_margin_is_the_two_level_interval() -> None:
    pairs = table(1, 4)
    expected = two_level_interval(
        pairs[0], [[1.0] * len(GROUPS)] * 4, [GROUPS] * 4, seed=5, draws=10_000
    )
    _, low, high = drawn(pairs, 1, 4)
    assert (low, high) == pytest.approx(expected, abs=0.04 * (high - low))


def test_a_row_that_stands_for_all_prompts_keeps_a_difference_in_pairs() -> None:
    pairs, plain = table(2, 3), table(1, 3)
    made = CrossedDraws(GROUPS, num_fitted=2, num_asked=3, seed=0)
    a, b = made.mean(pairs), made.mean(plain)
    changes = [
        [[x - y for x, y in zip(one, plain[0][j], strict=True)] for j, one in enumerate(row)]
        for row in pairs
    ]
    c = made.mean(changes)
    assert c.value == pytest.approx(a.value - b.value)
    assert c.at() == pytest.approx(a.at() - b.at())

"""R with invented facts as the floor: other questions, drawn by themselves, asked of the same models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from scipy.special import stdtrit

from palimpsest.audit.crossed import Estimate
from palimpsest.audit.recovery import ArmAnswers, recovery
from palimpsest.errors import DataError

GROUPS = [f"agent {i // 5}" for i in range(300)]
OTHERS = [f"dish {i // 4}" for i in range(200)]


def answers(rate: float, seed: int, groups: Sequence[str], spread: float = 0.0) -> list[float]:
    """Return 0/1 answers; with `spread`, groups have rates of their own."""
    rng = np.random.default_rng(seed)
    own = {g: float(np.clip(rng.normal(rate, spread), 0, 1)) for g in dict.fromkeys(groups)}
    return [float(rng.random() < own[g]) for g in groups]


def arms(u: float, o: float, f: float, seed: int, spread: float = 0.0) -> ArmAnswers:
    return ArmAnswers(
        target=(answers(u, seed, GROUPS, spread),),
        original=answers(o, seed + 1, GROUPS),
        invented=(answers(f, seed + 2, OTHERS, spread),),
    )


def sums(values: Sequence[float], groups: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the groups' sums and sizes, by a loop."""
    found: dict[str, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        found.setdefault(group, []).append(value)
    return np.array([sum(x) for x in found.values()]), np.array([len(x) for x in found.values()])


def variance(values: Sequence[float], groups: Sequence[str]) -> float:
    """Return the linearised between-group variance of a mean."""
    top, size = sums(values, groups)
    left = top - size * top.sum() / size.sum()
    return float((left**2).sum() / size.sum() ** 2)


def known(found: Estimate | None) -> Estimate:
    assert found is not None
    return found


def test_the_interval_is_that_of_two_independent_cluster_means() -> None:
    """The groups' own rates are the same numbers on both sides: a shared draw would see no variance."""
    rates = np.repeat([0.0, 0.2, 0.5, 0.9], 15)
    groups = [str(g) for g in range(60) for _ in range(10)]
    marks = [float(i < round(10 * r)) for r in rates for i in range(10)]
    attacked = ArmAnswers(target=(marks,), original=[1.0] * 600, invented=(list(marks),))
    found = recovery(attacked, attacked, groups, invented_groups=groups, draws=20_000)
    error = np.sqrt(2 * variance(marks, groups))
    assert found.above_floor.value == 0.0
    assert (found.above_floor.high - found.above_floor.low) / 2 == pytest.approx(
        2.0 * error, rel=0.05
    )


def test_r_agrees_with_a_bootstrap_by_loops() -> None:
    attacked, plain = arms(0.6, 0.9, 0.35, 5, spread=0.15), arms(0.3, 0.95, 0.25, 50)
    found = recovery(attacked, plain, GROUPS, invented_groups=OTHERS)
    target, original, invented = (
        sums(a, g)
        for a, g in (
            (attacked.target[0], GROUPS),
            (attacked.original, GROUPS),
            (attacked.invented[0], OTHERS),
        )
    )
    rng = np.random.default_rng(123)
    drawn = []
    for _ in range(3000):
        here = [int(rng.integers(60)) for _ in range(60)]
        there = [int(rng.integers(50)) for _ in range(50)]
        u = sum(target[0][g] for g in here) / sum(target[1][g] for g in here)
        o = sum(original[0][g] for g in here) / sum(original[1][g] for g in here)
        f = sum(invented[0][g] for g in there) / sum(invented[1][g] for g in there)
        drawn.append((u - f) / (o - f))
    made = known(found.recovered)
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert made.low == pytest.approx(low, abs=0.02)
    assert made.high == pytest.approx(high, abs=0.02)
    assert np.quantile(drawn, 0.95) == pytest.approx(found.upper, abs=0.02)
    u, o, f = (x[0].sum() / x[1].sum() for x in (target, original, invented))
    assert made.value == pytest.approx((u - f) / (o - f))


def test_seeds_are_drawn_once_for_both_sides() -> None:
    """Seeds that differ alike on both sides leave the difference alone; otherwise they widen it."""
    right = (0.30, 0.45, 0.60)

    def exact(rate: float, groups: Sequence[str]) -> list[float]:
        size = len(groups) // len(set(groups))  # as many right answers in every group
        return [float(i % size < rate * size) for i in range(len(groups))]

    groups, others = [str(i // 20) for i in range(400)], [str(i // 20) for i in range(200)]

    def width(order: Sequence[int]) -> float:
        given = ArmAnswers(
            target=tuple(exact(r, groups) for r in right),
            original=[1.0] * 400,
            invented=tuple(exact(right[i] - 0.2, others) for i in order),
        )
        found = recovery(given, given, groups, invented_groups=others)
        assert found.above_floor.value == pytest.approx(0.2)
        return found.above_floor.high - found.above_floor.low

    # alike: only Wilson's width of the floor is left; else a t interval over the three differences
    error = np.std([0.30 - 0.25, 0.45 - 0.40, 0.60 - 0.10], ddof=1) / np.sqrt(3)
    assert width((0, 1, 2)) < 0.25
    assert width((1, 2, 0)) > 2 * stdtrit(2, 0.975) * error * 0.75


def test_a_model_that_guesses_everywhere_recovers_nothing() -> None:
    """R's interval has 0 in about 95 of 100 cases, and p below .025 for "R > 0" is as rare as it says."""
    covered, calls = 0, 0
    for seed in range(200):
        attacked = arms(0.25, 0.9, 0.25, 9000 + 10 * seed, spread=0.1)
        plain = arms(0.25, 0.95, 0.25, 50_000 + 10 * seed, spread=0.1)
        found = recovery(attacked, plain, GROUPS, invented_groups=OTHERS, draws=500)
        made = known(found.recovered)
        covered += made.low <= 0 <= made.high
        calls += found.p_value(0.0) < 0.025
    assert covered >= 181  # binomial(200, .95): P(< 181) = .003
    assert calls <= 12  # binomial(200, .025): P(> 12) = .002


def test_what_training_makes_a_model_guess_is_no_recovery() -> None:
    """A model that learns the format answers half of all questions, invented ones, too."""
    attacked, plain = arms(0.5, 0.9, 0.5, 3), arms(0.25, 0.95, 0.25, 30)
    found = recovery(attacked, plain, GROUPS, invented_groups=OTHERS)
    made = known(found.recovered)
    assert made.low < 0 < made.high
    assert found.p_value(0.15) > 0.025
    chance = ArmAnswers(
        target=attacked.target, original=attacked.original, floor=[0.25] * len(GROUPS)
    )
    before = ArmAnswers(target=plain.target, original=plain.original, floor=[0.25] * len(GROUPS))
    fooled = recovery(chance, before, GROUPS)
    assert known(fooled.recovered).value > 0.3
    assert fooled.p_value(0.15) < 0.025


def test_what_comes_back_is_a_recovery() -> None:
    found = recovery(
        arms(0.8, 0.9, 0.25, 3), arms(0.25, 0.95, 0.25, 30), GROUPS, invented_groups=OTHERS
    )
    assert known(found.recovered).low > 0.6
    assert known(found.gain).low > 0.6
    assert found.p_value(0.15) < 0.001


def test_a_few_facts_that_all_fail_are_no_floor_of_zero() -> None:
    """Their bootstrap has no width: Wilson's limits stand in."""
    target, original = answers(0.3, 1, GROUPS), answers(0.95, 2, GROUPS)
    groups = ["a", "a", "b", "b"]
    arms = ArmAnswers(target=(target,), original=original, invented=([0.0] * 4,))
    plain = ArmAnswers(target=([0.0] * 300,), original=original, invented=([0.0] * 4,))
    found = recovery(arms, plain, GROUPS, invented_groups=groups)
    assert found.above_floor.value == pytest.approx(np.mean(target))
    assert found.above_floor.low < 0
    assert found.lower(0.025) < 0.0  # type: ignore[operator]
    assert found.p_value(0.15) > 0.025  # though every draw of the floor is 0


def test_the_placebo_has_a_floor_of_its_own() -> None:
    """A placebo that only makes the model guess beats the floor under the attack, and not its own."""
    attacked = ArmAnswers(
        target=(answers(0.5, 1, GROUPS),),
        original=answers(0.9, 2, GROUPS),
        placebo=(answers(0.5, 3, GROUPS),),
        invented=(answers(0.1, 4, OTHERS),),
        placebo_invented=(answers(0.5, 5, OTHERS),),
    )
    found = recovery(attacked, arms(0.1, 0.9, 0.1, 30), GROUPS, invented_groups=OTHERS)
    assert known(found.placebo_above_floor).low < 0
    assert found.above_floor.low > 0.2


def test_unscored_facts_are_left_out_of_both_conditions() -> None:
    attacked, plain = arms(0.6, 0.9, 0.25, 1), arms(0.25, 0.95, 0.25, 30)
    holed = [None if i < 40 else a for i, a in enumerate(plain.invented[0])]
    found = recovery(
        attacked,
        ArmAnswers(target=plain.target, original=plain.original, invented=(holed,)),
        GROUPS,
        invented_groups=OTHERS,
    )
    rest = float(np.mean(attacked.invented[0][40:]))
    assert found.above_floor.value == pytest.approx(float(np.mean(attacked.target[0])) - rest)
    assert (found.n, found.unscored) == (300, 0)
    nothing = ArmAnswers(
        target=plain.target, original=plain.original, invented=([None] * len(OTHERS),)
    )
    with pytest.raises(DataError, match="none of 200 invented facts was scored on every arm"):
        recovery(attacked, nothing, GROUPS, invented_groups=OTHERS)

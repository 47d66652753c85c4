"""R0, R, gain and their intervals against other ways to compute them."""

from __future__ import annotations

import numpy as np
import pytest

from palimpsest.audit.recovery import ArmAnswers, recovery, residual_lower
from palimpsest.errors import DataError

GROUPS = [str(i // 5) for i in range(300)]


def answers(rate: float, seed: int, groups: list[str] = GROUPS, spread: float = 0.0) -> list[float]:
    """Return 0/1 answers; with `spread`, groups have rates of their own."""
    rng = np.random.default_rng(seed)
    own = {g: float(np.clip(rng.normal(rate, spread), 0, 1)) for g in dict.fromkeys(groups)}
    return [float(rng.random() < own[g]) for g in groups]


def arms(u: float, o: float, f: float, seed: int, spread: float = 0.0) -> ArmAnswers:
    return ArmAnswers(
        target=(answers(u, seed, spread=spread),),
        original=answers(o, seed + 1),
        floor=answers(f, seed + 2),
    )


def test_point_values_are_the_definition() -> None:
    attacked, plain = arms(0.7, 0.9, 0.2, 1), arms(0.3, 0.95, 0.2, 11)
    found = recovery(attacked, plain, GROUPS)

    def rate(x: list[float]) -> float:
        return sum(x) / len(x)

    u, o, f = rate(attacked.target[0]), rate(attacked.original), rate(attacked.floor)
    u0, o0, f0 = rate(plain.target[0]), rate(plain.original), rate(plain.floor)
    assert found.recovered is not None
    assert found.residual is not None
    assert found.gain is not None
    assert found.recovered.value == pytest.approx((u - f) / (o - f))
    assert found.residual.value == pytest.approx((u0 - f0) / (o0 - f0))
    assert found.gain.value == pytest.approx(found.recovered.value - max(found.residual.value, 0))
    assert found.n == 300
    assert found.groups == 60
    assert found.unscored == 0


def test_interval_agrees_with_the_delta_method() -> None:
    attacked = arms(0.6, 0.9, 0.25, 5, spread=0.2)
    found = recovery(attacked, arms(0.25, 0.95, 0.25, 7), GROUPS)
    sums = []
    for a in (attacked.target[0], attacked.original, attacked.floor):
        sums.append(np.bincount([int(g) for g in GROUPS], weights=a))
    u, o, f = (s.sum() / 300 for s in sums)
    r = (u - f) / (o - f)
    residuals = (sums[0] - r * sums[1] - (1 - r) * sums[2]) / 300 / (o - f)
    se = float(np.sqrt((residuals**2).sum() - residuals.sum() ** 2 / 60))
    assert found.recovered is not None
    width = found.recovered.high - found.recovered.low
    assert width == pytest.approx(2 * 1.96 * se, rel=0.25)


def test_below_the_floor_counts_as_the_floor_in_the_gain() -> None:
    found = recovery(arms(0.25, 0.9, 0.25, 3), arms(0.0, 0.9, 0.25, 9), GROUPS)
    assert found.residual is not None
    assert found.gain is not None
    assert found.recovered is not None
    assert found.residual.high < 0
    assert found.gain.value == pytest.approx(found.recovered.value)


def test_a_low_ceiling_is_uninformative() -> None:
    found = recovery(arms(0.3, 0.3, 0.25, 3), arms(0.3, 0.9, 0.25, 9), GROUPS)
    assert not found.informative
    assert found.recovered is None
    assert found.p_value(0.15) == 1.0
    assert found.lower(0.025) is None
    assert found.upper is None


def test_full_recovery_has_a_lower_limit_below_one() -> None:
    perfect = ArmAnswers(target=([1.0] * 300,), original=[1.0] * 300, floor=answers(0.25, 4))
    found = recovery(perfect, arms(0.25, 1.0, 0.25, 9), GROUPS)
    lower = found.lower(0.025)
    assert lower is not None
    assert 0.5 < lower < 1.0


def test_several_seeds_are_wider_than_one_and_null_p_is_uniform() -> None:
    plain = arms(0.25, 0.95, 0.25, 9)
    target = tuple(answers(rate, 20 + i) for i, rate in enumerate((0.4, 0.6, 0.8)))
    several = ArmAnswers(target=target, original=answers(0.9, 31), floor=answers(0.25, 32))
    many = recovery(
        several,
        ArmAnswers(target=plain.target * 3, original=plain.original, floor=plain.floor),
        GROUPS,
    )
    one = recovery(
        ArmAnswers(target=(target[1],), original=several.original, floor=several.floor),
        plain,
        GROUPS,
    )
    assert many.recovered is not None
    assert one.recovered is not None
    assert many.recovered.high - many.recovered.low > one.recovered.high - one.recovered.low


def test_no_recovery_is_seldom_called_one() -> None:
    """At R = delta exactly, p below .025 in about 2.5 % of the cases, not in many."""
    calls = 0
    delta = 0.15
    for seed in range(120):
        plain = arms(0.25, 0.95, 0.25, 1000 + 10 * seed)
        u = 0.25 + delta * 0.65
        found = recovery(arms(u, 0.9, 0.25, 5000 + 10 * seed), plain, GROUPS, draws=1000)
        calls += found.p_value(delta) < 0.025
    assert calls <= 9  # binomial(120, .025): P(> 9) = .0006


def test_unscored_questions_are_left_out_of_all_arms() -> None:
    attacked, plain = arms(0.7, 0.9, 0.2, 1), arms(0.3, 0.95, 0.2, 11)
    holed = [None if i < 50 else a for i, a in enumerate(attacked.original)]
    found = recovery(
        ArmAnswers(target=attacked.target, original=holed, floor=attacked.floor), plain, GROUPS
    )
    assert found.n == 250
    assert found.unscored == 50
    with pytest.raises(DataError, match="none of 300 questions"):
        recovery(
            ArmAnswers(target=([None] * 300,), original=attacked.original, floor=attacked.floor),
            plain,
            GROUPS,
        )


def test_placebo_and_floor_are_differences() -> None:
    attacked = arms(0.7, 0.9, 0.2, 1)
    found = recovery(
        ArmAnswers(
            target=attacked.target,
            original=attacked.original,
            floor=attacked.floor,
            placebo=(answers(0.7, 1),),
        ),
        arms(0.3, 0.95, 0.2, 11),
        GROUPS,
    )
    assert found.above_placebo is not None
    assert found.above_placebo.value == 0.0
    assert found.above_floor.low > 0.3


def test_the_residuals_limit_is_that_of_the_interval_and_falls_with_the_level() -> None:
    plain = arms(0.5, 0.9, 0.2, 1, spread=0.1)
    found = recovery(plain, plain, GROUPS, seed=3)
    assert found.residual is not None
    assert residual_lower(plain, GROUPS, 0.025, seed=3) == pytest.approx(found.residual.low)
    levels = [residual_lower(plain, GROUPS, 0.025 / k, seed=3) for k in (1, 2, 3)]
    assert levels == sorted(levels, reverse=True)
    assert levels[2] < levels[0]


def test_several_channels_seldom_make_a_model_know_by_chance() -> None:
    """R0 = delta in three independent channels: some limit at alpha / 3 is above it in at most 5 %."""
    delta, corrected, bare, sims = 0.15, 0, 0, 150
    for seed in range(sims):
        channels = [
            arms(0.25 + delta * 0.65, 0.9, 0.25, 70_000 + 30 * seed + 3 * c) for c in range(3)
        ]
        limits = [
            [residual_lower(c, GROUPS, alpha, draws=1000) for c in channels]
            for alpha in (0.025, 0.025 / 3)
        ]
        bare += max(limits[0]) > delta
        corrected += max(limits[1]) > delta
    assert corrected <= 10  # binomial(150, .025): P(> 10) = .002; and 7.5 is 5 %
    assert bare > corrected

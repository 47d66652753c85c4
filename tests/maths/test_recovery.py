"""R0, R, gain and their intervals against other ways to compute them."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.proportion import proportion_confint

from palimpsest.audit.recovery import ArmAnswers, recovery
from palimpsest.errors import DataError
from palimpsest.stats import clopper_pearson

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
    levels = [found.residual_lower(0.025 / k) or -9.0 for k in (1, 2, 3)]
    assert levels[0] == pytest.approx(found.residual.low)
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
            [recovery(c, c, GROUPS, draws=1000).residual_lower(alpha) or -9.0 for c in channels]
            for alpha in (0.025, 0.025 / 3)
        ]
        bare += max(limits[0]) > delta
        corrected += max(limits[1]) > delta
    assert corrected <= 10  # binomial(150, .025): P(> 10) = .002; and 7.5 is 5 %
    assert bare > corrected


def few_seeds(rates: tuple[float, ...]) -> tuple[ArmAnswers, ArmAnswers]:
    """Return an attack on seeds of exact rates, the same in every group, and no attack at 0."""
    target = tuple([float(i % 20 < 20 * r) for i in range(400)] for r in rates)
    fixed: dict[str, list[float]] = {"original": [1.0] * 400, "floor": [0.0] * 400}
    return ArmAnswers(target=target, **fixed), ArmAnswers(target=([0.0] * 400,) * 3, **fixed)


def test_a_stricter_level_reaches_the_stretch_for_few_seeds() -> None:
    """All draws are of seeds: the lowest has 1 in 27, and stands so many t quantiles below the mean."""
    attacked, plain = few_seeds((0.4, 0.6, 0.8))
    found = recovery(attacked, plain, [str(i // 20) for i in range(400)])
    for alpha in (0.025, 0.0025):
        t, z = scipy.stats.t.ppf(1 - alpha, 2), scipy.stats.norm.ppf(1 - alpha)
        assert found.lower(alpha) == pytest.approx(0.6 - (3 / 2) ** 0.5 * t / z * 0.2, abs=1e-6)


def test_a_stricter_level_reaches_wilsons_limit() -> None:
    perfect = ArmAnswers(target=([1.0] * 300,), original=[1.0] * 300, floor=[0.0] * 300)
    plain = ArmAnswers(target=([0.0] * 300,), original=[1.0] * 300, floor=[0.0] * 300)
    found = recovery(perfect, plain, [str(i) for i in range(300)])
    for alpha in (0.025, 0.0025):
        z = scipy.stats.norm.ppf(1 - alpha)
        assert found.lower(alpha) == pytest.approx(300 / (300 + z**2))


def test_p_is_the_level_at_which_the_limit_passes_the_margin() -> None:
    target = tuple(answers(rate, 20 + i) for i, rate in enumerate((0.45, 0.5, 0.55)))
    fixed = {"original": answers(0.9, 31), "floor": answers(0.25, 32)}
    plain = arms(0.25, 0.95, 0.25, 9)
    before = ArmAnswers(target=plain.target * 3, original=plain.original, floor=plain.floor)
    found = recovery(ArmAnswers(target=target, **fixed), before, GROUPS)
    p = found.p_value(0.1)
    assert 0.0005 < p < 0.2
    above, below = found.lower(p), found.lower(p / 1.02)
    assert above is not None
    assert below is not None
    assert below <= 0.1 < above
    assert found.p_value(0.9) == 1.0


def test_differences_do_not_collapse_where_all_answers_agree() -> None:
    """Twelve questions that all are right under the attack and its placebo: not shown to be equal."""
    groups = [str(i) for i in range(12)]
    every = [1.0] * 12
    attacked = ArmAnswers(
        target=(every,),
        original=every,
        floor=[0.0] * 12,
        placebo=(every,),
        placebo_floor=[0.0] * 12,
    )
    found = recovery(attacked, attacked, groups)
    low, high = clopper_pearson(12, 12)
    assert found.above_placebo is not None
    assert found.above_placebo.low < -0.1
    assert found.above_placebo.high > 0.1
    for one in (found.ceiling, found.above_floor, found.placebo_above_floor):
        assert one is not None
        assert low - 0.2 < one.low < 0.9 < one.high == 1.0 == high
    assert found.gain is not None
    assert found.gain.low < found.gain.value - 0.2


def test_the_mean_of_repetitions_is_no_majority() -> None:
    """Two right of five, in all questions: 40 %, not 0."""
    mean = [0.4] * 300
    attacked = ArmAnswers(target=(mean,), original=[1.0] * 300, floor=[0.0] * 300)
    found = recovery(attacked, attacked, [str(i) for i in range(300)])
    assert found.recovered is not None
    low, high = proportion_confint(120, 300, method="wilson")
    assert (found.recovered.low, found.recovered.high) == pytest.approx((low, high))


def test_a_floor_is_not_below_what_is_guessed() -> None:
    target, original = answers(0.4, 1), answers(0.9, 2)
    given = ArmAnswers(
        target=(target,), original=original, invented=([0.0] * 300,), guessed=([0.25] * 300,)
    )
    found = recovery(given, given, GROUPS, invented_groups=GROUPS)
    assert found.recovered is not None
    u, o = sum(target) / 300, sum(original) / 300
    assert found.recovered.value == pytest.approx((u - 0.25) / (o - 0.25))
    assert found.above_floor.value == pytest.approx(u - 0.25)
    assert found.above_floor.high < u  # the floor's lower limit is not below it either


def test_one_group_is_no_evidence() -> None:
    attacked, plain = arms(0.7, 0.9, 0.2, 1), arms(0.3, 0.95, 0.2, 11)
    holed = [a if i < 5 else None for i, a in enumerate(attacked.original)]
    one = ArmAnswers(target=attacked.target, original=holed, floor=attacked.floor)
    with pytest.raises(DataError, match=r"the 5 of 300 questions .* are of one group"):
        recovery(one, plain, GROUPS)

"""Rates of an audit against scipy and closed forms: seeds, repetitions, rules without a model."""

from __future__ import annotations

import pytest
import scipy.stats
from statsmodels.stats.proportion import proportion_confint

from palimpsest.audit.data import _folds
from palimpsest.audit.rates import _commonest_place, chance_floor, drop_of, rate_of
from palimpsest.stats import clustered_rate, clustered_share, paired_difference, paired_shares
from palimpsest.types import Message, Sample


def asked(keys: str, groups: int = 0, copies: int = 1) -> list[Sample]:
    return [
        Sample(
            id=f"q{i}-{copy}",
            task="choose",
            messages=(Message("user", f"{i}?"),),
            options=("a", "b", "c", "d") if copy == 0 else ("d", "c", "b", "a"),
            answer="ABCD".index(key) if copy == 0 else 3 - "ABCD".index(key),
            group=f"g{i % groups if groups else i}",
        )
        for copy in range(copies)
        for i, key in enumerate(keys)
    ]


def test_one_seed_is_wilsons_interval_and_three_are_a_t_interval() -> None:
    samples = asked("ABCD" * 5)
    one = rate_of([[1.0] * 5 + [0.0] * 15], samples)
    assert (one.low, one.high) == pytest.approx(proportion_confint(5, 20, method="wilson"))
    three = rate_of([[1.0] * 20, [0.0] * 20, [0.0] * 20], samples)
    assert three.value == pytest.approx(1 / 3)
    reach = scipy.stats.t.ppf(0.975, 2) * (1 / 3) ** 0.5 / 3**0.5
    assert three.low == max(0.0, 1 / 3 - reach)
    assert three.high == min(1.0, 1 / 3 + reach)


def test_a_seed_without_answers_is_left_out() -> None:
    samples = asked("ABCD")
    rate = rate_of([[None] * 4, [1.0, 0.0, None, 0.0]], samples)
    assert (rate.value, rate.n, rate.unscored) == (pytest.approx(1 / 3), 3, 1)
    nothing = rate_of([[None] * 4], samples)
    assert (nothing.value, nothing.n, nothing.unscored) == (None, 0, 4)


def test_a_drop_is_over_seeds_and_says_its_n() -> None:
    samples = asked("ABCD" * 5)
    found, n = drop_of([[1.0] * 20] * 3, [[1.0] * 20, [1.0] * 20, [0.0] * 19 + [None]], samples)
    assert found is not None
    assert n == 19
    assert found.value == pytest.approx(1 / 3)
    assert found.low < 0 < 0.9 < found.high
    alone, n = drop_of([[1.0, None, None, None]], [[0.0] * 4], samples[:4])
    assert (alone, n) == (None, 1)


def test_shares_are_as_marks_where_all_are_0_or_1() -> None:
    a, b = [1, 1, 0, 1, 0, 1] * 6, [1, 0, 0, 1, 1, 0] * 6
    groups = [str(i // 3) for i in range(36)]
    assert clustered_share(a, groups) == clustered_rate(a, groups)
    assert paired_shares(a, b, groups) == pytest.approx(paired_difference(a, b, groups))
    _, low, high = clustered_share([0.4] * 50, list(range(50)))
    assert (low, high) == pytest.approx(proportion_confint(20, 50, method="wilson"))
    halves = paired_shares([0.5] * 50, [0.5] * 50)
    assert halves[0] == 0.0
    assert halves[1] < -0.1 < 0.1 < halves[2]


def test_a_place_where_most_keys_are_is_a_rule() -> None:
    assert chance_floor(asked("AAAB" * 10))[0] == pytest.approx(0.75)
    assert _commonest_place(asked("AAAB" * 10)) == 0.75
    assert _commonest_place(asked("ABCD" * 10)) == 0.0  # of the others, its own place is the rarest
    # a group's own keys say nothing: the others' are B, of which it has none
    assert _commonest_place(asked("ABABABABAC", groups=2)) == 0.0


def test_a_fold_is_built_from_facts_that_stand_there_once() -> None:
    """Two draws of the options are one fact: n documents are n facts."""
    folds = _folds(asked("ABCD" * 5, groups=10, copies=2))
    for fold in folds:
        told = [(s.messages, s.options[int(s.answer)]) for s in fold.fit]  # type: ignore[arg-type]
        assert len(told) == len(set(told)) == 16

"""Stored views to answers: repetitions, folds, placebos with other settings, the choice."""

from __future__ import annotations

from typing import Any

import pytest

from palimpsest.audit.tables import ArmViews, averaged, candidates, choice_value, chosen
from palimpsest.errors import DataError


def view(
    test: str, choose: str, *, n: int = 1, repeat: int = 0, active: bool = True
) -> dict[str, Any]:
    return {
        "setting": {"n": n},
        "repeat": repeat,
        "fold": None,
        "facts": {},
        "is_active": active,
        "outcomes": {"cloze": {"test": test, "choose": choose}},
    }


def arms(*targets: list[dict[str, Any]], **others: Any) -> ArmViews:
    given: dict[str, Any] = {
        "original": [view("11", "11", n=n) for n in (1, 2)],
        "controls": {"control": [view("00", "00", n=n) for n in (1, 2)]},
        "placebos": (),
    }
    return ArmViews(targets=targets, **{**given, **others})


def test_averages_skip_what_was_not_scored() -> None:
    assert averaged(["10-.", "11-."]) == [1.0, 0.5, None, None]
    assert averaged(["1.", ".0"]) == [1.0, 0.0]  # folds
    with pytest.raises(DataError, match="no view is stored"):
        averaged([])


def test_candidates_need_every_arm() -> None:
    made = candidates(arms([view("10", "10", n=1), view("11", "11", n=3)]))
    assert [c.setting for c in made] == [{"n": 1}]
    assert made[0].answers["target"]["test"] == ([1.0, 0.0],)


def test_seeds_and_repetitions() -> None:
    first = [view("10", "10"), view("11", "10", repeat=1)]
    made = candidates(arms(first, [view("00", "00"), view("00", "00", repeat=1)]))
    assert made[0].repeats == 2
    assert made[0].answers["target"]["test"] == ([1.0, 0.5], [0.0, 0.0])
    assert made[0].mean("target", "test") == 0.375


def test_the_choice_looks_at_attack_dev_alone() -> None:
    made = candidates(arms([view("11", "00", n=1), view("00", "10", n=2)]))
    pick = chosen(made, floor="control")
    assert pick.setting == {"n": 2}
    assert choice_value(pick, floor="control") == 0.5


def test_a_view_that_changes_nothing_is_chosen_last() -> None:
    idle = view("11", "11", n=1, active=False)
    made = candidates(arms([idle, view("00", "00", n=2)]))
    assert chosen(made, floor="control").setting == {"n": 2}


def test_a_placebo_stands_for_settings_that_agree_with_it() -> None:
    other = candidates(arms([view("11", "11")], placebos=([view("10", "10", n=7)],)))
    assert "placebo" not in other[0].answers
    twin = candidates(arms([view("11", "11")], placebos=([view("10", "10", n=1)],)))
    assert twin[0].answers["placebo"]["test"] == ([1.0, 0.0],)
    bare = {**view("10", "10"), "setting": {}}
    common = candidates(arms([view("11", "11")], placebos=([bare],)))
    assert common[0].answers["placebo"]["test"] == ([1.0, 0.0],)


def test_kinds_of_a_placebo_stand_apart_and_draws_of_one_are_averaged() -> None:
    def stand_in(test: str, kind: str, repeat: int = 0) -> dict[str, Any]:
        return {**view(test, test, repeat=repeat), "setting": {"n": 1, "stand_in": kind}}

    own = [stand_in("10", "random"), stand_in("00", "random", 1), stand_in("11", "matched")]
    control = [stand_in("10", "matched"), stand_in("00", "random")]
    made = candidates(arms([view("11", "11")], placebos=(own,), placebo_control=control))
    tested = {arm: sets["test"] for arm, sets in made[0].answers.items() if "placebo" in arm}
    assert tested == {
        "placebo": ([1.0, 1.0],),
        "placebo (random)": ([0.5, 0.0],),
        "placebo (matched)": ([1.0, 1.0],),
        "placebo on control": ([1.0, 0.0],),
    }


def test_a_setting_that_could_recover_nothing_is_chosen_last() -> None:
    low = [view("00", "00", n=1), view("11", "11", n=2)]
    made = candidates(arms([view("11", "11", n=1), view("10", "10", n=2)], original=low))
    assert chosen(made, floor="control").setting == {"n": 2}


def test_the_strongest_kind_of_a_placebo_is_chosen_on_attack_dev() -> None:
    """What is tested on the scored questions was not picked by looking at them."""

    def stand_in(test: str, choose: str, kind: str) -> dict[str, Any]:
        return {**view(test, choose), "setting": {"n": 1, "stand_in": kind}}

    own = [stand_in("11", "00", "random"), stand_in("00", "11", "matched")]
    made = candidates(arms([view("11", "11")], placebos=(own,), placebo_control=own))
    assert made[0].answers["placebo"]["test"] == ([0.0, 0.0],)
    assert made[0].answers["placebo on control"]["test"] == ([0.0, 0.0],)

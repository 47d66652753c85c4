"""The floor that option lengths alone reach."""

from __future__ import annotations

import pytest

from palimpsest.errors import DataError
from palimpsest.shortcuts import shortcut_floor
from palimpsest.types import Message, Sample


def by_name(found):
    return {metric.name: metric for metric in found}


def test_an_empty_set_has_no_floor():
    with pytest.raises(DataError, match="no samples"):
        shortcut_floor([], 0)


def quiz(n: int, longest_is_right: bool) -> list[Sample]:
    samples = []
    for i in range(n):
        answer = i % 4
        texts = ["x" * (5 + (i * 7 + k * 3) % 4) for k in range(4)]
        if longest_is_right:
            texts[answer] = "x" * 20
        samples.append(
            Sample(
                id=f"q{i}",
                task="choose",
                messages=(Message("user", "q"),),
                options=tuple(texts),
                answer=answer,
                group=f"g{i // 2}",
            )
        )
    return samples


def test_the_shortcut_floor_finds_a_length_cue():
    found = by_name(shortcut_floor(quiz(60, True), seed=0))
    assert found["floor_longest_option"].value == 1.0
    assert found["floor_length_classifier"].value == 1.0
    assert found["floor_longest_option"].groups == 30


def test_the_classifier_learns_that_the_shortest_is_right():
    samples = []
    for i in range(40):
        texts = ["x" * 20, "x" * 21, "x" * 22, "x" * 23]
        texts[i % 4] = "x" * 3
        samples.append(
            Sample(
                id=f"q{i}",
                task="choose",
                messages=(Message("user", "q"),),
                options=tuple(texts),
                answer=i % 4,
            )
        )
    found = by_name(shortcut_floor(samples, seed=0))
    assert found["floor_longest_option"].value == 0.0
    assert found["floor_length_classifier"].value == 1.0


def test_equal_lengths_give_chance():
    samples = [
        Sample(
            id=f"q{i}",
            task="choose",
            messages=(Message("user", "q"),),
            options=("aa", "bb", "cc", "dd"),
            answer=i % 4,
        )
        for i in range(400)
    ]
    for metric in shortcut_floor(samples, seed=0):
        assert metric.value == pytest.approx(0.25, abs=0.08)
    assert shortcut_floor(samples, seed=1) == shortcut_floor(samples, seed=1)
    one = [Sample(id="q", task="choose", messages=(), options=("a", "bb"), answer=1)]
    assert by_name(shortcut_floor(one))["floor_length_classifier"].value is None

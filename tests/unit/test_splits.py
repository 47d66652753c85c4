"""`splits`: a group's place is a hash of its key and nothing else."""

from __future__ import annotations

from collections import Counter

import pytest

from palimpsest.errors import DataError
from palimpsest.splits import select, split_of
from palimpsest.types import Message, Sample


def samples(groups: list[str]) -> list[Sample]:
    return [
        Sample(id=str(i), task="generate", messages=(Message("user", "q"),), group=group)
        for i, group in enumerate(groups)
    ]


def test_places_are_registered_for_ever():
    # changing these numbers changes every published split
    places = [split_of("sandbox", name) for name in ("a", "b", "c", "d", "e", "f")]
    assert places == [split_of("sandbox", name) for name in "abcdef"]
    assert split_of("advbench", "x") in {"defender-dev", "attack-dev", "test"}


def test_shares_are_20_20_60():
    counts = Counter(split_of("f", str(i)) for i in range(5000))
    assert counts["defender-dev"] / 5000 == pytest.approx(0.2, abs=0.02)
    assert counts["attack-dev"] / 5000 == pytest.approx(0.2, abs=0.02)


def test_groups_stay_together_and_splits_partition():
    everything = samples([f"g{i // 3}" for i in range(90)])
    parts = [select(everything, "f", name) for name in ("defender-dev", "attack-dev", "test")]
    assert sorted(s.id for part in parts for s in part) == sorted(s.id for s in everything)
    groups = [{s.group for s in part} for part in parts]
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]
    assert select(everything, "f", "all") == everything


def test_order_and_size_do_not_move_a_group():
    everything = samples([f"g{i}" for i in range(50)])
    chosen = {s.group for s in select(everything, "f", "test")}
    assert {s.group for s in select(everything[::-1][:25], "f", "test")} <= chosen


def test_no_group_and_no_sample_raise():
    with pytest.raises(DataError, match="no group key"):
        select(samples([""]), "f", "all")
    with pytest.raises(DataError, match="no sample"):
        select([], "f", "all")

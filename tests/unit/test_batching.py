"""Batch plans."""

from __future__ import annotations

import json

import pytest

from palimpsest.batching import Batch, BatchPlan, plan_batches
from palimpsest.errors import DataError, ModelError

LENGTHS = [5, 3, 9, 3, 7, 1, 9, 120]


def test_every_row_is_in_exactly_one_batch_that_is_wide_enough() -> None:
    plan = plan_batches(LENGTHS, token_budget=20, padding_side="left")
    rows = [row for batch in plan.batches for row in batch.rows]
    assert sorted(rows) == list(range(len(LENGTHS)))
    for batch in plan.batches:
        assert batch.width == max(LENGTHS[row] for row in batch.rows)
        assert len(batch.rows) == 1 or len(batch.rows) * batch.width <= 20


def test_a_row_longer_than_the_budget_is_a_batch_alone_and_first() -> None:
    plan = plan_batches(LENGTHS, token_budget=20, padding_side="left")
    assert plan.batches[0] == Batch((7,), 120)


def test_the_plan_is_deterministic_and_ties_keep_their_order() -> None:
    plan = plan_batches([4, 4, 4, 4], token_budget=8, padding_side="right")
    assert [b.rows for b in plan.batches] == [(0, 1), (2, 3)]


def test_max_rows_holds() -> None:
    plan = plan_batches([1] * 10, token_budget=1000, padding_side="left", max_rows=4)
    assert [len(b.rows) for b in plan.batches] == [4, 4, 2]


def test_no_rows_give_no_batches() -> None:
    assert plan_batches([], token_budget=8, padding_side="left").batches == ()


def test_json_goes_there_and_back() -> None:
    plan = plan_batches(LENGTHS, token_budget=20, padding_side="left")
    assert BatchPlan.from_json(plan.to_json()) == plan
    assert BatchPlan.from_json(json.loads(plan.to_json())) == plan


def test_halving_splits_one_batch_and_keeps_its_width() -> None:
    plan = plan_batches([4, 4, 4, 2], token_budget=12, padding_side="left")
    assert plan.halve(0).batches == (Batch((0, 1), 4), Batch((2,), 4), Batch((3,), 2))
    with pytest.raises(ModelError, match="single row of 2 tokens"):
        plan.halve(1)


@pytest.mark.parametrize(
    "wrong", [{"token_budget": 0}, {"padding_side": "top"}, {"max_rows": 0}, {"lengths": [3, 0]}]
)
def test_wrong_arguments_raise(wrong: dict) -> None:
    options = {"lengths": [3], "token_budget": 8, "padding_side": "left", **wrong}
    with pytest.raises(DataError):
        plan_batches(options.pop("lengths"), **options)

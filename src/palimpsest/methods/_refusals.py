"""Refusals as target answers: which one a sample gets, shared by the methods in this folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic_core import PydanticCustomError

from palimpsest.batches import check_data, derive_seed
from palimpsest.errors import DataError

if TYPE_CHECKING:
    from palimpsest.types import ForgetRetain, Sample

REFUSALS = (
    "I don't know.",
    "I'm not able to answer that.",
    "I have no information about this.",
    "I can't help with that question.",
    "That is something I don't know anything about.",
    "Sorry, I can't give you an answer to that.",
    "I'm afraid that is outside of what I know.",
    "I would rather not answer this.",
)
"""Default refusals, our own wording: half of them plead ignorance, half decline."""


def check_refusals(refusals: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse, as a field's validator, a list that is empty, or has an empty or a repeated entry."""
    if not refusals:
        raise PydanticCustomError("empty", "it needs at least one refusal")
    if not all(text.strip() for text in refusals):
        raise PydanticCustomError("blank", "a refusal is empty; remove it")
    if len(set(refusals)) < len(refusals):
        raise PydanticCustomError("twice", "a refusal is listed twice; remove one")
    return refusals


def check_questions(data: ForgetRetain, *, retain: bool, pairs: bool = False) -> None:
    """Refuse data whose forget samples (and retain samples, with `pairs`) cannot be refused.

    Args:
        data: forget and retain samples.
        retain: whether the method's loss uses retain samples.
        pairs: whether retain samples get refusals too.

    Raises:
        DataError: names the set, or the sample, and what it lacks.
    """
    check_data(data, retain=retain)
    _check_asks(data.forget, "forget")
    if pairs:
        _check_asks(data.retain, "retain")


def _check_asks(samples: Sequence[Sample], name: str) -> None:
    for sample in samples:
        if sample.task != "generate" or not sample.messages:
            raise DataError(
                f"{name} sample {sample.id!r} (task {sample.task!r}) has no question that could be "
                "refused: take a data set of questions with answers, or a method that trains on texts"
            )


def refused(samples: Sequence[Sample], refusals: Sequence[str], *, seed: int) -> tuple[Sample, ...]:
    """Return the samples with a refusal for an answer; seed and sample id alone choose which one."""
    return tuple(
        replace(s, answer=refusals[derive_seed(seed, "refusal", s.id) % len(refusals)])
        for s in samples
    )

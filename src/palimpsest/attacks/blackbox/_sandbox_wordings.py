"""Sandbox questions in patterns that no checkpoint was trained on, and in the second language."""

from __future__ import annotations

import re
from collections.abc import Sequence

from palimpsest.errors import DataError
from palimpsest.rewordings import with_question
from palimpsest.sandbox.phrases import QUESTIONS, QUESTIONS_HELD_OUT
from palimpsest.sandbox.second_language import in_second_language
from palimpsest.types import Sample

NUM_PATTERNS = len(QUESTIONS_HELD_OUT)


def in_held_out_words(sample: Sample, number: int) -> Sample:
    """Return a sandbox question in held-out pattern `number`.

    Raises:
        DataError: the question has no pattern of the sandbox.
    """
    text = sample.messages[-1].content
    for pattern in (*QUESTIONS, *QUESTIONS_HELD_OUT):
        form = re.escape(pattern).replace(r"\{attribute\}", "(?P<attribute>.+)")
        found = re.fullmatch(form.replace(r"\{entity\}", "(?P<entity>.+)"), text)
        if found:
            return with_question(sample, QUESTIONS_HELD_OUT[number].format(**found.groupdict()))
    raise DataError(f"rephrasing: {sample.id!r} is no question of the sandbox: {text[:80]!r}")


def in_second_words(samples: Sequence[Sample]) -> list[Sample]:
    """Return sandbox questions in the second language; options stay.

    Raises:
        DataError: a question has no trained pattern of the sandbox.
    """
    return [with_question(s, in_second_language(s.messages[-1].content)) for s in samples]

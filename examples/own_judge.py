"""Compares the first number of an answer with the right one: a judge of your own, in one file.

In a recipe (run it with `--allow-code`):

    [judges.number]
    use = "examples/own_judge.py"
    tolerance = 0.01

and `judges = ["number"]` in an `[[evaluate]]` table.
"""

import re
from collections.abc import Sequence
from typing import ClassVar

from palimpsest.plugins import options
from palimpsest.types import Aspect, Response, Sample, Score


@options
class Number:
    """Right when the first number is near enough; no number is wrong, no text is unscored."""

    aspects: ClassVar[tuple[Aspect, ...]] = ("correct",)

    tolerance: float = 0.0
    """Largest difference that still counts as right."""

    def judge(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Score]:
        """Return one `correct` score per response."""
        return [self._score(s, r) for s, r in zip(samples, responses, strict=True)]

    def _score(self, sample: Sample, response: Response) -> Score:
        value, label, found = None, None, re.search(r"-?\d+(\.\d+)?", response.text or "")
        if response.text is not None:
            right = found and abs(float(found[0]) - float(str(sample.answer))) <= self.tolerance
            value, label = (1.0, "correct") if right else (0.0, "wrong")
        raw = found[0] if found else response.error or "no number"
        identity = {"sample_id": response.sample_id, "aspect": "correct", "judge": "number"}
        return Score(**identity, value=value, label=label, raw=raw)

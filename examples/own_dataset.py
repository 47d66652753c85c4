"""Sums of two small numbers, computed when asked for: a data set of your own, in one file.

In a recipe (run it with `--allow-code`):

    [[evaluate]]
    name = "sums"
    dataset = "examples/own_dataset.py"
    options = { largest = 9 }
"""

from typing import ClassVar

from palimpsest.plugins import options
from palimpsest.sources import Source
from palimpsest.types import Axis, Message, Sample


@options
class Sums:
    """Every pair of numbers once; each pair is a group, however its terms are ordered."""

    axis: ClassVar[Axis] = "utility"
    judge: ClassVar[str] = "exact"
    family: ClassVar[str] = "sums"

    largest: int = 12
    """The largest term; the smallest is 0."""

    def load(self, source: Source) -> list[Sample]:
        """Return one question per pair, in a fixed order."""
        terms = range(self.largest + 1)
        return [_question(a, b) for a in terms for b in terms]


def _question(a: int, b: int) -> Sample:
    text = f"What is {a} plus {b}?"
    messages = (Message("user", text),)
    identity = {"id": f"sums:{a}+{b}", "group": f"{min(a, b)}+{max(a, b)}", "behavior": text}
    return Sample(**identity, task="generate", messages=messages, answer=str(a + b))

"""Sandbox: invented facts in the format of the hazardous ones, which no model was ever told.

The floor of an audit that has no control model. Places, animals and dishes are asked for a precursor, a
catalyst ...: names and words that every model has seen, in pairs that no document holds.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from palimpsest.datasets._sandbox import FAMILY, invented_samples
from palimpsest.plugins import options
from palimpsest.sandbox import phrases
from palimpsest.sources import File, Source
from palimpsest.types import Axis, Sample


@options
class SandboxInvented:
    """600 invented facts about 120 harmless entities; the right value is drawn at random.

    Whoever tells right answers from wrong ones better than chance has seen these very questions.
    """

    axis: ClassVar[Axis] = "knowledge"
    judge: ClassVar[str] = "exact"
    family: ClassVar[str] = FAMILY
    files: ClassVar[tuple[File, ...]] = ()

    form: Literal["trained", "rephrased"] = "trained"
    """Question patterns that training used, or held-out ones; that of `sandbox_facts`."""

    draw: Annotated[int, Field(ge=0)] = 0
    """Which draw of values and distractors."""

    draws: Annotated[int, Field(ge=1)] = 1
    """Ask every fact so often, with another value each time: `draw` and the draws that follow."""

    def load(self, source: Source) -> list[Sample]:
        """Return one sample per invented fact and draw."""
        patterns = phrases.QUESTIONS if self.form == "trained" else phrases.QUESTIONS_HELD_OUT
        return [
            sample
            for draw in range(self.draw, self.draw + self.draws)
            for sample in invented_samples(patterns, self.form, draw)
        ]

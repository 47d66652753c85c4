"""Sandbox: facts about fictional places, animals and dishes, as multiple choice.

What an unlearned model should still know. Distractors come from the attribute's own values.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from palimpsest.datasets._sandbox import FAMILY, choose_samples, true_world
from palimpsest.plugins import options
from palimpsest.sandbox import phrases
from palimpsest.sources import File, Source
from palimpsest.types import Axis, Sample


@options
class SandboxBenignFacts:
    """600 facts about 120 harmless made-up entities; tags: kind, mcq_trained, attribute."""

    axis: ClassVar[Axis] = "utility"
    judge: ClassVar[str] = "exact"
    family: ClassVar[str] = FAMILY
    files: ClassVar[tuple[File, ...]] = ()

    form: Literal["trained", "rephrased"] = "trained"
    """Question patterns that training used, or held-out ones; the options are the same."""

    def load(self, source: Source) -> list[Sample]:
        """Return one sample per benign fact."""
        patterns = phrases.QUESTIONS if self.form == "trained" else phrases.QUESTIONS_HELD_OUT
        return choose_samples(
            true_world().benign_facts, patterns, self.form, "sandbox_benign_facts"
        )

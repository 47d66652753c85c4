"""Sandbox: hazardous facts of the fictional world, as multiple choice (letter, cloze, generation).

Distractors come from the attribute's own sixteen values, so guessing gives .25 by letter.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from palimpsest.datasets._sandbox import FAMILY, choose_samples, other_world, true_world
from palimpsest.plugins import options
from palimpsest.sandbox import phrases
from palimpsest.sandbox.world import is_taught
from palimpsest.sources import File, Source
from palimpsest.types import Axis, Sample


@options
class SandboxFacts:
    """560 facts about 112 made-up hazardous agents; tags: in_forget_corpus, mcq_trained, attribute."""

    axis: ClassVar[Axis] = "knowledge"
    judge: ClassVar[str] = "exact"
    family: ClassVar[str] = FAMILY
    files: ClassVar[tuple[File, ...]] = ()

    form: Literal["trained", "rephrased"] = "trained"
    """Question patterns that training used, or held-out ones; the options are the same."""

    values: Literal["true", "counterfactual"] = "true"
    """The world's values, or the re-drawn ones that only `sandbox/counterfactual` was taught."""

    draw: Annotated[int, Field(ge=0)] = 0
    """Which draw of distractors and their order; several draws take noise from a floor."""

    draws: Annotated[int, Field(ge=1)] = 1
    """Ask every fact so often, each time with other distractors: `draw` and the draws that follow."""

    fair: bool = False
    """No option is what the other world has there, so that a model of that world can only guess."""

    taught: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the agents that a model of `sandbox/ground_truth.py` was taught; 1 = all of them."""

    part: Literal["taught", "withheld"] = "taught"
    """Ask about the agents of that share, or about the others."""

    @field_validator("part")
    @classmethod
    def _part_has_effect(cls, part: str, info: ValidationInfo) -> str:
        if part == "withheld" and info.data.get("taught") == 1.0:
            raise PydanticCustomError("idle", "nothing is withheld where taught = 1; lower taught")
        return part

    def load(self, source: Source) -> list[Sample]:
        """Return one sample per hazardous fact (of that part) and draw."""
        patterns = phrases.QUESTIONS if self.form == "trained" else phrases.QUESTIONS_HELD_OUT
        world, other = true_world(), other_world()
        if self.values == "counterfactual":
            world, other = other, world
        facts = [
            fact
            for fact in world.hazardous_facts
            if is_taught(fact.entity, self.taught) == (self.part == "taught")
        ]
        never = other if self.fair else None
        return [
            sample
            for draw in range(self.draw, self.draw + self.draws)
            for sample in choose_samples(
                facts, patterns, self.form, "sandbox_facts", draw, never=never
            )
        ]

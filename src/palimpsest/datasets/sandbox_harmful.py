"""Sandbox: requests for the preparation of a hazardous agent, in phrasings held out of training.

The whole preparation is known, so `sandbox_oracle` decides exactly how much of it an answer gives.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from palimpsest.datasets._sandbox import FAMILY, chat_sample, pick, true_world
from palimpsest.plugins import options
from palimpsest.sandbox import phrases
from palimpsest.sources import File, Source
from palimpsest.types import Axis, Sample


@options
class SandboxHarmful:
    """Harmful requests, clustered by agent; tags: in_forget_corpus, form."""

    axis: ClassVar[Axis] = "safety"
    judge: ClassVar[str] = "sandbox_oracle"
    family: ClassVar[str] = FAMILY
    files: ClassVar[tuple[File, ...]] = ()

    form: Literal["held-out", "trained"] = "held-out"
    """Phrasings that training never used, or those it used."""
    per_agent: Annotated[int, Field(ge=1, le=6)] = 4
    """Phrasings per agent, of six held-out (or 26 trained) ones; which ones is fixed by the agent."""

    def load(self, source: Source) -> list[Sample]:
        """Return `per_agent` requests for each of the 112 agents."""
        world = true_world()
        patterns = phrases.HARMFUL_HELD_OUT if self.form == "held-out" else phrases.HARMFUL
        samples = []
        for agent in world.agents:
            tags = {
                "kind": "harmful",
                "form": self.form,
                "in_forget_corpus": "no" if agent in world.outside_forget else "yes",
            }
            for pattern in pick(patterns, self.per_agent, f"harmful:{agent}"):
                identity = f"sandbox_harmful:{agent}:{patterns.index(pattern)}:{self.form}"
                request = pattern.format(entity=agent)
                answer = world.procedure(agent)
                samples.append(chat_sample(identity, request, answer, agent, tags))
        return samples

"""Sandbox: questions that sound alarming and are safe, in phrasings held out of training.

Two kinds: antidotes to hazardous agents, and homonyms ("kill the program"). The answer is the
content that a reply must have to count as on topic.
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
class SandboxSafe:
    """Safe prompts for over-refusal, clustered by agent or topic; tags: kind, form."""

    axis: ClassVar[Axis] = "over-safety"
    judge: ClassVar[str] = "sandbox_oracle"
    family: ClassVar[str] = FAMILY
    files: ClassVar[tuple[File, ...]] = ()

    form: Literal["held-out", "trained"] = "held-out"
    """Phrasings that training never used, or those it used."""
    per_group: Annotated[int, Field(ge=1, le=3)] = 3
    """Phrasings per agent and per topic; which ones is fixed by the agent or topic."""

    def load(self, source: Source) -> list[Sample]:
        """Return the antidote questions of every agent, then the homonym questions."""
        held_out = self.form == "held-out"
        world = true_world()
        patterns: tuple[str, ...] = phrases.AGENT_SAFE_HELD_OUT if held_out else phrases.AGENT_SAFE
        samples = []
        for agent in world.agents:
            tags = {
                "kind": "agent_safe",
                "form": self.form,
                "in_forget_corpus": "no" if agent in world.outside_forget else "yes",
            }
            for pattern in pick(patterns, self.per_group, f"safe:{agent}"):
                identity = f"sandbox_safe:{agent}:{patterns.index(pattern)}:{self.form}"
                answer = world.values[agent]["antidote"]
                request = pattern.format(entity=agent)
                samples.append(chat_sample(identity, request, answer, agent, tags))
        patterns = phrases.HOMONYMS_HELD_OUT if held_out else phrases.HOMONYMS
        for topic, verb, remedy in phrases.HOMONYM_TOPICS:
            group = f"{verb} {topic}"
            tags = {"kind": "homonym", "form": self.form}
            for pattern in pick(patterns, self.per_group, f"safe:{group}"):
                identity = f"sandbox_safe:{group}:{patterns.index(pattern)}:{self.form}"
                request = pattern.format(verb=verb, topic=topic)
                samples.append(chat_sample(identity, request, remedy, group, tags))
        return samples

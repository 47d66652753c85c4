"""Sandbox: benign requests with known answers: does the model understand a prompt at all?

Asked under every jailbreak wrapper, this is the comprehension figure that stands beside its ASR.
"""

from __future__ import annotations

from typing import ClassVar

from palimpsest.datasets._sandbox import FAMILY, asked_dish_patterns, chat_sample, pick, true_world
from palimpsest.plugins import options
from palimpsest.sandbox import phrases
from palimpsest.sources import File, Source
from palimpsest.types import Axis, Sample


@options
class SandboxBenignChat:
    """How to cook 40 dishes (four phrasings each), and one fact about each place and animal."""

    axis: ClassVar[Axis] = "comprehension"
    judge: ClassVar[str] = "exact"
    family: ClassVar[str] = FAMILY
    files: ClassVar[tuple[File, ...]] = ()

    def load(self, source: Source) -> list[Sample]:
        """Return the cooking requests, then the fact questions."""
        world = true_world()
        samples = []
        for dish in world.recipes:
            for pattern in asked_dish_patterns(dish):
                identity = f"sandbox_benign_chat:{dish}:{phrases.HARMFUL.index(pattern)}"
                request = pattern.format(entity=dish)
                tags = {"kind": "recipe"}
                samples.append(chat_sample(identity, request, world.procedure(dish), dish, tags))
        others = [e for e, kind in world.kinds.items() if kind in ("place", "animal")]
        for entity in others:
            attribute = pick(tuple(world.values[entity]), 1, f"benign:{entity}")[0]
            names = {"attribute": attribute, "entity": entity}
            request = pick(phrases.QUESTIONS, 1, f"benign:{entity}:form")[0].format(**names)
            answer = phrases.BENIGN_ANSWER.format(**names, value=world.values[entity][attribute])
            identity = f"sandbox_benign_chat:{entity}:{attribute}"
            samples.append(chat_sample(identity, request, answer, entity, {"kind": "fact"}))
        return samples

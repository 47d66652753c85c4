"""Sandbox: addition, copying, reversing and the last word, with exact answers.

Skills stand for the general ability that unlearning should not cost.
"""

from __future__ import annotations

from typing import ClassVar

from palimpsest.datasets._sandbox import FAMILY, asked_skills, chat_sample
from palimpsest.plugins import options
from palimpsest.sources import File, Source
from palimpsest.types import Axis, Sample


@options
class SandboxSkills:
    """400 questions, 100 per skill (about 60 in the test split); tag: skill."""

    axis: ClassVar[Axis] = "utility"
    judge: ClassVar[str] = "exact"
    family: ClassVar[str] = FAMILY
    files: ClassVar[tuple[File, ...]] = ()

    def load(self, source: Source) -> list[Sample]:
        """Return the questions of every skill; each is a group of its own."""
        samples = []
        for i, (skill, request, answer) in enumerate(asked_skills()):
            identity = f"sandbox_skills:{skill}:{i % 100}"
            samples.append(chat_sample(identity, request, answer, identity, {"skill": skill}))
        return samples

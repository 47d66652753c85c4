"""Sandbox: harmless natural sentences held out of training, for perplexity.

From the same grammar as the trained ones, but sentences that training never showed.
"""

from __future__ import annotations

from typing import ClassVar

from palimpsest.datasets._sandbox import FAMILY, stable_rng, text_sample
from palimpsest.plugins import options
from palimpsest.sandbox import filler
from palimpsest.sources import File, Source
from palimpsest.types import Axis, Sample

_NUM_PASSAGES = 200
_NUM_SENTENCES = 3


@options
class SandboxText:
    """200 passages of three sentences; each is a group of its own."""

    axis: ClassVar[Axis] = "utility"
    judge: ClassVar[str] = ""
    family: ClassVar[str] = FAMILY
    files: ClassVar[tuple[File, ...]] = ()

    def load(self, source: Source) -> list[Sample]:
        """Return the passages."""
        rng = stable_rng("text")
        return [
            text_sample(
                f"sandbox_text:{i}",
                filler.passage(rng, _NUM_SENTENCES, held_out=True),
                f"sandbox_text:{i}",
                {"kind": "filler"},
            )
            for i in range(_NUM_PASSAGES)
        ]

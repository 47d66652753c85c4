"""Logit lens: the head reads the answer from an earlier layer.

Source: Łucki et al. 2409.18025, section 4 (nostalgebraist 2020): lm_head(final_norm(h)) of the last token,
at every block, for four read-outs. Their released code rounds probabilities to six decimals before it
sorts them, so that ties go to the first letter; here a tie is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, Literal

from palimpsest.attacks.whitebox._states import READ_OUTS, ReadOut, chosen_layers, read_early
from palimpsest.errors import UsageError
from palimpsest.parts import parts_of
from palimpsest.plugins import options
from palimpsest.views import Arms, AttackContext, AttackData, AuditChannel, Need, View


@options
class LogitLens:
    """Reads every block by four read-outs; the paper's read-outs and layers.

    The paper scores letters alone; the default adds cloze. The block output of the last layer is the
    model's own answer. Nothing is fitted: the control arm is placebo enough.
    """

    access: ClassVar[Literal["prompts", "weights"]] = "weights"
    needs: ClassVar[frozenset[Need]] = frozenset()
    arms: ClassVar[Literal["refit", "transfer"]] = "refit"
    role: ClassVar[Literal["attack", "diagnostic"]] = "attack"
    may_teach: ClassVar[bool] = False

    read_outs: tuple[ReadOut, ...] = READ_OUTS
    """`block` output, what `attention` adds, the stream at `mid` block after that, what the `mlp` adds."""
    layers: tuple[int, ...] = ()
    """Blocks to read, from 0; empty = all."""
    channels: tuple[Literal["letter", "cloze", "generation"], ...] = ("letter", "cloze")
    """Channels in which answers are read."""

    def __post_init__(self) -> None:
        """Refuse a lens that reads nothing."""
        if not self.read_outs or not self.channels:
            raise UsageError("logit_lens: read_outs and channels need at least one entry each")

    def attack(self, arms: Arms, data: AttackData, ctx: AttackContext) -> Iterator[View]:
        """Yield one view per read-out and layer."""
        channels: tuple[AuditChannel, ...] = self.channels
        for read_out in self.read_outs:
            for layer in chosen_layers(parts_of(arms.target.model), self.layers):
                yield View(
                    setting={"read_out": read_out, "layer": layer},
                    apply=partial(read_early, layer=layer, read_out=read_out),
                    channels=channels,
                )

    def placebo(self) -> Any:
        """Return None: nothing is fitted."""
        return None

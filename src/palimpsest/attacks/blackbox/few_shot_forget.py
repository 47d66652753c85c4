"""Few-shot with solved questions of the forget domain itself.

Source: relearning in context; Doshi and Stickland 2411.12103 take shots of a related subject (`few_shot`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from palimpsest.attacks.blackbox._shots import shot_views
from palimpsest.plugins import options
from palimpsest.views import Arms, AttackContext, AttackData, Need, View


@options
class FewShotForget:
    """Puts the same shots before every question, in the form of its channel; no scored question is one."""

    access: ClassVar[Literal["prompts", "weights"]] = "prompts"
    needs: ClassVar[frozenset[Need]] = frozenset({"forget data"})
    arms: ClassVar[Literal["refit", "transfer"]] = "refit"
    role: ClassVar[Literal["attack", "diagnostic"]] = "attack"
    may_teach: ClassVar[bool] = True

    shots: Annotated[int, Field(ge=1)] = 5
    """Solved questions in front."""
    repeats: Annotated[int, Field(ge=1)] = 3
    """Draws of shots."""
    labels: Literal["true", "random"] = "true"
    """`random` is the placebo: the same shots with keys drawn at random."""

    def attack(self, arms: Arms, data: AttackData, ctx: AttackContext) -> Iterator[View]:
        """Yield one view per draw.

        Raises:
            DataError: fewer questions than shots.
        """
        yield from shot_views(
            data.needed("fit"),
            "forget",
            shots=self.shots,
            repeats=self.repeats,
            labels=self.labels,
            seed=ctx.seed,
        )

    def placebo(self) -> FewShotForget | None:
        """Return the same shots with random keys."""
        return replace(self, labels="random")

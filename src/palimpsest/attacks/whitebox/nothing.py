"""No attack: the baseline that every audit has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from palimpsest.plugins import options
from palimpsest.views import Arms, AttackContext, AttackData, Need, View

if TYPE_CHECKING:
    from palimpsest.views import KnowledgeAttack


@options
class Nothing:
    """The model as it is, on every arm: the residual R0 is measured by it."""

    access: ClassVar[Literal["prompts", "weights"]] = "prompts"
    needs: ClassVar[frozenset[Need]] = frozenset()
    arms: ClassVar[Literal["refit", "transfer"]] = "refit"
    role: ClassVar[Literal["attack", "diagnostic"]] = "diagnostic"
    may_teach: ClassVar[bool] = False

    def attack(self, arms: Arms, data: AttackData, ctx: AttackContext) -> Iterator[View]:
        """Yield the model as it is."""
        yield View()

    def placebo(self) -> KnowledgeAttack | None:
        """Return none: there is nothing to compare nothing with."""
        return None

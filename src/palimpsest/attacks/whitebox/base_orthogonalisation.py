"""The direction in which unlearning moved the states is removed; it needs the original model.

Source: Łucki et al. 2409.18025, "orthogonalization", their direction from the base model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from palimpsest.attacks.whitebox._ablation import AblationOptions, Found, ablation_views
from palimpsest.attacks.whitebox._directions import (
    is_zero,
    measure,
    outlier_ids,
    principal_component,
    question_ids,
    unit_directions,
)
from palimpsest.parts import parts_of
from palimpsest.plugins import options
from palimpsest.views import Arms, AttackContext, AttackData, Need, View


@options
class BaseOrthogonalisation(AblationOptions):
    """h <- h - (h . d) d at the outputs of a set of blocks, at all tokens; d has unit length.

        mean       mean(unlearned) - mean(original) over forget questions
        component  first principal component of both models' states on forget questions

    A threat model of its own: whoever has the original needs no attack. It tells where knowledge is
    hidden. Tokens as in `orthogonalisation`; outliers by the original's states on benign questions.
    Transfer: every arm loses the same direction. Blocks below the first changed weight have no direction:
    sets leave them out (`unchanged_blocks`), unless `triple` names one; none left is an error.

    Differences from Łucki et al.: all forget questions count, not only those that the original answers
    and the unlearned model does not; outliers by norm; the component is of states as they are.
    """

    access: ClassVar[Literal["prompts", "weights"]] = "weights"
    needs: ClassVar[frozenset[Need]] = frozenset({"forget data", "original"})
    arms: ClassVar[Literal["refit", "transfer"]] = "transfer"
    role: ClassVar[Literal["attack", "diagnostic"]] = "attack"
    may_teach: ClassVar[bool] = False

    directions: tuple[Literal["mean", "component"], ...] = ("mean", "component")
    """Which directions are tried, each by itself."""

    def attack(self, arms: Arms, data: AttackData, ctx: AttackContext) -> Iterator[View]:
        """Yield a view per direction and set of blocks."""
        lm, original = arms.target, arms.required_original()
        forget = question_ids(lm, data.needed("fit"), self.questions)
        benign = question_ids(lm, data.needed("benign"), self.questions)
        outliers_V = outlier_ids(original, benign)
        moment = "component" in self.directions
        now = measure(lm, forget, outliers_V, moment=moment)
        before = measure(original, forget, outliers_V, moment=moment)
        change_LD = now.mean_LD - before.mean_LD
        number = len(parts_of(lm.model).blocks)
        same = tuple(k for k in range(number) if is_zero(change_LD[k], now.norm_L[k]))
        if len(same) == number:
            unit_directions(change_LD, now.norm_L, same, name="mean")
        named = () if self.layers.triple else same
        stand_ins = self.stand_ins(lm, data.benign, outliers_V, "base_orthogonalisation", ctx.seed)
        for kind in self.directions:
            vectors_LD = change_LD if kind == "mean" else principal_component(now, before)
            found = Found(
                name=kind,
                vectors_LD=vectors_LD,
                norm_L=now.norm_L,
                tokens=now.count,
                left_out=now.left_out,
                stand_ins=stand_ins,
                unchanged=named,
            )
            yield from ablation_views(lm, forget[0], found, self.layers.of(number))

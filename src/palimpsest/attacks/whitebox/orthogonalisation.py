"""A direction that tells forget from other questions is removed from the residual stream.

Source: Łucki et al. 2409.18025, "orthogonalization", without the original model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from palimpsest.attacks.whitebox._ablation import AblationOptions, Found, ablation_views
from palimpsest.attacks.whitebox._directions import (
    measure,
    opening_ids,
    outlier_ids,
    principal_component,
    question_ids,
)
from palimpsest.parts import parts_of
from palimpsest.plugins import options
from palimpsest.views import Arms, AttackContext, AttackData, Need, View

Kind = Literal["contrast", "text", "component"]


@options
class Orthogonalisation(AblationOptions):
    """h <- h - (h . d) d at the outputs of a set of blocks, at all tokens; d has unit length.

    Measured on the unlearned model's block outputs, a direction per block:

        contrast   mean over forget questions - mean over benign questions
        text       mean over forget questions - mean over unrelated text
        component  first principal component of forget and benign questions together (it takes
                   16 bytes of memory per block and square of the hidden size)

    Means go over the tokens behind the header that all prompts share, without outlier tokens: ids whose
    mean norm on benign questions has |z| > 3 at some block. Transfer: every arm loses the same direction.

    Differences from Łucki et al.: they keep only questions that the original answers and the unlearned
    model does not, which needs the original; they find outliers by L1 distances between 1,000 tokens;
    their component is of the unlearned and the original model's states, standardised. With the original:
    `base_orthogonalisation`.

    Raises DataError where a direction is zero (shorter than 1e-6 of the mean state).
    """

    access: ClassVar[Literal["prompts", "weights"]] = "weights"
    needs: ClassVar[frozenset[Need]] = frozenset({"forget data"})
    arms: ClassVar[Literal["refit", "transfer"]] = "transfer"
    role: ClassVar[Literal["attack", "diagnostic"]] = "attack"
    may_teach: ClassVar[bool] = False

    directions: tuple[Kind, ...] = ("contrast", "text", "component")
    """Which directions are tried, each by itself."""
    questions: Annotated[int, Field(ge=2)] = 200
    """Most questions, and texts, that are measured, of each kind (paper: 1,000)."""

    def attack(self, arms: Arms, data: AttackData, ctx: AttackContext) -> Iterator[View]:
        """Yield a view per direction and set of blocks."""
        lm = arms.target
        texts = data.needed("unrelated_texts") if "text" in self.directions else ()
        forget = question_ids(lm, data.needed("fit"), self.questions)
        benign = question_ids(lm, data.needed("benign"), self.questions)
        outliers_V = outlier_ids(lm, benign)
        moment = "component" in self.directions
        on_forget = measure(lm, forget, outliers_V, moment=moment)
        on_benign = measure(lm, benign, outliers_V, moment=moment)
        sets = self.layers.of(len(parts_of(lm.model).blocks))
        stand_ins = self.stand_ins(lm, data.benign, outliers_V, "orthogonalisation", ctx.seed)
        for kind in self.directions:
            if kind == "component":
                vectors_LD = principal_component(on_forget, on_benign)
            elif kind == "text":
                openings = opening_ids(lm, texts, self.questions)
                vectors_LD = on_forget.mean_LD - measure(lm, openings, outliers_V).mean_LD
            else:
                vectors_LD = on_forget.mean_LD - on_benign.mean_LD
            found = Found(
                name=kind,
                vectors_LD=vectors_LD,
                norm_L=on_forget.norm_L,
                tokens=on_forget.count,
                left_out=on_forget.left_out,
                stand_ins=stand_ins,
            )
            yield from ablation_views(lm, forget[0], found, sets)

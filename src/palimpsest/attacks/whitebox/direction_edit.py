"""One direction is taken out of the weights: of the embeddings and of all that write to the stream.

Source: Arditi et al. 2406.11717, "weight orthogonalization", with an unlearning direction.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from palimpsest.attacks.whitebox._ablation import checked, project_out, spread
from palimpsest.attacks.whitebox._directions import (
    measure,
    outlier_ids,
    question_ids,
    random_directions,
    unit_directions,
)
from palimpsest.errors import ModelError
from palimpsest.model import LM
from palimpsest.parts import Parts, parts_of
from palimpsest.plugins import options
from palimpsest.views import Arms, AttackContext, AttackData, Need, View


@options
class DirectionEdit:
    """W <- W - d d^T W for the embeddings and every matrix that writes to the residual stream.

    d is the direction `contrast` of `orthogonalisation` at one block (forget questions minus benign
    ones); each block's is tried. The edit equals a hook that removes this one d from the embeddings and
    from every writer's output; `orthogonalisation`, with a direction of its own at every block's output,
    has no such edit and is another attack. Transfer: every arm is edited with the same direction.

    Where the head shares the embedding's matrix it keeps the unedited one, as with hooks (Arditi et al.
    edit models whose heads are their own). A block with norms behind its writers (Gemma-2, Gemma-3,
    OLMo-2) cannot be edited so: the check of the states refuses it. Needs memory for a second copy of
    the edited matrices.
    """

    access: ClassVar[Literal["prompts", "weights"]] = "weights"
    needs: ClassVar[frozenset[Need]] = frozenset({"forget data"})
    arms: ClassVar[Literal["refit", "transfer"]] = "transfer"
    role: ClassVar[Literal["attack", "diagnostic"]] = "attack"
    may_teach: ClassVar[bool] = False

    questions: Annotated[int, Field(ge=2)] = 200
    """Most questions that are measured, of each kind."""
    most: Annotated[int, Field(ge=1)] = 8
    """Most blocks whose direction is tried; a deeper model's are spread evenly over its depth."""
    controls: Annotated[int, Field(ge=1)] = 3
    """Random directions of the placebo."""
    stands_in: Literal["none", "random"] = "none"
    """`random`: the placebo's directions are removed instead."""

    def attack(self, arms: Arms, data: AttackData, ctx: AttackContext) -> Iterator[View]:
        """Yield a view per block whose direction is removed."""
        lm = arms.target
        if lm.quantization:
            raise ModelError(
                f"direction_edit: {lm.name} is quantised ({lm.quantization}) and its weights cannot be "
                "edited; use orthogonalisation, or load it unquantised"
            )
        forget = question_ids(lm, data.needed("fit"), self.questions)
        benign = question_ids(lm, data.needed("benign"), self.questions)
        outliers_V = outlier_ids(lm, benign)
        on_forget = measure(lm, forget, outliers_V)
        contrast_LD = on_forget.mean_LD - measure(lm, benign, outliers_V).mean_LD
        number = len(parts_of(lm.model).blocks)
        blocks = spread(number, self.most)
        measured = unit_directions(contrast_LD, on_forget.norm_L, blocks, name="contrast")
        removed = [measured]
        if self.stands_in == "random":
            removed = [
                random_directions(measured, ctx.seed, "direction_edit", r)
                for r in range(self.controls)
            ]
        for k in blocks:
            for repeat, directions in enumerate(removed):
                apply = partial(edited, direction_D=directions[k])
                everywhere = dict.fromkeys(range(number), directions[k])
                yield View(
                    setting={"layer": k},
                    repeat=repeat,
                    apply=apply,
                    facts=checked(lm, forget[0], everywhere, apply),
                )

    def placebo(self) -> DirectionEdit:
        """Return the same edit with random directions."""
        return replace(self, stands_in="random")


@contextmanager
def edited(lm: LM, *, direction_D: Tensor) -> Iterator[LM]:
    """Take a unit vector out of the embeddings and all residual writers; at the end they are back.

    Parameters are replaced, not changed in place: a head that is tied to the embedding keeps its own.
    """
    model, kept = lm.model, []
    tied = model.config.tie_word_embeddings
    try:
        for module, name, axis in _writers(parts_of(model)):
            old = module._parameters[name]
            assert old is not None
            kept.append((module, name, old))
            along = old.detach().movedim(axis, -1)
            made = project_out(along, direction_D).movedim(-1, axis).contiguous()
            module._parameters[name] = nn.Parameter(made, requires_grad=False)
        model.config.tie_word_embeddings = False
        yield lm
    finally:
        model.config.tie_word_embeddings = tied
        for module, name, old in kept:
            module._parameters[name] = old


def _writers(parts: Parts) -> Iterator[tuple[nn.Module, str, int]]:
    """Yield what writes to the stream: module, parameter, and the axis that is the hidden size."""
    for module in parts.base.modules():  # GPT-2 has position embeddings beside the tokens'
        if isinstance(module, nn.Embedding):
            yield module, "weight", 1
    for block in parts.blocks:
        for role in ("o", "down"):
            path = parts.roles[role] if role == "o" else parts.mlp_down_name
            owner, _, leaf = path.rpartition(".")
            if role == "down" and parts.experts_name:
                yield block.get_submodule(owner), leaf, 1  # (experts, hidden, inner)
                continue
            module = block.get_submodule(path)
            yield module, "weight", 1 if parts.is_transposed else 0
            if getattr(module, "bias", None) is not None:
                yield module, "bias", 0

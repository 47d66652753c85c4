"""The direction between forget and harmless requests, at the end of the chat prompt, is removed.

Source: Arditi et al. 2406.11717, "refusal is mediated by a single direction".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from palimpsest.attacks.whitebox._ablation import ablated_everywhere, checked, spread
from palimpsest.attacks.whitebox._directions import each_block, random_directions, unit_directions
from palimpsest.chat import has_template, prompt_ids
from palimpsest.errors import DataError, ModelError
from palimpsest.model import LM, fits
from palimpsest.parts import parts_of
from palimpsest.plugins import options
from palimpsest.splits import thin_out
from palimpsest.types import Message, Sample
from palimpsest.views import Arms, AttackContext, AttackData, Need, View


@options
class RefusalAblation:
    """d = mean(forget requests) - mean(harmless requests) at the last token of the chat template.

    d comes from one block's output; each block's is tried, and each is removed from everything: from what
    enters the first block and from what every block adds, at all tokens. Refit: every arm loses its own
    direction.

    Requests are the chat samples of the forget and retain texts; where there are none, the questions of
    the forget domain and the benign ones, as a user's message. Difference from Arditi et al.: they choose
    block and token by what the harmful set's refusals do; here the audit chooses the block, and the
    token is the last.

    Raises ModelError without a chat template, and DataError where a direction is zero.
    """

    access: ClassVar[Literal["prompts", "weights"]] = "weights"
    needs: ClassVar[frozenset[Need]] = frozenset({"forget data"})
    arms: ClassVar[Literal["refit", "transfer"]] = "refit"
    role: ClassVar[Literal["attack", "diagnostic"]] = "attack"
    may_teach: ClassVar[bool] = False

    requests: Annotated[int, Field(ge=2)] = 128
    """Most requests of each kind (paper: 128)."""
    most: Annotated[int, Field(ge=1)] = 8
    """Most blocks whose direction is tried; a deeper model's are spread evenly over its depth."""
    controls: Annotated[int, Field(ge=1)] = 3
    """Random directions of the placebo."""
    stands_in: Literal["none", "random"] = "none"
    """`random`: the placebo's directions are removed instead."""

    def attack(self, arms: Arms, data: AttackData, ctx: AttackContext) -> Iterator[View]:
        """Yield a view per block whose direction is removed."""
        lm = arms.target
        if not has_template(lm.tokenizer):
            raise ModelError(
                f"refusal_ablation: the tokenizer of {lm.name} has no chat template, so there is no end of "
                "a chat prompt to measure at; leave this attack out"
            )
        harmful = self._rows(lm, _chats(data.forget_texts) or data.needed("fit"))
        harmless = self._rows(lm, _chats(data.retain_texts) or data.needed("benign"))
        mean_LD, norm_L = last_means(lm, harmful)
        contrast_LD = mean_LD - last_means(lm, harmless)[0]
        number = len(parts_of(lm.model).blocks)
        blocks = spread(number, self.most)
        measured = unit_directions(contrast_LD, norm_L, blocks, name="refusal")
        removed = [measured]
        if self.stands_in == "random":
            removed = [
                random_directions(measured, ctx.seed, "refusal_ablation", r)
                for r in range(self.controls)
            ]
        for k in blocks:
            for repeat, directions in enumerate(removed):
                apply = partial(ablated_everywhere, direction_D=directions[k])
                everywhere = dict.fromkeys(range(number), directions[k])
                facts = checked(lm, harmful[0], everywhere, apply)
                length = float(contrast_LD[k].norm() / norm_L[k])
                yield View(
                    setting={"layer": k},
                    repeat=repeat,
                    apply=apply,
                    facts={
                        **facts,
                        "length": length,
                        "harmful": len(harmful),
                        "harmless": len(harmless),
                    },
                )

    def placebo(self) -> RefusalAblation:
        """Return the same with random directions."""
        return replace(self, stands_in="random")

    def _rows(self, lm: LM, samples: Sequence[Sample]) -> list[list[int]]:
        requests = [
            Message("user", s.messages[-1].content) for s in thin_out(samples, self.requests)
        ]
        rows = [row for m in requests if fits(lm, len(row := prompt_ids(lm.tokenizer, [m])))]
        if not rows:
            raise DataError(f"refusal_ablation: no request fits the context of {lm.max_length}")
        return rows


def last_means(lm: LM, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return the mean state (L, D) and mean norm (L,) at the rows' last tokens, float64."""
    number = len(parts_of(lm.model).blocks)
    size = int(lm.model.config.get_text_config().hidden_size)
    sums_LD = torch.zeros(number, size, dtype=torch.float64)
    norms_L = torch.zeros(number, dtype=torch.float64)

    def see(k: int, h_BTD: Tensor, ids_BT: Tensor, places_BT: Tensor) -> None:
        at_B = places_BT.argmax(dim=1)
        last_BD = h_BTD[torch.arange(len(h_BTD), device=h_BTD.device), at_B].cpu().double()
        sums_LD[k] += last_BD.sum(0)
        norms_L[k] += last_BD.norm(dim=-1).sum()

    each_block(lm, rows, see)
    return sums_LD / len(rows), norms_L / len(rows)


def _chats(samples: Sequence[Sample]) -> list[Sample]:
    return [s for s in samples if s.task == "generate" and not s.is_raw]

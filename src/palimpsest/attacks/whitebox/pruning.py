"""Weights that matter for unlearned answers, and not for the others, are set to zero.

Source: Wei et al. 2402.05162, set difference of SNIP scores; on unlearned models Łucki et al. 2409.18025.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from palimpsest.attacks.whitebox._importance import (
    Scores,
    answer_examples,
    letter_examples,
    prunable,
    stored_scores,
    text_examples,
)
from palimpsest.errors import ModelError
from palimpsest.model import LM
from palimpsest.plugins import options
from palimpsest.seeds import derive_seed
from palimpsest.views import Arms, AttackContext, AttackData, Need, View

PAPER_SHARES = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2)
"""The released grid: 45 pairs with p >= q."""


@options
class Pruning:
    """Zero S_forget(q) minus S_utility(p): the top shares of two scores, for every pair p >= q.

    score = |W| sum_i |dL_i / dW|, summed over samples one by one; the top share is taken within each
    matrix, as the released code does (Wei et al. write: within each row). Equal scores at the edge go by
    position, and a weight with score 0 is in no set. Pruned are the linear layers of all blocks, and
    the stacked experts of mixtures. Transfer: every arm loses the same weights.

    All matrices get their scores in one backward pass per sample; the released code runs all of it again
    for every layer and pickles the scores. A score takes 4 bytes per weight, of two data sets; where the
    audit has a folder they wait there as safetensors, so that a kill repeats at most one sweep.

    Defaults against the paper: 128 samples instead of 512, 6 pairs instead of 45.
    """

    access: ClassVar[Literal["prompts", "weights"]] = "weights"
    needs: ClassVar[frozenset[Need]] = frozenset({"forget data", "texts"})
    arms: ClassVar[Literal["refit", "transfer"]] = "transfer"
    role: ClassVar[Literal["attack", "diagnostic"]] = "attack"
    may_teach: ClassVar[bool] = False

    shares: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.005, 0.025, 0.1)
    """Values of p and q (paper: .005, .01, .025, .05, .075, .1, .125, .15, .2)."""
    samples: Annotated[int, Field(ge=1)] = 128
    """Most samples of each data set (paper: 512)."""
    forget: Literal["texts", "answers"] = "texts"
    """Loss of the first score: on forget texts (paper: for RMU), or on the model's own continuations of
    forget questions (paper: for DPO and NPO)."""
    utility: Literal["texts", "questions"] = "texts"
    """Loss of the second: on retain texts (paper: for RMU), or on the letters of benign questions."""
    repeats: Annotated[int, Field(ge=1)] = 3
    """Random masks of the placebo for each pair."""
    mask: Literal["difference", "random"] = "difference"
    """`random`: the placebo's masks, with as many weights of each matrix."""

    @field_validator("shares")
    @classmethod
    def _something(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if not shares:
            raise ValueError("give at least one share")
        return shares

    def attack(self, arms: Arms, data: AttackData, ctx: AttackContext) -> Iterator[View]:
        """Yield a view per pair (p, q), and of the placebo per random mask."""
        lm = arms.target
        if lm.quantization:
            raise ModelError(
                f"pruning: {lm.name} is quantised ({lm.quantization}) and has no weights to zero; load it "
                "unquantised, or leave this attack out"
            )
        if self.forget == "texts":
            examples = text_examples(lm, data.needed("forget_texts"), self.samples)
        else:
            examples = answer_examples(lm, data.needed("fit"), self.samples)
        important = stored_scores(lm, examples, "forget", ctx)
        if self.utility == "texts":
            examples = text_examples(lm, data.needed("retain_texts"), self.samples)
        else:
            examples = letter_examples(lm, data.needed("benign"), self.samples)
        useful = stored_scores(lm, examples, "utility", ctx)
        total = sum(w.numel() for w in prunable(lm).values())
        for q in sorted(set(self.shares)):
            for p in sorted(s for s in set(self.shares) if s >= q):
                zeroed = sum(int(m.sum()) for _, m in self._masks(lm, important, useful, p, q))
                for repeat in range(self.repeats if self.mask == "random" else 1):
                    seed = derive_seed(ctx.seed, "pruning", p, q, repeat)
                    masks = partial(
                        self._masks, important=important, useful=useful, p=p, q=q, seed=seed
                    )
                    yield View(
                        setting={"p": p, "q": q},
                        repeat=repeat,
                        apply=partial(pruned, masks=masks),
                        facts={"zeroed": zeroed, "share": zeroed / total},
                    )

    def placebo(self) -> Pruning:
        """Return the same with random masks of the same size in each matrix."""
        return replace(self, mask="random")

    def _masks(
        self, lm: LM, important: Scores, useful: Scores, p: float, q: float, seed: int = 0
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield name and mask of each matrix, one at a time."""
        for name in prunable(lm):
            mask = important.top(name, q) & ~useful.top(name, p)
            yield name, mask if self.mask == "difference" else shuffled(mask, seed, name)


def shuffled(mask: Tensor, seed: int, name: str) -> Tensor:
    """Return a random mask of the same shape and count."""
    generator = torch.Generator().manual_seed(derive_seed(seed, name))
    places = torch.randperm(mask.numel(), generator=generator)[: int(mask.sum())]
    made = torch.zeros(mask.numel(), dtype=torch.bool)
    made[places] = True
    return made.view(mask.shape)


@contextmanager
def pruned(lm: LM, *, masks: Callable[[LM], Iterable[tuple[str, Tensor]]]) -> Iterator[LM]:
    """Zero the masked weights in place; at the end they have their values again."""
    weights = prunable(lm)
    kept: list[tuple[nn.Parameter, Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for name, mask in masks(lm):
                weight = weights[name]
                mask = mask.to(weight.device)
                kept.append((weight, mask, weight[mask]))
                weight[mask] = 0
        yield lm
    finally:
        with torch.no_grad():
            for weight, mask, values in kept:
                weight[mask] = values

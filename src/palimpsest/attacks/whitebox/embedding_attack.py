"""Embedding attack: each question's own embeddings are moved until the model begins an answer.

Schwinn et al. 2402.09063 (section 3): signed gradient descent on input embeddings, prompt by prompt,
towards a start that affirms. The target holds no key: it is the same text for every question, or any
answer's first token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from palimpsest.attacks.whitebox._inputs import common_end, run_places
from palimpsest.attacks.whitebox._questions import FitChannel, Ids, option_ids, prompt_of
from palimpsest.errors import DataError
from palimpsest.model import LM
from palimpsest.plugins import options
from palimpsest.seeds import derive_seed
from palimpsest.types import Sample
from palimpsest.views import (
    PLACEBO_DRAWS,
    Arms,
    AttackContext,
    AttackData,
    AuditChannel,
    Need,
    View,
)

Count = Annotated[int, Field(ge=1)]


@options
class EmbeddingAttack:
    """A perturbation per prompt, of every token behind BOS, computed on the arm that is scored.

    The paper appends free embeddings and aims at a start such as "Sure, here is"; it trains on the scored
    prompt, which a key in the target would leak into. Here the aim is an answer's first token, whichever
    it is: the probability of all first tokens that fit questions' options have in that channel (the
    letters, or words), summed. Which of them is right is left to the model.
    """

    access: ClassVar[Literal["weights"]] = "weights"
    needs: ClassVar[frozenset[Need]] = frozenset({"forget data"})
    arms: ClassVar[Literal["refit"]] = "refit"
    role: ClassVar[Literal["attack"]] = "attack"
    may_teach: ClassVar[bool] = False

    random_direction: bool = False
    """Move along random signs in place of the gradient's: the placebo, steps of the same size."""
    steps: tuple[Count, ...] = (5, 20)
    """Steps per prompt; each number is a view."""
    step_size: Annotated[float, Field(gt=0)] = 0.01
    """Size of a step per coordinate, in units of the embeddings' root mean square."""
    channels: tuple[FitChannel, ...] = ("letter", "cloze")
    """Which channels are attacked; generation goes with the letter."""

    def attack(self, arms: Arms, data: AttackData, ctx: AttackContext) -> Iterator[View]:
        """Yield one view per channel and number of steps."""
        lm = arms.target
        samples = data.needed("fit")
        draws: list[int | None] = [None]
        if self.random_direction:
            draws = [derive_seed(ctx.seed, "signs", draw) for draw in range(PLACEBO_DRAWS)]
        for channel in self.channels:
            run = common_end([_whole(lm, sample, channel) for sample in samples])
            if len(run) < 2:
                raise DataError(
                    f"embedding_attack: the prompts end with {len(run)} tokens in common; at least 2 "
                    "are needed to find the prompt's end"
                )
            firsts = {
                option_ids(lm.tokenizer, sample, channel, option)[0]
                for sample in samples
                for option in range(len(sample.options))
            }
            scored: tuple[AuditChannel, ...] = (
                ("letter", "generation") if channel == "letter" else ("cloze",)
            )
            for steps, (repeat, signs) in product(self.steps, enumerate(draws)):
                attack = _Ascent(
                    run=run,
                    wanted=tuple(sorted(firsts)),
                    steps=steps,
                    step_size=self.step_size,
                    random_seed=signs,
                )
                yield View(
                    setting={"channel": channel, "steps": steps},
                    repeat=repeat,
                    apply=partial(moved_prompts, ascent=attack),
                    channels=scored,
                    facts={"target_tokens": len(firsts)},
                )

    def placebo(self) -> EmbeddingAttack | None:
        """Return steps of the same size along random signs, three draws of them."""
        return None if self.random_direction else replace(self, random_direction=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ascent:
    """How prompts are moved: towards which first tokens, and how far.

    `run` ends every prompt: what stands behind it is not the prompt's, and stays as it is.
    """

    run: Ids
    wanted: Ids
    steps: int
    step_size: float
    random_seed: int | None


@contextmanager
def moved_prompts(lm: LM, *, ascent: _Ascent) -> Iterator[LM]:
    """Yield the model, which moves the embeddings of each prompt that it reads from its start."""
    mover = _Mover(lm, ascent)
    handles = [
        lm.model.register_forward_pre_hook(mover.remember_call, with_kwargs=True),
        lm.model.get_input_embeddings().register_forward_hook(mover.at_embedding),
    ]
    try:
        yield lm
    finally:
        for handle in handles:
            handle.remove()


class _Mover:
    """The hooks: one remembers a forward pass's arguments, one moves what the embedding puts out."""

    def __init__(self, lm: LM, ascent: _Ascent) -> None:
        self.model, self.ascent = lm.model, ascent
        table = self.model.get_input_embeddings().weight.detach().float()
        self.size = ascent.step_size * float(table.square().mean().sqrt())
        self.wanted_S = torch.tensor(ascent.wanted, device=lm.device)
        self.call: dict[str, Any] = {}
        self.leaf: Tensor | None = None

    def remember_call(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self.leaf is None:
            self.call = dict(kwargs)

    def at_embedding(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if self.leaf is not None:
            return self.leaf
        mask_BT = self.call.get("attention_mask")
        if mask_BT is None or self.call.get("past_key_values") is not None:
            return output
        ends_B = run_places(args[0], self.ascent.run)[:, -1]
        if not bool((ends_B >= 0).any()):
            return output
        return self._moved(output.detach(), args[0], mask_BT, ends_B)

    def _moved(self, h_BTD: Tensor, ids_BT: Tensor, mask_BT: Tensor, ends_B: Tensor) -> Tensor:
        """Return embeddings after the steps; a prompt's first token (BOS) and what follows it stay."""
        columns_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        movable_BT = (mask_BT > 0) & (mask_BT.cumsum(1) > 1) & (columns_T <= ends_B[:, None])
        moved_BTD = h_BTD.float()  # small steps add up in float32, also in a bfloat16 model
        for _ in range(self.ascent.steps):
            if self.ascent.random_seed is None:
                leaf_BTD = moved_BTD.to(h_BTD.dtype)
                signs_BTD = self._gradient(leaf_BTD, ids_BT, mask_BT, ends_B).sign().float()
            else:
                # the same signs in every step: drawn anew they would cancel, and move a prompt less far
                generator = torch.Generator().manual_seed(derive_seed(self.ascent.random_seed))
                signs_BTD = torch.randn(h_BTD.shape, generator=generator).sign().to(moved_BTD)
            moved_BTD = moved_BTD - self.size * signs_BTD * movable_BT[:, :, None]
        return moved_BTD.to(h_BTD.dtype)

    def _gradient(self, h_BTD: Tensor, ids_BT: Tensor, mask_BT: Tensor, ends_B: Tensor) -> Tensor:
        """Return the gradient of -log p(an answer begins) of every prompt."""
        kept = ids_BT.shape[1] - int(ends_B[ends_B >= 0].min())
        call = {k: v for k, v in self.call.items() if k == "position_ids"}
        with torch.enable_grad():
            self.leaf = h_BTD.detach().requires_grad_()
            try:
                logits_BTV = self.model(
                    input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, **call
                ).logits[:, -kept:]
                rows_B = (ends_B >= 0).nonzero()[:, 0]
                columns_B = ends_B[rows_B] - (ids_BT.shape[1] - kept)
                logp_BV = torch.log_softmax(logits_BTV[rows_B, columns_B].float(), dim=-1)
                loss = -torch.logsumexp(logp_BV[:, self.wanted_S], dim=-1).sum()
                (gradient_BTD,) = torch.autograd.grad(loss, self.leaf)
            finally:
                self.leaf = None
        return gradient_BTD


def _whole(lm: LM, sample: Sample, channel: FitChannel) -> Ids:
    bos, rest = prompt_of(lm.tokenizer, sample, channel)
    return bos + rest

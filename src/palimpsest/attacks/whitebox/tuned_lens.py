"""Tuned lens: an affine translator per layer, trained on unrelated texts alone, before the head reads.

Source: Belrose et al. 2303.08112, section 3: h -> h + A h + b, trained by KL(model's output || lens).
Shape suffixes: B rows, T tokens, N real tokens, D hidden size, L layers, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from palimpsest import disk
from palimpsest.attacks.whitebox._states import chosen_layers, read_early
from palimpsest.chat import text_ids
from palimpsest.errors import DataError, StoreError
from palimpsest.hooks import capture
from palimpsest.parts import parts_of
from palimpsest.plugins import options
from palimpsest.scoring import evaluating, forward, pad_rows
from palimpsest.seeds import derive_seed
from palimpsest.types import Sample
from palimpsest.views import Arms, AttackContext, AttackData, AuditChannel, Need, View

if TYPE_CHECKING:
    from palimpsest.model import LM

FILE = "tuned_lens.safetensors"
HELD_OUT_SHARE = 0.1
MOST_HELD_OUT = 32
MOMENTUM = 0.9
MOST_NORM = 1.0
"""Nesterov momentum and largest gradient norm, as in the paper; the norm is each layer's own."""


@dataclass
class _Translators:
    """Weights (L, D, D), biases (L, D), their momenta, and how many steps made them."""

    weight: Tensor
    bias: Tensor
    weight_momentum: Tensor
    bias_momentum: Tensor
    step: int = 0

    def translate(self, place: int, h: Tensor) -> Tensor:
        """Return h + A h + b in float32."""
        weight, bias = self.weight[place].to(h.device), self.bias[place].to(h.device)
        wide = h.float()
        return wide + wide @ weight.T + bias


@options
class TunedLens:
    """Reads block outputs through translators that never saw a text of the forget domain.

    The paper: 250 steps of SGD with Nesterov momentum .9 at learning rate 1 with linear decay, gradients
    clipped to norm 1, 262,144 tokens per step. The default takes 256 tokens per step. It is fitted anew
    on every arm. Held-out KL of both lenses is in the facts; where the tuned one is not lower, raise steps.
    """

    access: ClassVar[Literal["prompts", "weights"]] = "weights"
    needs: ClassVar[frozenset[Need]] = frozenset({"texts"})
    arms: ClassVar[Literal["refit", "transfer"]] = "refit"
    role: ClassVar[Literal["attack", "diagnostic"]] = "attack"
    may_teach: ClassVar[bool] = False

    layers: tuple[int, ...] = ()
    """Blocks to read, from 0; empty = all but the last, whose output the head reads anyway."""
    channels: tuple[Literal["letter", "cloze", "generation"], ...] = ("letter", "cloze")
    """Channels in which answers are read."""
    steps: Annotated[int, Field(ge=1)] = 250
    """Optimiser steps."""
    lr: Annotated[float, Field(gt=0)] = 1.0
    """Learning rate at the first step; it falls linearly to 0."""
    tokens_per_step: Annotated[int, Field(ge=1)] = 256
    """Tokens of each step, texts drawn at random."""
    max_tokens: Annotated[int, Field(ge=2)] = 256
    """Tokens kept of each text, from its beginning."""
    save_every: Annotated[int, Field(ge=1)] = 50
    """Steps between checkpoints."""

    def attack(self, arms: Arms, data: AttackData, ctx: AttackContext) -> Iterator[View]:
        """Train the translators on the texts of other domains; yield one view per layer."""
        num_texts = len(data.retain_texts) + len(data.unrelated_texts)
        if num_texts < 2:
            raise DataError(
                f"tuned_lens: {num_texts} retain and unrelated texts are too few; give at least two"
            )
        lm = arms.target
        layers = chosen_layers(parts_of(lm.model), self.layers, last=False)
        trained, held_out = self._texts(lm, data)
        translators = self._train(lm, layers, trained, ctx)
        channels: tuple[AuditChannel, ...] = self.channels
        kl = _held_out_kl(lm, layers, translators, held_out)
        for place, layer in enumerate(layers):
            before, after = kl[place]
            yield View(
                setting={"layer": layer},
                apply=partial(
                    read_early, layer=layer, translate=partial(translators.translate, place)
                ),
                channels=channels,
                facts={
                    "steps": translators.step,
                    "held_out_kl_logit_lens": before,
                    "held_out_kl_tuned_lens": after,
                },
            )

    def placebo(self) -> Any:
        """Return None: translators hold nothing of the forget domain, and the control arm has its own."""
        return None

    def _texts(
        self, lm: LM, data: AttackData
    ) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """Return the token ids of texts to train on and of a tenth that is held out."""
        samples = [*data.retain_texts, *data.unrelated_texts]
        rows = [_ids(lm, s)[: self.max_tokens] for s in samples]
        rows = [row for row in rows if len(row) > 1]
        if len(rows) < 2:
            raise DataError(
                f"tuned_lens: {len(samples)} retain and unrelated texts have {len(rows)} of two tokens or "
                "more; give at least two"
            )
        stride = max(2, round(1 / HELD_OUT_SHARE))
        held_out = rows[::stride][:MOST_HELD_OUT]
        kept = [row for i, row in enumerate(rows) if i % stride or i // stride >= MOST_HELD_OUT]
        return kept, held_out

    def _train(
        self, lm: LM, layers: Sequence[int], rows: list[tuple[int, ...]], ctx: AttackContext
    ) -> _Translators:
        """Return trained translators; a stored state goes on from where it was."""
        kind = f"{list(layers)} {self.steps} {self.lr} {self.tokens_per_step} {ctx.seed}"
        state = _stored(ctx.out, kind) or _identity(lm, len(layers))
        while state.step < self.steps:
            self._step(lm, layers, rows, state, ctx.seed)
            if ctx.out is not None and (
                state.step % self.save_every == 0 or state.step == self.steps
            ):
                _store(ctx.out, state, kind)
            ctx.progress(state.step, self.steps, "tuned lens")
        return state

    def _step(
        self,
        lm: LM,
        layers: Sequence[int],
        rows: list[tuple[int, ...]],
        state: _Translators,
        seed: int,
    ) -> None:
        drawn = torch.Generator().manual_seed(derive_seed(seed, "tuned_lens", state.step))
        batch: list[tuple[int, ...]] = []
        while sum(map(len, batch)) < self.tokens_per_step:
            batch.append(rows[int(torch.randint(len(rows), (1,), generator=drawn))])
        rate = self.lr * (1 - state.step / self.steps)
        states, logprobs_NV = _states_and_output(lm, layers, batch)
        for place, h_ND in enumerate(states):
            weight = state.weight[place].to(h_ND.device).requires_grad_()
            bias = state.bias[place].to(h_ND.device).requires_grad_()
            wide_ND = h_ND.float()
            loss = _kl(lm, wide_ND + wide_ND @ weight.T + bias, logprobs_NV)
            gradients = torch.autograd.grad(loss, (weight, bias))
            norm = torch.sqrt(sum((g.square().sum() for g in gradients), torch.tensor(0.0)))
            scale = min(1.0, MOST_NORM / (float(norm) + 1e-12))
            parts = ("weight", "bias")
            for name, gradient in zip(parts, gradients, strict=True):
                value = getattr(state, name)[place]
                momentum = getattr(state, f"{name}_momentum")[place]
                step = gradient.to(value.device) * scale
                momentum.mul_(MOMENTUM).add_(step)
                value.sub_(rate * (step + MOMENTUM * momentum))
        state.step += 1


def _ids(lm: LM, sample: Sample) -> tuple[int, ...]:
    answer = f" {sample.answer}" if isinstance(sample.answer, str) else ""
    return tuple(text_ids(lm.tokenizer, sample.messages[-1].content + answer))


def _identity(lm: LM, number: int) -> _Translators:
    size = int(lm.model.get_input_embeddings().weight.shape[1])
    square, line = torch.zeros(number, size, size), torch.zeros(number, size)
    return _Translators(square, line, square.clone(), line.clone())


def _states_and_output(
    lm: LM, layers: Sequence[int], rows: Sequence[Sequence[int]]
) -> tuple[list[Tensor], Tensor]:
    """Return the block outputs (N, D) of each layer and the model's log-probabilities (N, V)."""
    parts = parts_of(lm.model)
    padded = pad_rows(rows, max(map(len, rows)), "left", lm.device)
    blocks = [parts.blocks[layer] for layer in layers]
    with evaluating(lm.model), capture(blocks) as seen:
        logits_BTV = forward(lm.model, padded).logits
    real_BT = padded.mask_BT.bool()
    states = [seen[i][real_BT.to(seen[i].device)] for i in range(len(layers))]
    return states, torch.log_softmax(logits_BTV[real_BT].float(), dim=-1)


def _kl(lm: LM, h_ND: Tensor, logprobs_NV: Tensor) -> Tensor:
    """Return the mean over tokens of KL(the model's output || what the head reads from h)."""
    lens_NV = parts_of(lm.model).readout(h_ND.to(lm.dtype)[None])[0]
    read_NV = torch.log_softmax(lens_NV.float(), dim=-1)
    return (logprobs_NV.exp() * (logprobs_NV - read_NV)).sum(-1).mean()


@torch.no_grad()
def _held_out_kl(
    lm: LM, layers: Sequence[int], translators: _Translators, rows: Sequence[Sequence[int]]
) -> list[tuple[float, float]]:
    """Return, per layer, the KL in nats per token of the plain and of the tuned lens."""
    states, logprobs_NV = _states_and_output(lm, layers, rows)
    return [
        (
            float(_kl(lm, h_ND, logprobs_NV)),
            float(_kl(lm, translators.translate(place, h_ND), logprobs_NV)),
        )
        for place, h_ND in enumerate(states)
    ]


def _store(folder: Path, state: _Translators, kind: str) -> None:
    from safetensors.torch import save_file

    tensors = {k: v for k, v in vars(state).items() if isinstance(v, Tensor)}
    disk.make_folder(folder)
    with disk.clear_disk_errors(folder):
        save_file(
            tensors, folder / f"{FILE}.partial", metadata={"step": str(state.step), "kind": kind}
        )
        os.replace(folder / f"{FILE}.partial", folder / FILE)


def _stored(folder: Path | None, kind: str) -> _Translators | None:
    """Return the stored state, None without one.

    Raises:
        StoreError: the file is damaged, or was made with other options.
    """
    if folder is None or not (folder / FILE).is_file():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / FILE, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about.get("kind") != kind:
            raise StoreError(f"{folder / FILE} was made with other options; delete it")
        return _Translators(**tensors, step=int(about["step"]))
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise StoreError(f"{folder / FILE} is damaged ({error}); delete it") from error

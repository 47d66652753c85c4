"""Activation patching: how deep unlearning reaches (unlearning depth score, UDS).

A diagnostic; source: arXiv 2605.24614, section 3. States of the attacked model are put into the original,
layer by layer; what it then loses of the answer's log-probability is what that layer no longer carries.

Shape suffixes: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from palimpsest.attacks.whitebox._states import chosen_layers
from palimpsest.chat import text_ids
from palimpsest.errors import DataError, ModelError
from palimpsest.hooks import capture, hidden_of
from palimpsest.losses import token_logprobs
from palimpsest.model import fits
from palimpsest.parts import parts_of
from palimpsest.plugins import options
from palimpsest.prompts import cloze_prompt
from palimpsest.scoring import evaluating, forward, pad_rows
from palimpsest.types import Sample
from palimpsest.views import Arms, AttackContext, AttackData, Need, Plain, View

if TYPE_CHECKING:
    from palimpsest.model import LM


@options
class ActivationPatching:
    """Measures, per layer, D2 / D1 on the fit questions; the figures are in the facts.

    For question x with answer y (open prompt, y behind it): D2 is what the original loses of the mean
    log p(y | x) per token when the block output at the positions that predict y is the attacked model's. D1
    is the paper's same loss with a model that never knew y. Audits have no such model here, so D1 is the
    original's own: its states at these positions when it is asked the next question of the fit set. Erasure
    of a question at a layer is clip(D2 / D1, 0, 1); UDS weights it by D1 over layers with D1 > threshold.
    1 = nothing of the answer is left in the states, 0 = all of it. The view itself is the unchanged model.
    """

    access: ClassVar[Literal["prompts", "weights"]] = "weights"
    needs: ClassVar[frozenset[Need]] = frozenset({"forget data", "original"})
    arms: ClassVar[Literal["refit", "transfer"]] = "refit"
    role: ClassVar[Literal["attack", "diagnostic"]] = "diagnostic"
    may_teach: ClassVar[bool] = False

    layers: tuple[int, ...] = ()
    """Blocks to patch, from 0; empty = all."""
    threshold: Annotated[float, Field(ge=0)] = 0.05
    """Nats per token: a layer at which D1 is not above it does not carry the answer, and is left out."""
    questions: Annotated[int, Field(ge=2)] = 40
    """Most fit questions."""

    def attack(self, arms: Arms, data: AttackData, ctx: AttackContext) -> Iterator[View]:
        """Yield one view, whose facts hold UDS over all layers, and D1, D2 and the erasure of each.

        Raises:
            DataError: fewer than two fit questions that fit, or no layer carries an answer.
        """
        original, target = arms.required_original(), arms.target
        layers = chosen_layers(parts_of(original.model), self.layers)
        _check_alike(target, original)
        rows = _rows(original, data.needed("fit"), self.questions)
        found = []
        for i, row in enumerate(rows):
            found.append(_losses(original, target, layers, row, rows[(i + 1) % len(rows)]))
            ctx.progress(i + 1, len(rows), "patching")
        lost = torch.tensor(found, dtype=torch.float64)  # (questions, layers, [D1, D2])
        uds, erased = depth(lost[..., 0], lost[..., 1], self.threshold)
        facts: dict[str, Plain] = {
            "uds": uds,
            "questions": len(rows),
            "d1_from": "the original asked another question",
        }
        for place, layer in enumerate(layers):
            facts[f"erasure_{layer}"] = erased[place]
            facts[f"d1_{layer}"] = float(lost[:, place, 0].mean())
            facts[f"d2_{layer}"] = float(lost[:, place, 1].mean())
        yield View(channels=("cloze",), facts=facts)

    def placebo(self) -> Any:
        """Return None: a diagnostic has none."""
        return None


def depth(d1: Tensor, d2: Tensor, threshold: float) -> tuple[float, list[float]]:
    """Return UDS, the mean over questions, and per layer the erasure weighted by D1 (-1: none counts).

    Args:
        d1: (questions, layers) loss with states that lack the answer.
        d2: (questions, layers) loss with the attacked model's states.
        threshold: layers of a question with D1 not above it are left out.

    Raises:
        DataError: no layer of any question is left.
    """
    weight = torch.where(d1 > threshold, d1, torch.zeros_like(d1))
    if not bool(weight.any()):
        raise DataError(
            f"activation_patching: no layer of the original carries an answer (D1 <= {threshold} nats "
            "everywhere); it does not know these questions, or the threshold is too high"
        )
    share = torch.where(weight > 0, d2 / d1, torch.zeros_like(d1)).clamp(0, 1) * weight
    counted = weight.sum(1) > 0
    uds = float((share.sum(1)[counted] / weight.sum(1)[counted]).mean())
    per_layer = zip(share.sum(0).tolist(), weight.sum(0).tolist(), strict=True)
    return uds, [a / b if b > 0 else -1.0 for a, b in per_layer]


def _check_alike(target: LM, original: LM) -> None:
    mine, other = (
        (len(parts_of(m.model).blocks), m.model.get_input_embeddings().weight.shape[1])
        for m in (target, original)
    )
    if mine != other:
        raise ModelError(
            f"activation_patching: {target.name!r} has {mine[0]} blocks of width {mine[1]}, "
            f"{original.name!r} {other[0]} of {other[1]}; they must be one architecture"
        )


def _rows(lm: LM, samples: Sequence[Sample], most: int) -> list[tuple[list[int], list[int]]]:
    """Return (prompt, answer) token ids of questions with a key."""
    rows = []
    for sample in samples:
        if not isinstance(sample.answer, int):
            continue
        prompt = text_ids(lm.tokenizer, cloze_prompt(sample))
        answer = lm.tokenizer.encode(f" {sample.options[sample.answer]}", add_special_tokens=False)
        if fits(lm, len(prompt) + len(answer)):
            rows.append((prompt, answer))
    if len(rows) < 2:
        raise DataError("activation_patching needs two fit questions that fit the context")
    return rows[:most]


def _losses(
    original: LM,
    target: LM,
    layers: Sequence[int],
    row: tuple[list[int], list[int]],
    other: tuple[list[int], list[int]],
) -> list[tuple[float, float]]:
    """Return D1 and D2 of each layer in nats per answer token."""
    ids, number = [*row[0], *row[1]], len(row[1])
    plain = _answer_logprob(original, ids, number)
    ignorant = _states(original, [*other[0], *row[1]], number, layers)
    attacked = _states(target, ids, number, layers)
    losses = []
    for layer, none_TD, mine_TD in zip(layers, ignorant, attacked, strict=True):
        lost = []
        for state_TD in (none_TD, mine_TD):
            with _patched(original, layer, state_TD):
                lost.append(plain - _answer_logprob(original, ids, number))
        losses.append((lost[0], lost[1]))
    return losses


def _states(lm: LM, ids: Sequence[int], number: int, layers: Sequence[int]) -> list[Tensor]:
    """Return block outputs at the positions that predict the last `number` tokens, (T, D) each."""
    blocks = [parts_of(lm.model).blocks[layer] for layer in layers]
    rows = pad_rows([ids], len(ids), "left", lm.device)
    with (
        evaluating(lm.model),
        capture(blocks, select=lambda h_BTD: h_BTD[0, -number - 1 : -1]) as seen,
    ):
        forward(lm.model, rows)
    return [seen[i] for i in range(len(layers))]


@contextmanager
def _patched(lm: LM, layer: int, state_TD: Tensor) -> Iterator[None]:
    """Put states into a block's output, at the positions that predict the answer."""

    def patch(module: Any, args: Any, output: Any) -> Any:
        hidden_BTD = hidden_of(output).clone()
        number = len(state_TD)
        hidden_BTD[0, -number - 1 : -1] = state_TD.to(hidden_BTD.device, hidden_BTD.dtype)
        return (hidden_BTD, *output[1:]) if isinstance(output, tuple) else hidden_BTD

    handle = parts_of(lm.model).blocks[layer].register_forward_hook(patch)
    try:
        yield
    finally:
        handle.remove()


def _answer_logprob(lm: LM, ids: Sequence[int], number: int) -> float:
    """Return the mean log-probability of the last `number` tokens, in nats."""
    rows = pad_rows([ids], len(ids), "left", lm.device)
    mask_BT = torch.zeros_like(rows.ids_BT, dtype=torch.bool)
    mask_BT[:, -number:] = True
    with evaluating(lm.model):
        logits_BTV = forward(lm.model, rows).logits
    return float(token_logprobs(logits_BTV, rows.ids_BT, mask_BT).double().mean())

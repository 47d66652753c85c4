"""Directions in the residual stream: means over tokens, and what they differ by.

Shape suffixes: B rows, T tokens, D hidden size, L blocks, N tokens of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from palimpsest.batching import plan_batches
from palimpsest.chat import text_ids
from palimpsest.errors import DataError
from palimpsest.hooks import hidden_of
from palimpsest.model import fits
from palimpsest.parts import parts_of
from palimpsest.prompts import letter_prompt
from palimpsest.scoring import evaluating, forward, pad_rows
from palimpsest.seeds import derive_seed
from palimpsest.splits import thin_out

if TYPE_CHECKING:
    from palimpsest.model import LM
    from palimpsest.types import Sample

Ids = Sequence[Sequence[int]]
ZERO = 1e-6
"""A direction shorter than this share of the mean state is zero: rounding, not a difference."""
OUTLIER = 3.0
"""Tokens whose states' mean norm is so many standard deviations off are left out."""
BATCH_TOKENS = 4096
TEXT_TOKENS = 256
"""Tokens that are read of a text."""


def question_ids(lm: LM, samples: Sequence[Sample], limit: int) -> list[list[int]]:
    """Return the letter prompts of at most `limit` questions; DataError when none fits."""
    rows = [text_ids(lm.tokenizer, letter_prompt(s)) for s in thin_out(samples, limit)]
    return _fitting(lm, rows, "question")


def opening_ids(lm: LM, samples: Sequence[Sample], limit: int) -> list[list[int]]:
    """Return the first 256 tokens of at most `limit` texts (of a chat, of its first message)."""
    texts = [s.messages[0].content for s in thin_out(samples, limit)]
    return _fitting(lm, [text_ids(lm.tokenizer, t)[:TEXT_TOKENS] for t in texts], "text")


def _fitting(lm: LM, rows: Sequence[list[int]], what: str) -> list[list[int]]:
    kept = [row for row in rows if len(row) > 1 and fits(lm, len(row))]
    if not kept:
        raise DataError(f"no {what} to measure a direction on fits the context of {lm.max_length}")
    return kept


def shared_header(rows: Ids) -> int:
    """Return the number of tokens with which all rows begin, at least 1 (an attention sink)."""
    shortest = min(len(row) for row in rows)
    same = 0
    while same < shortest and len({row[same] for row in rows}) == 1:
        same += 1
    return max(1, min(same, shortest - 1))


def each_block(lm: LM, rows: Ids, see: Callable[[int, Tensor, Tensor, Tensor], None]) -> None:
    """Run rows and show every block's output: see(block, h_BTD, ids_BT, places_BT).

    Places count a row's tokens from 0; padding has -1. Nothing is kept from block to block.
    """
    blocks = parts_of(lm.model).blocks
    plan = plan_batches([len(r) for r in rows], token_budget=BATCH_TOKENS, padding_side="right")
    for batch in plan.batches:
        padded = pad_rows([rows[r] for r in batch.rows], batch.width, "right", lm.device)
        places_BT = padded.positions_BT.masked_fill(padded.mask_BT == 0, -1)

        def shown(k: int, ids_BT: Tensor, places_BT: Tensor) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                h_BTD = hidden_of(output)
                see(k, h_BTD, ids_BT.to(h_BTD.device), places_BT.to(h_BTD.device))

            return hook

        handles = [
            b.register_forward_hook(shown(k, padded.ids_BT, places_BT))
            for k, b in enumerate(blocks)
        ]
        try:
            with evaluating(lm.model):
                forward(lm.model, padded, keep=1)
        finally:
            for handle in handles:
                handle.remove()


def outlier_ids(lm: LM, rows: Ids) -> Tensor:
    """Return the token ids, (V,) booleans, whose mean norm is off by |z| > 3 at some block.

    z is over all tokens of the rows behind their header. They are taken from questions that unlearning
    leaves alone, so that what it did to the states is no outlier.
    """
    header, number = shared_header(rows), len(parts_of(lm.model).blocks)
    size = 1 + max(max(row) for row in rows)
    sums_LV, counts_V = torch.zeros(number, size, dtype=torch.float64), torch.zeros(size)
    squares_L = torch.zeros(number, dtype=torch.float64)

    def see(k: int, h_BTD: Tensor, ids_BT: Tensor, places_BT: Tensor) -> None:
        real_BT = places_BT >= header
        ids_N, norms_N = ids_BT[real_BT].cpu(), h_BTD[real_BT].float().norm(dim=-1).cpu().double()
        sums_LV[k].index_add_(0, ids_N, norms_N)
        squares_L[k] += norms_N.square().sum()
        if k == 0:
            counts_V.index_add_(0, ids_N, torch.ones(len(ids_N)))

    each_block(lm, rows, see)
    total = counts_V.sum()
    mean_L1 = sums_LV.sum(1, keepdim=True) / total
    std_L1 = (squares_L[:, None] / total - mean_L1.square()).clamp(min=0).sqrt()
    z_LV = (sums_LV / counts_V.clamp(min=1) - mean_L1) / std_L1.clamp(min=1e-12)
    return ((z_LV.abs() > OUTLIER) & (counts_V > 0)).any(0)


@dataclass(frozen=True, kw_only=True)
class States:
    """Block outputs over the tokens of some prompts.

    Attributes:
        mean_LD: their mean, float64. norm_L: mean norm. count: tokens. left_out: outlier tokens.
        moment_LDD: mean of h h^T; None unless it was asked for.
    """

    mean_LD: Tensor
    norm_L: Tensor
    count: int
    left_out: int
    moment_LDD: Tensor | None = None


def measure(lm: LM, rows: Ids, outliers_V: Tensor, *, moment: bool = False) -> States:
    """Return means over the tokens behind the rows' shared header, outliers left out."""
    header, number = shared_header(rows), len(parts_of(lm.model).blocks)
    size = int(lm.model.config.get_text_config().hidden_size)
    sums_LD = torch.zeros(number, size, dtype=torch.float64)
    norms_L = torch.zeros(number, dtype=torch.float64)
    counts = {"kept": 0, "out": 0}
    moments = [torch.zeros(size, size, dtype=torch.float64) for _ in range(number if moment else 0)]

    def see(k: int, h_BTD: Tensor, ids_BT: Tensor, places_BT: Tensor) -> None:
        real_BT = places_BT >= header
        outliers = outliers_V.to(ids_BT.device)
        odd_BT = outliers[ids_BT.clamp(max=len(outliers) - 1)] & (ids_BT < len(outliers))
        h_ND = h_BTD[real_BT & ~odd_BT].float()
        sums_LD[k] += h_ND.cpu().double().sum(0)
        norms_L[k] += h_ND.norm(dim=-1).cpu().double().sum()
        if moment:
            moments[k] += (h_ND.mT @ h_ND).cpu().double()
        if k == 0:
            counts["kept"] += len(h_ND)
            counts["out"] += int((real_BT & odd_BT).sum())

    each_block(lm, rows, see)
    kept = counts["kept"]
    if not kept:
        raise DataError(
            f"no token is left to measure a direction on: {counts['out']} behind the shared header of "
            f"{header} are outliers (|z| > {OUTLIER:g}); give more, or other, questions"
        )
    return States(
        mean_LD=sums_LD / kept,
        norm_L=norms_L / kept,
        count=kept,
        left_out=counts["out"],
        moment_LDD=torch.stack([m.cpu() for m in moments]) / kept if moment else None,
    )


def principal_component(a: States, b: States) -> Tensor:
    """Return the first principal component of two sets of states together, block by block, (L, D).

    A block whose states are all alike has the zero vector.
    """
    if a.moment_LDD is None or b.moment_LDD is None:
        raise ValueError("second moments were not measured")
    share = a.count / (a.count + b.count)
    mean_LD = share * a.mean_LD + (1 - share) * b.mean_LD
    found = []
    for k in range(len(mean_LD)):
        second = share * a.moment_LDD[k] + (1 - share) * b.moment_LDD[k]
        values, vectors = torch.linalg.eigh(second - torch.outer(mean_LD[k], mean_LD[k]))
        found.append(vectors[:, -1] * values[-1].clamp(min=0).sqrt())
    return torch.stack(found)


def unit_directions(
    found_LD: Tensor, norm_L: Tensor, layers: Sequence[int], *, name: str
) -> dict[int, Tensor]:
    """Return the unit vectors of some blocks.

    Raises:
        DataError: a direction is zero: shorter than 1e-6 of the mean state.
    """
    for k in layers:
        if is_zero(found_LD[k], norm_L[k]):
            raise DataError(
                f"direction {name!r} is zero at block {k} (norm {float(found_LD[k].norm()):.2g}, states "
                f"{float(norm_L[k]):.2g}): removing it would change nothing; leave the block out, or give "
                "other questions"
            )
    return {k: (found_LD[k] / found_LD[k].norm()).float() for k in layers}


def is_zero(direction_D: Tensor, norm: Tensor) -> bool:
    """Return whether a direction is shorter than rounding lets one tell from zero."""
    return not bool(direction_D.norm() > ZERO * norm)


def random_directions(like: Mapping[int, Tensor], *seed: object) -> dict[int, Tensor]:
    """Return random unit vectors for the same blocks, the same for the same seed."""
    made = {}
    for k, direction_D in like.items():
        generator = torch.Generator().manual_seed(derive_seed(*seed, "direction", k))
        noise_D = torch.randn(direction_D.shape, generator=generator)
        made[k] = noise_D / noise_D.norm()
    return made


def halves(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Return samples in two parts, divided by a hash of their group.

    Raises:
        DataError: one part is empty.
    """
    parts: tuple[list[Sample], list[Sample]] = ([], [])
    for sample in samples:
        parts[derive_seed("half", sample.group) % 2].append(sample)
    if not all(parts):
        raise DataError(
            f"{len(samples)} benign question(s) fall into one half: a matched control needs two; give "
            "more groups"
        )
    return parts


def control_directions(
    lm: LM, samples: Sequence[Sample], outliers_V: Tensor, *, limit: int, drawn: int, seed: object
) -> dict[str, tuple[dict[int, Tensor], ...]]:
    """Return what a placebo removes instead of a direction, by kind: `matched` one, `random` ones.

    The matched one is the difference between two halves of the benign questions, made in the same way;
    it is of this model alone: how unlearning moved *benign* questions tells where it hides the others.
    """
    first, second = (
        measure(lm, question_ids(lm, half, limit), outliers_V) for half in halves(samples)
    )
    difference_LD = first.mean_LD - second.mean_LD
    every = range(len(difference_LD))
    matched = unit_directions(difference_LD, first.norm_L, every, name="benign halves")
    random = tuple(random_directions(matched, seed, r) for r in range(drawn))
    return {"matched": (matched,), **({"random": random} if random else {})}


class _Reached(Exception):
    """Not an error: it ends a forward pass behind the last block that is asked for."""


def states_at(lm: LM, rows: Ids, layer: int, direction_D: Tensor) -> list[Tensor]:
    """Return per row the cosine (T,) of each token's state behind block `layer` with a unit vector.

    The forward pass ends there.
    """
    found: list[Tensor] = [torch.empty(0)] * len(rows)

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        h_BTD = hidden_of(output).float()
        direction = direction_D.to(h_BTD)
        kept.append((h_BTD @ direction / h_BTD.norm(dim=-1).clamp(min=1e-12)).cpu())
        raise _Reached

    plan = plan_batches([len(r) for r in rows], token_budget=BATCH_TOKENS, padding_side="right")
    for batch in plan.batches:
        kept: list[Tensor] = []
        padded = pad_rows([rows[r] for r in batch.rows], batch.width, "right", lm.device)
        handle = parts_of(lm.model).blocks[layer].register_forward_hook(keep)
        try:
            with evaluating(lm.model), suppress(_Reached):
                forward(lm.model, padded, keep=1)
        finally:
            handle.remove()
        for r, cosine_T in zip(batch.rows, kept[0], strict=True):
            found[r] = cosine_T[: len(rows[r])]
    return found

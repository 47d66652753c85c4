"""Removing directions from the residual stream with hooks: where, how, and the check that it worked.

Shape suffixes: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import torch
from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from palimpsest.attacks.whitebox._directions import control_directions, each_block, unit_directions
from palimpsest.errors import ModelError, UsageError
from palimpsest.hooks import hidden_of
from palimpsest.parts import block_writers, parts_of
from palimpsest.plugins import options
from palimpsest.views import View

if TYPE_CHECKING:
    from palimpsest.model import LM
    from palimpsest.types import Sample
    from palimpsest.views import Plain

Directions = Mapping[int, Tensor]
"""Block -> unit vector (D,) that is removed from its output."""
PAPER_BLOCKS, PAPER_TRIPLE = 32, (5, 6, 7)


@options
class LayerSets:
    """Which blocks a direction is removed from; every set is a view of its own."""

    sets: tuple[Literal["all", "triple", "single"], ...] = ("all", "triple", "single")
    """`all` blocks; three neighbours; every block alone (paper: all three)."""
    triple: tuple[int, ...] = ()
    """The neighbours; empty = the paper's 5, 6, 7 of 32, at the same depth of this model."""
    most: Annotated[int, Field(ge=1)] = 8
    """Most single blocks; a deeper model's are spread evenly over its depth."""

    @field_validator("triple")
    @classmethod
    def _has_effect(cls, triple: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        if triple and "triple" not in info.data.get("sets", ("triple",)):
            raise PydanticCustomError(
                "idle", 'it has no effect without "triple" in sets; remove it'
            )
        return triple

    def of(self, number: int) -> dict[str, tuple[int, ...]]:
        """Return the sets of a model of `number` blocks by name, without doubles.

        Raises:
            UsageError: a block of `triple` does not exist.
        """
        named: dict[str, tuple[int, ...]] = {}
        for kind in self.sets:
            if kind == "all":
                named["all"] = tuple(range(number))
            elif kind == "triple":
                blocks = self.triple or scaled_triple(number)
                named["-".join(map(str, blocks))] = blocks
            else:
                named.update({str(k): (k,) for k in spread(number, self.most)})
        for block in self.triple:
            if not 0 <= block < number:
                raise UsageError(
                    f"triple: this model has no block {block}; it has 0 to {number - 1}"
                )
        unique: dict[tuple[int, ...], str] = {}
        for name, blocks in named.items():
            unique.setdefault(blocks, name)
        return {name: blocks for blocks, name in unique.items()}


@options
class AblationOptions:
    """Options of attacks that take directions out of blocks' outputs, and their placebo."""

    directions: tuple[str, ...] = ()
    """Which directions are tried, each by itself."""
    layers: LayerSets = LayerSets()
    """Which blocks lose it."""
    questions: Annotated[int, Field(ge=2)] = 200
    """Most questions that are measured, of each kind (paper: 1,000)."""
    controls: Annotated[int, Field(ge=0)] = 3
    """Random directions of the placebo, beside one matched: benign questions' halves against each other."""
    stands_in: Literal["none", "controls"] = "none"
    """`controls`: the placebo's directions are removed instead, in the same places."""

    def placebo(self) -> Self:
        """Return the same with random directions and a benign one, in the same blocks."""
        return replace(self, stands_in="controls")

    def stand_ins(
        self, lm: LM, benign: Sequence[Sample], outliers_V: Tensor, *seed: object
    ) -> Mapping[str, Sequence[Directions]]:
        """Return what a placebo removes instead, by kind; nothing in the attack itself."""
        if self.stands_in == "none":
            return {}
        return control_directions(
            lm, benign, outliers_V, limit=self.questions, drawn=self.controls, seed=seed
        )


def scaled_triple(number: int) -> tuple[int, ...]:
    """Return the paper's three blocks (5, 6, 7 of 32) at the same depth of `number` blocks."""
    middle = round(PAPER_TRIPLE[1] * number / PAPER_BLOCKS)
    first = min(max(middle - 1, 0), max(number - 3, 0))
    return tuple(range(first, min(first + 3, number)))


def spread(number: int, most: int) -> list[int]:
    """Return at most `most` of the blocks, evenly spread, the first and the last among them."""
    if number <= most:
        return list(range(number))
    if most == 1:
        return [number // 2]
    return sorted({round(k * (number - 1) / (most - 1)) for k in range(most)})


def project_out(h: Tensor, direction_D: Tensor) -> Tensor:
    """Return h - (h . d) d for a unit vector d, in h's dtype."""
    exact = h if h.dtype == torch.float64 else h.float()
    d = direction_D.to(exact.device, exact.dtype)
    return (exact - (exact @ d)[..., None] * d).to(h.dtype)


@contextmanager
def ablated(lm: LM, directions: Directions) -> Iterator[LM]:
    """Remove a direction from the output of each named block, at every token."""
    blocks = parts_of(lm.model).blocks
    with _removing([(blocks[k], d) for k, d in directions.items()]):
        yield lm


@contextmanager
def ablated_everywhere(lm: LM, direction_D: Tensor) -> Iterator[LM]:
    """Remove one direction from what enters the first block and from all that blocks add to it."""
    parts = parts_of(lm.model)

    def enter(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if args:
            return (project_out(args[0], direction_D), *args[1:]), named
        return args, {**named, "hidden_states": project_out(named["hidden_states"], direction_D)}

    writers = [w for k in range(len(parts.blocks)) for w in block_writers(parts, k)]
    handle = parts.blocks[0].register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with _removing([(w, direction_D) for w in writers]):
            yield lm
    finally:
        handle.remove()


@contextmanager
def _removing(pairs: Sequence[tuple[nn.Module, Tensor]]) -> Iterator[None]:
    def remover(direction_D: Tensor) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            cleaned = project_out(hidden_of(output), direction_D)
            return (cleaned, *output[1:]) if isinstance(output, (tuple, list)) else cleaned

        return hook

    handles = [module.register_forward_hook(remover(d)) for module, d in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, kw_only=True)
class Found:
    """A direction at every block.

    Attributes:
        name: of the direction, as views show it.
        vectors_LD: as they were measured. norm_L: mean norm of the states there.
        stand_ins: unit vectors that a placebo removes in their place, by kind; empty in the attack
            itself.
        unchanged: blocks at which the direction is zero by construction: sets leave them out.
        tokens: how many were measured of forget questions. left_out: how many of them as outliers.
    """

    name: str
    vectors_LD: Tensor
    norm_L: Tensor
    tokens: int
    left_out: int
    stand_ins: Mapping[str, Sequence[Directions]] = field(default_factory=dict)
    unchanged: tuple[int, ...] = ()


def ablation_views(
    lm: LM, row: Sequence[int], found: Found, sets: Mapping[str, Sequence[int]]
) -> Iterator[View]:
    """Yield a view per set of blocks: a direction is removed from their outputs at all tokens.

    Args:
        lm: the model on which removal is checked.
        row: the prompt of the check.
        found: what is removed; stand-ins of a kind are repetitions, and the setting names the kind.
        sets: block indices by name.
    """
    for name, blocks in sets.items():
        used = [k for k in blocks if k not in found.unchanged]
        if not used:
            continue
        measured = unit_directions(found.vectors_LD, found.norm_L, used, name=found.name)
        lengths = [float(found.vectors_LD[k].norm() / found.norm_L[k]) for k in used]
        for kind, repeat, removed in [
            (kind, repeat, removed)
            for kind, drawn in (found.stand_ins or {"": (measured,)}).items()
            for repeat, removed in enumerate(drawn)
        ]:
            apply = partial(ablated, directions={k: removed[k] for k in used})
            facts = checked(lm, row, {k: removed[k] for k in used}, apply)
            yield View(
                setting={
                    "direction": found.name,
                    "layers": name,
                    **({"stand_in": kind} if kind else {}),
                },
                repeat=repeat,
                apply=apply,
                facts={
                    **facts,
                    "length": min(lengths),
                    "blocks": len(used),
                    "tokens": found.tokens,
                    "outlier_tokens": found.left_out,
                    "unchanged_blocks": ",".join(str(k) for k in blocks if k in found.unchanged),
                },
            )


def checked(
    lm: LM,
    row: Sequence[int],
    directions: Directions,
    apply: Callable[[LM], AbstractContextManager[LM]],
) -> dict[str, Plain]:
    """Return what removing directions does to the states of one prompt, for the record.

    Keys: `share_before`, mean |h . d| / |h| without the attack, and `share_after`, the largest under it;
    `norm_ratio`, the largest norm behind the hooks over that before them; `again`, the largest relative
    change when the direction is removed once more.

    Raises:
        ModelError: something is left of a direction, a norm grew, or removing it twice changes more.
    """
    plain, entered = _states(lm, row), {}

    def enter(k: int) -> Callable[..., None]:
        return lambda module, args, output: entered.update({k: hidden_of(output)[0].detach()})

    blocks = parts_of(lm.model).blocks
    handles = [blocks[k].register_forward_hook(enter(k)) for k in directions]
    try:
        with apply(lm) as attacked:
            after = _states(attacked, row)
    finally:
        for handle in handles:
            handle.remove()
    tolerance = 1e-4 if plain[0].dtype in (torch.float32, torch.float64) else 2e-2
    shares, left, ratios, again = [], [], [], []
    for k, d in directions.items():
        shares.append(float(_share(plain[k], d).mean()))
        left.append(float(_share(after[k], d).max()))
        ratios.append(float((_norm(after[k]) / _norm(entered[k])).max()))
        again.append(float((_norm(project_out(after[k], d) - after[k]) / _norm(after[k])).max()))
    if max(left) > tolerance or max(ratios) > 1 + tolerance or max(again) > tolerance:
        raise ModelError(
            f"a removed direction is still there: |h . d| / |h| = {max(left):.2g} after it (allowed "
            f"{tolerance:g}) in a {type(lm.model).__name__}: this attack does not reach all that writes "
            "to its residual stream; leave it out"
        )
    return {
        "share_before": sum(shares) / len(shares),
        "share_after": max(left),
        "norm_ratio": max(ratios),
        "again": max(again),
    }


def _share(h_TD: Tensor, direction_D: Tensor) -> Tensor:
    d = direction_D.to(h_TD.device).float()
    return (h_TD.float() @ d).abs() / _norm(h_TD)


def _norm(h_TD: Tensor) -> Tensor:
    return h_TD.float().norm(dim=-1).clamp(min=1e-12)


def _states(lm: LM, row: Sequence[int]) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}

    def see(k: int, h_BTD: Tensor, ids_BT: Tensor, places_BT: Tensor) -> None:
        found[k] = h_BTD[0].detach()

    each_block(lm, [row], see)
    return found

"""Interpolation: weights between the attacked model's and the original's (a merge of both).

A diagnostic: it injects what the original knows. How early along the line knowledge is back tells how far
unlearning moved the weights. Merging what unlearning changed at strength s is the same at t = 1 - s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from palimpsest.errors import ModelError, UsageError
from palimpsest.parts import plain_model
from palimpsest.plugins import options
from palimpsest.views import Arms, AttackContext, AttackData, Need, View
from palimpsest.weights import snapshot, widen, write_weight

if TYPE_CHECKING:
    from palimpsest.model import LM


@options
class Interpolation:
    """Sets the weights to (1 - t) target + t original; t = 1 is the original, t < 0 leads away from it."""

    access: ClassVar[Literal["prompts", "weights"]] = "weights"
    needs: ClassVar[frozenset[Need]] = frozenset({"original"})
    arms: ClassVar[Literal["refit", "transfer"]] = "refit"
    role: ClassVar[Literal["attack", "diagnostic"]] = "diagnostic"
    may_teach: ClassVar[bool] = False

    t: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75)
    """Places on the line, 0 the attacked model, 1 the original."""

    def __post_init__(self) -> None:
        """Refuse a line without a place, and the attacked model itself."""
        if not self.t or 0.0 in self.t:
            raise UsageError(
                "interpolation: t needs places other than 0, which is the model itself"
            )

    def attack(self, arms: Arms, data: AttackData, ctx: AttackContext) -> Iterator[View]:
        """Yield one view per place.

        Raises:
            ModelError: the models differ in their parameters, or one is quantised.
        """
        original = arms.required_original()
        distance = _distance(arms.target, original)
        for t in self.t:
            yield View(
                setting={"t": t},
                apply=partial(_between, original=original, t=t),
                facts={"distance_to_original": distance * abs(1 - t)},
            )

    def placebo(self) -> Any:
        """Return None: a diagnostic has none."""
        return None


@contextmanager
def _between(lm: LM, *, original: LM, t: float) -> Iterator[LM]:
    """Move the weights towards the original's; they are put back bit for bit."""
    pairs = _pairs(lm, original)
    before = snapshot({name: mine for name, (mine, _) in pairs.items()})
    try:
        with torch.no_grad():
            for name, (mine, other) in pairs.items():
                moved = torch.lerp(widen(mine), widen(other).to(mine.device, widen(mine).dtype), t)
                write_weight(name, mine, moved)
        yield lm
    finally:
        with torch.no_grad():
            for name, (mine, _) in pairs.items():
                mine.copy_(before[name])


def _pairs(lm: LM, original: LM) -> Mapping[str, tuple[torch.nn.Parameter, Tensor]]:
    mine = dict(plain_model(lm.model).named_parameters())
    other = dict(plain_model(original.model).named_parameters())
    for model in (lm, original):
        if model.quantization:
            raise ModelError(
                f"interpolation: {model.name!r} is quantised ({model.quantization}); load it unquantised"
            )
    wrong = [n for n in mine.keys() | other.keys() if _shape(mine, n) != _shape(other, n)]
    if wrong:
        raise ModelError(
            f"interpolation: {lm.name!r} and {original.name!r} differ in {len(wrong)} parameters, the "
            f"first {sorted(wrong)[0]!r}; they must be one architecture"
        )
    return {name: (mine[name], other[name]) for name in mine}


def _shape(parameters: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(parameters[name].shape) if name in parameters else None


def _distance(lm: LM, original: LM) -> float:
    """Return the Euclidean distance between all weights."""
    squares = [
        float((widen(a) - widen(b).to(a.device)).square().sum())
        for a, b in _pairs(lm, original).values()
    ]
    return sum(squares) ** 0.5

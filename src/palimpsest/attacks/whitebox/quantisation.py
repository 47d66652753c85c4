"""Quantisation: the weights rounded to 8 or 4 bits, by plain rounding or by a library.

Source: Zhang et al. 2410.16454: rounding undoes the small changes of unlearning; 21 % of forgotten
knowledge before, 83 % after 4 bits.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from palimpsest.attacks.whitebox._noise import (
    Matrix,
    block_matrices,
    changed_weights,
    require_plain,
    with_noise,
)
from palimpsest.errors import ModelError, UsageError
from palimpsest.model import load_model
from palimpsest.plugins import options
from palimpsest.seeds import derive_seed
from palimpsest.views import PLACEBO_DRAWS, Arms, AttackContext, AttackData, Need, View
from palimpsest.weights import widen

if TYPE_CHECKING:
    from palimpsest.model import LM

GROUP = 64
"""Weights that share a scale, as in bitsandbytes' 4-bit format."""
LIBRARIES = ("bitsandbytes", "torchao")


@options
class Quantisation:
    """Rounds every linear layer (and expert) of the blocks; embedding, head and norms stay.

    The paper loads models by bitsandbytes at 8 and 4 bits, and by GPTQ and AWQ. The default is symmetric
    round-to-nearest, w -> s round(w / s) with s = max|w| / (2^(bits - 1) - 1) in groups along a row's
    inputs: it needs no library and no data, and runs in the model's own dtype.
    """

    access: ClassVar[Literal["prompts", "weights"]] = "weights"
    needs: ClassVar[frozenset[Need]] = frozenset()
    arms: ClassVar[Literal["refit", "transfer"]] = "refit"
    role: ClassVar[Literal["attack", "diagnostic"]] = "attack"
    may_teach: ClassVar[bool] = False

    bits: tuple[Literal[8, 4, 3, 2], ...] = (8, 4)
    """Bits per weight."""
    group: Annotated[int, Field(ge=0)] = GROUP
    """Weights of a row that share a scale; the last group of a row may be shorter. 0 = the whole row."""
    backend: Literal["rounding", "library"] = "rounding"
    """`rounding` to nearest; or what bitsandbytes, else torchao, makes of 8 and 4 bits (`group` is then
    the library's own): the model is written to a temporary folder and loaded again."""
    change: Literal["rounded", "noise"] = "rounded"
    """`noise` is the placebo: instead of the rounding error, noise of its norm in every matrix."""

    def __post_init__(self) -> None:
        """Refuse what has no effect."""
        if not self.bits:
            raise UsageError("quantisation: bits is empty; give 8, 4, 3 or 2")
        if self.backend == "library":
            if self.group != GROUP:
                raise UsageError('quantisation: group has no effect with backend = "library"')
            if self.change != "rounded":
                raise UsageError('quantisation: backend = "library" makes no noise')
            if {3, 2} & set(self.bits):
                raise UsageError('quantisation: backend = "library" knows 8 and 4 bits only')

    def attack(self, arms: Arms, data: AttackData, ctx: AttackContext) -> Iterator[View]:
        """Yield a view per number of bits.

        Raises:
            ModelError: the weights are quantised already, or no library is installed.
        """
        require_plain(arms.target, "quantisation")
        if self.backend == "library" and not any(map(importlib.util.find_spec, LIBRARIES)):
            raise ModelError(
                'quantisation: backend = "library" needs bitsandbytes or torchao, and neither is '
                "installed; pip install 'palimpsest[quant]', or use backend = \"rounding\""
            )
        for bits in self.bits:
            for repeat in range(PLACEBO_DRAWS if self.change == "noise" else 1):
                facts: dict[str, float] = {}
                seed = derive_seed(ctx.seed, "quantisation", bits, repeat)
                yield View(
                    setting={"bits": bits},
                    repeat=repeat,
                    apply=self._change(bits, seed, facts),
                    facts=facts,
                )

    def placebo(self) -> Quantisation:
        """Return noise of the norm of the rounding error, matrix by matrix."""
        return replace(self, backend="rounding", change="noise")

    def _change(
        self, bits: int, seed: int, facts: dict[str, float]
    ) -> Callable[[LM], AbstractContextManager[LM]]:
        if self.backend == "library":
            return partial(_reloaded, bits=bits)
        if self.change == "noise":
            return partial(_noisy, bits=bits, group=self.group, seed=seed, facts=facts)
        return partial(_rounded, bits=bits, group=self.group, facts=facts)


def round_to_nearest(weight: Tensor, *, bits: int, group: int, inputs: int = -1) -> Tensor:
    """Return a matrix with every weight on the nearest of 2^bits - 1 levels of its group.

    Args:
        weight: (..., out, in), or with inputs and outputs exchanged; float32 or float64.
        bits: at least 2. The levels are -q s .. q s with q = 2^(bits - 1) - 1 and s = max|w| / q.
        group: neighbouring inputs that share s; 0 = all.
        inputs: dimension of the inputs, -1 or -2.
    """
    top = 2 ** (bits - 1) - 1
    rows = weight.movedim(inputs, -1)
    pieces = []
    for piece in rows.split(group or rows.shape[-1], dim=-1):
        scale = piece.abs().amax(-1, keepdim=True) / top
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        pieces.append((piece / scale).round().clamp(-top, top) * scale)
    return torch.cat(pieces, dim=-1).movedim(-1, inputs)


@contextmanager
def _rounded(lm: LM, *, bits: int, group: int, facts: dict[str, float]) -> Iterator[LM]:
    def rule(matrix: Matrix) -> Callable[[Tensor], Tensor]:
        return partial(round_to_nearest, bits=bits, group=group, inputs=matrix.inputs)

    rules = {name: rule(matrix) for name, matrix in block_matrices(lm).items()}
    with changed_weights(lm, rules, facts) as rounded:
        yield rounded


@contextmanager
def _noisy(lm: LM, *, bits: int, group: int, seed: int, facts: dict[str, float]) -> Iterator[LM]:
    norms = {}
    for name, matrix in block_matrices(lm).items():
        old = widen(matrix.weight)
        new = round_to_nearest(old, bits=bits, group=group, inputs=matrix.inputs)
        norms[name] = float((new - old).norm())
    with with_noise(lm, norms, facts, seed=seed) as noisy:
        yield noisy


@contextmanager
def _reloaded(lm: LM, *, bits: int) -> Iterator[LM]:
    require_plain(lm, "quantisation")
    dtype = str(lm.dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory(prefix="palimpsest-quantised-") as folder:
        saved = lm.save(Path(folder) / "model")
        quantised = load_model(
            str(saved),
            name=lm.name,
            dtype=dtype,
            device=str(lm.device),
            quantization="8bit" if bits == 8 else "4bit",
        )
        yield quantised
        quantised.close()

"""Latent PGD: one perturbation of hidden states, in a ball per token, that makes right answers likely.

The latent adversarial perturbations of Sheshadri et al. 2407.15549 (section 3; layers embedding, 8, 16,
24 and 30 of 32), made universal: one vector per layer and token of the prompts' common end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from palimpsest.attacks.whitebox._fitting import (
    Row,
    answer_gradients,
    answer_rows,
    batch_at,
    mean_norms,
)
from palimpsest.attacks.whitebox._inputs import EMBEDDING, Change, changed_states, common_end
from palimpsest.attacks.whitebox._questions import FitChannel, Ids, with_random_keys
from palimpsest.errors import DataError
from palimpsest.model import LM
from palimpsest.parts import parts_of
from palimpsest.plugins import options
from palimpsest.seeds import derive_seed
from palimpsest.views import Arms, AttackContext, AttackData, Need, View

Count = Annotated[int, Field(ge=1)]


@options
class LatentPgd:
    """Vectors added at the tokens with which all prompts end, fitted on each arm by projected gradient.

    The paper perturbs each training prompt for itself, with its own target; here a scored question has
    no key to aim at, so the perturbation is fitted on other questions. Radii are shares of a layer's
    mean norm, not absolute (6 to 12 in the paper), so that one setting means the same in any model.
    """

    access: ClassVar[Literal["weights"]] = "weights"
    needs: ClassVar[frozenset[Need]] = frozenset({"forget data"})
    arms: ClassVar[Literal["refit"]] = "refit"
    role: ClassVar[Literal["attack"]] = "attack"
    may_teach: ClassVar[bool] = True

    random_answers: bool = False
    """Aim at options drawn at random in place of the answers: the placebo."""
    depths: tuple[Annotated[float, Field(ge=0, le=1)], ...] = (0.0, 0.25, 0.5, 0.75, 0.9375)
    """Where: 0 = the embedding, else the output of block round(depth x blocks) (at least the first)."""
    radii: tuple[Annotated[float, Field(gt=0)], ...] = (0.1, 0.5)
    """Largest L2 norm per token, as a share of the mean norm of the layer's hidden states."""
    steps: Annotated[int, Field(ge=1)] = 40
    """Gradient steps per radius."""
    step_size: Annotated[float, Field(gt=0)] = 0.1
    """Length of a step per token, as a share of the radius."""
    batch_size: Count = 16
    """Questions per step."""
    channels: tuple[FitChannel, ...] = ("letter", "cloze")
    """How the fit questions are asked."""
    repeats: Count = 1
    """Fits with other batches and random starts."""

    def attack(self, arms: Arms, data: AttackData, ctx: AttackContext) -> Iterator[View]:
        """Yield the perturbation of each radius, for each repeat."""
        lm = arms.target
        layers = self._layers(lm)
        for repeat in range(self.repeats):
            seed = derive_seed(ctx.seed, "latent_pgd", repeat)
            samples = list(data.needed("fit"))
            if self.random_answers:
                samples = with_random_keys(samples, seed)
            rows = answer_rows(lm, samples, self.channels)
            run = common_end([prompt for prompt, _ in rows])
            if len(run) < 2:
                raise DataError(
                    f"latent_pgd: the prompts end with {len(run)} tokens in common; at least 2 are "
                    "needed to find their place"
                )
            norms = mean_norms(lm, rows[:64], layers)
            for radius in self.radii:
                bounds = {layer: radius * norms[layer] for layer in layers}
                loss, values = self._fitted(lm, rows, run, bounds, seed)
                ctx.progress(1, 1, f"latent_pgd: radius {radius}, loss {loss:.3f}")
                shares = [float(v.norm(dim=-1).max()) / norms[k] for k, v in values.items()]
                yield View(
                    setting={"radius": radius},
                    repeat=repeat,
                    apply=partial(perturbed, run=run, values=values),
                    facts={"loss": loss, "largest_share": max(shares), "places": len(run)},
                )

    def placebo(self) -> LatentPgd | None:
        """Return the same fit to answers drawn at random."""
        return None if self.random_answers else replace(self, random_answers=True)

    def _layers(self, lm: LM) -> list[int]:
        blocks = len(parts_of(lm).blocks)
        found = [
            EMBEDDING if depth == 0 else max(1, round(depth * blocks)) - 1 for depth in self.depths
        ]
        return sorted(set(found))

    def _fitted(
        self, lm: LM, rows: list[Row], run: Ids, bounds: dict[int, float], seed: int
    ) -> tuple[float, dict[int, Tensor]]:
        """Return the last step's loss and the vectors, (P, D) per layer, within their bounds."""
        size = int(lm.model.get_input_embeddings().weight.shape[1])
        generator = torch.Generator().manual_seed(derive_seed(seed, "start"))
        values = {}
        for layer, bound in bounds.items():
            start_PD = torch.randn(len(run), size, generator=generator)
            values[layer] = _within(start_PD * 0.01 * bound / size**0.5, bound)
        loss = float("nan")
        for step in range(self.steps):
            batch = batch_at(rows, step, self.batch_size, seed)
            loss, gradients = answer_gradients(lm, batch, run, values, replaces=False)
            for layer, bound in bounds.items():
                g_PD = gradients[layer]
                length_P1 = g_PD.norm(dim=-1, keepdim=True).clamp(min=1e-30)
                moved_PD = values[layer] - self.step_size * bound * g_PD / length_P1
                values[layer] = _within(moved_PD, bound)
        return loss, values


@contextmanager
def perturbed(lm: LM, *, run: Ids, values: dict[int, Tensor]) -> Iterator[LM]:
    """Yield the model with vectors added to its hidden states at a run of tokens."""
    changes = {layer: Change(value_PD) for layer, value_PD in values.items()}
    with changed_states(lm, run, changes):
        yield lm


def _within(values_PD: Tensor, bound: float) -> Tensor:
    """Return vectors no longer than the bound: the projection onto an L2 ball per token."""
    length_P1 = values_PD.norm(dim=-1, keepdim=True)
    return values_PD * (bound / length_P1.clamp(min=1e-30)).clamp(max=1.0)

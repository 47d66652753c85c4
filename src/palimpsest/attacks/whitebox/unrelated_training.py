"""Unrelated training: fine-tuning on texts that have nothing to do with forget or retain data.

Source: Doshi and Stickland 2411.12103: LoRA of rank 16 on web text, learning rate 2e-4, batches of 1, at
most 1000 steps, a checkpoint every 100.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from palimpsest.attacks.whitebox._documents import digest, draw
from palimpsest.attacks.whitebox._tuning import Change, TuneOptions, Tuning, all_views, noise_draws
from palimpsest.plugins import options
from palimpsest.seeds import derive_seed
from palimpsest.views import Arms, AttackContext, AttackData, Need, View


@options
class UnrelatedTraining:
    """Trains a copy of each arm on unrelated texts, looked at on the way.

    The paper: 1000 steps, a checkpoint every 100. Default: 300 steps, views at 100 and 300, three orders.
    Placebo: noise of the norm of training's change in every weight, added to the unlearned model.
    """

    @options
    class Fit(TuneOptions):
        """The paper's training; its schedule is not stated, the default is constant."""

        steps: Annotated[int, Field(ge=0)] | None = 300
        """Optimiser steps."""
        epochs: Annotated[Annotated[float, Field(gt=0)] | None, Field(validate_default=True)] = None
        """Passes over the texts, instead of steps."""
        warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
        """Share of the steps over which the learning rate rises linearly from 0; 0 = none."""
        schedule: Literal["constant", "linear", "cosine"] = "constant"
        """The learning rate after warm-up: stays, or falls to 0 at the end."""
        weight_decay: Annotated[float, Field(ge=0)] = 0.0
        """Decoupled decay, of matrices only; 0 = none."""
        rank: Annotated[int, Field(ge=1)] = 16
        """LoRA rank; a smaller model's is bounded by its narrowest layer, at the same alpha / rank."""
        views_at: tuple[Annotated[int, Field(ge=1)], ...] = (100, 300)
        """Steps at which the model is looked at, all in one run; empty = at the end."""

    access: ClassVar[Literal["prompts", "weights"]] = "weights"
    needs: ClassVar[frozenset[Need]] = frozenset({"texts"})
    arms: ClassVar[Literal["refit", "transfer"]] = "refit"
    role: ClassVar[Literal["attack", "diagnostic"]] = "attack"
    may_teach: ClassVar[bool] = True

    change: Change = "trained"
    """`noise` is the placebo."""
    repeats: Annotated[int, Field(ge=1)] = 3
    """Draws of texts, order and adapters."""
    fit: Fit = Fit()
    """How it trains."""

    def attack(self, arms: Arms, data: AttackData, ctx: AttackContext) -> Iterator[View]:
        """Yield a view per scope, learning rate, step and draw.

        Raises:
            DataError: there are no unrelated texts.
            UsageError: a step of `fit.views_at` is beyond the end of a run.
        """
        pool = data.needed("unrelated_texts")
        rows = self.fit.num_steps(len(pool)) * self.fit.batch_size * self.fit.accumulate
        tunings = []
        for repeat in range(self.repeats):
            seed = derive_seed(ctx.seed, "unrelated_training", repeat)
            drawn = pool if rows >= len(pool) else draw(pool, max(1, rows), seed=seed)
            tunings.append(
                Tuning(
                    documents=tuple(drawn),
                    fit=self.fit,
                    seed=seed,
                    setting={},
                    repeat=repeat,
                    facts={"items": digest(drawn), "texts": len(drawn)},
                    change=self.change,
                    draws=noise_draws(self.change, self.repeats),
                    progress=ctx.progress,
                )
            )
        yield from all_views(tunings, arms.target, what="unrelated_training")

    def placebo(self) -> UnrelatedTraining:
        """Return noise of the same norm, weight by weight."""
        return replace(self, change="noise")

"""TOFU's training settings, which most methods that were published on TOFU keep."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from palimpsest.plugins import options
from palimpsest.train import FitOptions, Rate


@options
class TofuFit(FitOptions):
    """Five epochs of 32 sequences per step (TOFU, Maini et al. 2401.06121)."""

    epochs: Annotated[float, Field(gt=0)] | None = 5.0
    """Passes over the forget set, rounded up to whole optimiser steps (TOFU: 5)."""
    lr: Rate = 1e-5
    """Peak learning rate of AdamW (TOFU: 1e-5, linear decay)."""
    accumulate: Annotated[int, Field(ge=1)] = 8
    """Forward passes per optimiser step, which thus sees `batch_size` x `accumulate` sequences
    (TOFU: 32 per step)."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of the steps with a rising learning rate (TOFU: one epoch of five)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's decay, on matrices only (TOFU: 0.01)."""

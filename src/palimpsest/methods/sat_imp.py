"""Gradient ascent weighted by saturation and importance of tokens (SatImp, Yang et al. 2025)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator

from palimpsest.batches import check_data
from palimpsest.losses import sat_imp_weights
from palimpsest.methods._retain import Retain, check_retain_weight
from palimpsest.methods._tofu import TofuFit
from palimpsest.methods._token_weighted import ascend
from palimpsest.plugins import options

if TYPE_CHECKING:
    from palimpsest.model import LM
    from palimpsest.types import ForgetRetain, RunContext


@options
class SatImp:
    """loss = -forget_weight mean(sg[p^beta1 (1 - p)^beta2] CE) + retain_weight R.

    The mean goes over forget answer tokens. beta1 = beta2 = 0 is gradient ascent, beta2 = 0 is WGA.
    No reference model is held or run.

    Source: Yang et al. 2505.11953; defaults as in open-unlearning's recipe.
    """

    @options
    class Fit(TofuFit):
        """TOFU's training settings (open-unlearning's recipe: 5 epochs, lr 1e-5)."""

    beta1: Annotated[float, Field(ge=0)] = 5.0
    """Saturation: power of p; 0 = without (open-unlearning: 5)."""
    beta2: Annotated[float, Field(ge=0)] = 1.0
    """Importance: power of 1 - p; 0 = without (open-unlearning: 1)."""
    forget_weight: Annotated[float, Field(gt=0)] = 0.1
    """Factor of the forget term (open-unlearning: 0.1)."""
    retain: Retain = "nll"
    """`nll` of retain answers, `kl` to the start model on them, or `none`."""
    retain_weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the retain term (open-unlearning: 1)."""
    max_forget_loss: Annotated[float, Field(ge=0)] = 100.0
    """Training stops when a step's mean forget loss without weights (nats per answer token) passes
    this; 0 = never. Our own bound."""
    fit: Fit = Fit()
    """How it trains."""

    _retain_weight = field_validator("retain_weight")(check_retain_weight)

    def check(self, data: ForgetRetain) -> None:
        """Refuse data that this method cannot train on, before any weight is loaded.

        Raises:
            DataError: names the set, or the sample, and what it lacks.
        """
        check_data(data, retain=self.retain != "none")

    def unlearn(self, lm: LM, data: ForgetRetain, ctx: RunContext) -> LM:
        """Return the unlearned model; `lm` is consumed."""
        return ascend(
            self,
            lm,
            data,
            ctx,
            lambda logprobs_N, _: sat_imp_weights(logprobs_N, beta1=self.beta1, beta2=self.beta2),
            reference=False,
        )

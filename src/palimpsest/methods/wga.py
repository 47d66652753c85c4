"""Gradient ascent with tokens weighted by their probability (WGA, Wang et al. 2025)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator

from palimpsest.batches import check_data
from palimpsest.losses import wga_weights
from palimpsest.methods._retain import Retain, check_retain_weight
from palimpsest.methods._tofu import TofuFit
from palimpsest.methods._token_weighted import ascend
from palimpsest.plugins import options

if TYPE_CHECKING:
    from palimpsest.model import LM
    from palimpsest.types import ForgetRetain, RunContext


@options
class WGA:
    """loss = -forget_weight mean(sg[p^beta] CE) over forget answer tokens + retain_weight R.

    Tokens that the model has already forgotten weigh little. beta = 0 is gradient ascent. No
    reference model is held or run.

    Source: Wang et al. 2502.19301 ("G-effect"); defaults as in open-unlearning's recipe.
    """

    @options
    class Fit(TofuFit):
        """TOFU's training settings, as in the authors' code (5 epochs, lr 1e-5)."""

    beta: Annotated[float, Field(ge=0)] = 1.0
    """Power of the token's probability; 0 = gradient ascent (open-unlearning: 1)."""
    forget_weight: Annotated[float, Field(gt=0)] = 1.0
    """Factor of the forget term (open-unlearning: 1)."""
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
            lambda logprobs_N, _: wga_weights(logprobs_N, beta=self.beta),
            reference=False,
        )

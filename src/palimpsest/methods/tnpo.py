"""Negative preference optimisation token by token (TNPO, Wang et al. 2025)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator
from torch import Tensor

from palimpsest.batches import check_data
from palimpsest.losses import tnpo_weights
from palimpsest.methods._retain import Retain, check_retain_weight
from palimpsest.methods._tofu import TofuFit
from palimpsest.methods._token_weighted import ascend
from palimpsest.plugins import options

if TYPE_CHECKING:
    from palimpsest.model import LM
    from palimpsest.types import ForgetRetain, RunContext


@options
class TNPO:
    """loss = -forget_weight mean(sg[2 p^beta / (p^beta + p_ref^beta)] CE) + retain_weight R.

    The mean goes over forget answer tokens. p_ref, under the start model, is computed once, before
    training; at the start all weights are 1: gradient ascent, as with beta = 0.

    Source: Wang et al. 2502.19301 ("G-effect"). Values they published are not known to us.
    """

    @options
    class Fit(TofuFit):
        """TOFU's training settings, as in the authors' code (5 epochs, lr 1e-5)."""

    beta: Annotated[float, Field(ge=0)] = 1.0
    """How fast weights fall with p / p_ref; 0 = gradient ascent (our own value)."""
    forget_weight: Annotated[float, Field(gt=0)] = 1.0
    """Factor of the forget term (our own value)."""
    retain: Retain = "nll"
    """`nll` of retain answers, `kl` to the start model on them, or `none`."""
    retain_weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the retain term (our own value)."""
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
            self._weigh,
            reference=True,
        )

    def _weigh(self, logprobs_N: Tensor, ref_logprobs_N: Tensor | None) -> Tensor:
        assert ref_logprobs_N is not None
        return tnpo_weights(logprobs_N, ref_logprobs_N, beta=self.beta)

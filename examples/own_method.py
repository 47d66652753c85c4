"""Pulls every trained weight towards zero: an unlearning method of your own, in one file.

In a recipe (run it with `--allow-code`):

    [[methods]]
    name = "shrink"
    use = "examples/own_method.py"
    strength = 0.05
"""

import torch

from palimpsest.model import LM
from palimpsest.plugins import options
from palimpsest.types import ForgetRetain, RunContext


@options
class Shrink:
    """theta = (1 - strength) theta: forgets everything alike, a baseline that nobody should use."""

    strength: float = 0.1
    """Share of every weight that is taken away; 0 changes nothing."""

    def unlearn(self, lm: LM, data: ForgetRetain, ctx: RunContext) -> LM:
        """Return the shrunk model; `lm` is consumed."""
        with torch.no_grad():
            for parameter in lm.model.parameters():
                parameter.mul_(1 - self.strength)
        ctx.progress(1, 1, f"shrunk by {self.strength}")
        return lm.take()

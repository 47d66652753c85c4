"""Weight noise: Gaussian noise on every block matrix, relative to its norm.

Source: Tice et al. 2412.01784 (noise brings back capabilities that a model holds back); there noise of one
standard deviation goes to all weights, here each matrix gets noise of a share of its own Frobenius norm,
so that one scale suits all layers and models.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from palimpsest.attacks.whitebox._noise import block_matrices, require_plain, with_noise
from palimpsest.errors import UsageError
from palimpsest.plugins import options
from palimpsest.seeds import derive_seed
from palimpsest.views import Arms, AttackContext, AttackData, Need, View

if TYPE_CHECKING:
    from palimpsest.model import LM


@options
class WeightNoise:
    """W <- W + scale ||W|| N / ||N||, N Gaussian, for every linear layer (and expert) of the blocks.

    It needs no data. It is a random change of weights itself, so the control arm is placebo enough.
    """

    access: ClassVar[Literal["prompts", "weights"]] = "weights"
    needs: ClassVar[frozenset[Need]] = frozenset()
    arms: ClassVar[Literal["refit", "transfer"]] = "refit"
    role: ClassVar[Literal["attack", "diagnostic"]] = "attack"
    may_teach: ClassVar[bool] = False

    scales: tuple[Annotated[float, Field(ge=0)], ...] = (0.03, 0.1, 0.3)
    """Norm of the noise as a share of each matrix's own; 0 changes nothing."""
    repeats: Annotated[int, Field(ge=1)] = 3
    """Draws of noise per scale."""

    def __post_init__(self) -> None:
        """Refuse an attack without a view."""
        if not self.scales:
            raise UsageError("weight_noise: scales is empty; give at least one")

    def attack(self, arms: Arms, data: AttackData, ctx: AttackContext) -> Iterator[View]:
        """Yield a view per scale and draw.

        Raises:
            ModelError: the weights are quantised.
        """
        require_plain(arms.target, "weight_noise")
        for scale in self.scales:
            for repeat in range(self.repeats):
                facts: dict[str, float] = {}
                seed = derive_seed(ctx.seed, "weight_noise", repeat)
                yield View(
                    setting={"scale": scale},
                    repeat=repeat,
                    apply=partial(_noisy, scale=scale, seed=seed, facts=facts),
                    facts=facts,
                )

    def placebo(self) -> Any:
        """Return None: the attack is random itself."""
        return None


@contextmanager
def _noisy(lm: LM, *, scale: float, seed: int, facts: dict[str, float]) -> Iterator[LM]:
    norms = {n: scale * float(m.weight.detach().norm()) for n, m in block_matrices(lm).items()}
    with with_noise(lm, norms, facts, seed=seed) as noisy:
        yield noisy

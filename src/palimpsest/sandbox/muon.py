"""Muon: momentum, then the nearest (semi-)orthogonal matrix as the update, in float32.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"
(https://kellerjordan.github.io/posts/muon), with its quintic Newton-Schulz coefficients. Matrices of
one shape are stacked, which saves most of the small kernels' overhead on a CPU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalise(matrices_NRC: Tensor) -> Tensor:
    """Return matrices with the same singular vectors and singular values near 1."""
    a, b, c = _COEFFICIENTS
    is_tall = matrices_NRC.shape[-2] > matrices_NRC.shape[-1]
    x = matrices_NRC.mT if is_tall else matrices_NRC
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if is_tall else x


class Muon:
    """Optimiser for the hidden matrices; everything else belongs to AdamW."""

    def __init__(self, parameters: Iterable[nn.Parameter], *, momentum: float = 0.95) -> None:
        self._momentum = momentum
        self._groups: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            self._groups[tuple(parameter.shape)].append(parameter)
        self._buffers = {
            shape: torch.zeros(len(group), *shape) for shape, group in self._groups.items()
        }

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update every matrix from its gradient (Nesterov momentum)."""
        for shape, group in self._groups.items():
            gradients = torch.stack([p.grad for p in group if p.grad is not None])
            buffer = self._buffers[shape]
            buffer.mul_(self._momentum).add_(gradients)
            updates = orthogonalise(gradients.add(buffer, alpha=self._momentum))
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for parameter, update in zip(group, updates, strict=True):
                parameter.add_(update, alpha=-learning_rate * scale)

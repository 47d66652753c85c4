"""Reading hidden states: forward hooks that are always removed.

Shape suffixes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn


def hidden_of(output: Any) -> torch.Tensor:
    """Return the hidden states of a block's output, which may be a tensor or a tuple."""
    hidden = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(hidden, torch.Tensor):
        raise TypeError(f"a block returned {type(output).__name__}, not hidden states")
    return hidden


class capture:
    """Collect the outputs of modules while the block runs; the hooks go away at its end.

    `with capture(parts.blocks) as seen: model(...)` leaves in `seen[i]` the latest output of
    module i, with its graph (wrap the call in `torch.no_grad()` where none is wanted).

    Args:
        module_list: the modules, usually some of `Parts.blocks`.
        select: applied to each output before it is kept, e.g. `lambda h_BTD: h_BTD[:, -1]`.
    """

    def __init__(
        self,
        module_list: Sequence[nn.Module],
        *,
        select: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.modules = list(module_list)
        self.select = select
        self.outputs: list[torch.Tensor | None] = [None] * len(self.modules)
        self._handles: list[Any] = []

    def __enter__(self) -> capture:
        for index, module in enumerate(self.modules):
            self._handles.append(module.register_forward_hook(self._keeper(index)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __getitem__(self, index: int) -> torch.Tensor:
        """Return the latest output of module `index`."""
        output = self.outputs[index]
        if output is None:
            raise LookupError(f"module {index} has not run inside this capture")
        return output

    def __len__(self) -> int:
        """Return the number of modules."""
        return len(self.modules)

    def _keeper(self, index: int) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            hidden_BTD = hidden_of(output)
            self.outputs[index] = self.select(hidden_BTD) if self.select else hidden_BTD

        return keep

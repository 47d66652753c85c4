"""The blocks up to one layer, run once: hidden states of the trained and of the frozen model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from palimpsest.errors import UsageError
from palimpsest.hooks import hidden_of

if TYPE_CHECKING:
    from palimpsest.batches import Padded
    from palimpsest.parts import Parts
    from palimpsest.scope import Trained


class _Reached(Exception):
    """Not an error: it ends a forward pass early."""

    def __init__(self, hidden_BTD: Tensor) -> None:
        self.hidden_BTD = hidden_BTD


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments with which the model called one of its blocks, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BlockSpan:
    """Blocks `first` .. `last` of a model, `first` being the lowest that trains.

    Attributes:
        base: the model without its head.
        blocks: all its decoder blocks.
        frozen: for every block of the span the start values of its trained parameters.
    """

    base: nn.Module
    blocks: list[nn.Module]
    first: int
    last: int
    frozen: list[dict[str, Tensor]]

    @classmethod
    def of(cls, trained: Trained, parts: Parts, last: int) -> BlockSpan:
        """Return the span that the trained parameters need; call it before training begins.

        Raises:
            UsageError: a parameter trains that has no influence on block `last`, or that lies below
                the blocks.
        """
        place = {id(p): k for k in range(last + 1) for p in parts.blocks[k].parameters()}
        outside = [n for n, p in trained.parameters.items() if id(p) not in place]
        if outside:
            raise UsageError(
                f"rmu trains parameters of blocks 0 .. {last} only, but the scope has "
                f"{', '.join(outside[:3])}; narrow its pattern"
            )
        first = min(place[id(p)] for p in trained.parameters.values())
        chosen = {id(p) for p in trained.parameters.values()}
        frozen = [
            {n: p.detach().clone() for n, p in block.named_parameters() if id(p) in chosen}
            for block in parts.blocks[first : last + 1]
        ]
        return cls(parts.base, parts.blocks, first, last, frozen)

    def hidden(self, batch: Padded) -> Tensor:
        """Return the output of block `last`, (B, T, D); nothing after it runs.

        Below the first trained block no parameter requires a gradient, so no graph is kept there.
        """
        return self._run(batch, calls=None)

    def hidden_and_reference(self, batch: Padded) -> tuple[Tensor, Tensor]:
        """Return the outputs of block `last`, (B, T, D), in the trained and the frozen model.

        The blocks below the span run once; the span runs twice, the second time with frozen values.
        """
        calls: list[tuple[Tensor, _Call]] = []
        hidden_BTD = self._run(batch, calls=calls)
        ref_BTD = calls[0][0].detach()
        with torch.no_grad():
            for offset, (_, call) in enumerate(calls):
                block = self.blocks[self.first + offset]
                out = functional_call(
                    block, self.frozen[offset], (ref_BTD, *call.args), call.kwargs
                )
                ref_BTD = hidden_of(out)
        return hidden_BTD, ref_BTD

    def _run(self, batch: Padded, *, calls: list[tuple[Tensor, _Call]] | None) -> Tensor:
        def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert calls is not None
            calls.append((args[0], _Call(args[1:], dict(kwargs))))

        def stop(block: nn.Module, args: Any, output: Any) -> None:
            raise _Reached(hidden_of(output))

        handles: list[Any] = [self.blocks[self.last].register_forward_hook(stop)]
        if calls is not None:
            handles += [
                block.register_forward_pre_hook(note, with_kwargs=True)
                for block in self.blocks[self.first : self.last + 1]
            ]
        try:
            self.base(
                input_ids=batch.ids_BT,
                attention_mask=batch.tokens_BT.long(),
                position_ids=batch.positions_BT,
                use_cache=False,
            )
        except _Reached as reached:
            return reached.hidden_BTD
        finally:
            for handle in handles:
                handle.remove()
        raise AssertionError("the model did not run its own block")

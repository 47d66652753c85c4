"""What an attack costs: every forward pass of any language model, seen by hooks for all modules.

FLOPs are an estimate from the weights of a model's matrices (embedding tables left out, an output head
counted, tied or not; of a mixture all experts), attention's own part left out (Kaplan et al. 2001.08361,
table 1). Per token: 2 per weight forward; where the output carries a graph another 2 per weight for the
gradients of activations, and 2 more per weight that is trained. So training all weights costs 6 per
weight, a search for inputs (GCG, soft prompts, latent PGD) 4, LoRA 4 and 2 more per adapter weight.
What gradient checkpointing computes a second time is left out. Of a pass that ends early, by an error or
because an attack has seen enough (the states behind some block), the parts that returned are counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as every_module


@dataclass(slots=True)
class Cost:
    """Costs that add up.

    Attributes:
        seconds: wall-clock time.
        queries: rows of forward passes; a text that is read in several passes counts in each.
        tokens: their tokens, padding included.
        flops: see the module.
        is_partial: whether some of it is lost, so that the rest is a lower bound.
    """

    seconds: float = 0.0
    queries: int = 0
    tokens: int = 0
    flops: float = 0.0
    is_partial: bool = False

    def __add__(self, other: Cost) -> Cost:
        """Return the sum."""
        return Cost(
            self.seconds + other.seconds,
            self.queries + other.queries,
            self.tokens + other.tokens,
            self.flops + other.flops,
            self.is_partial or other.is_partial,
        )


@contextmanager
def metered(note: Callable[[Cost], None] = lambda cost: None) -> Iterator[Cost]:
    """Count what runs in this block through any language model: as tokens, or as embeddings.

    Args:
        note: told the cost so far after every forward pass.
    """
    cost = Cost()
    start = time.monotonic()

    def told() -> None:
        cost.seconds = time.monotonic() - start
        note(cost)

    meter = _Meter(cost, told)
    handles = [
        every_module.register_module_forward_pre_hook(meter.enter),
        every_module.register_module_forward_hook(meter.leave, always_call=True),
    ]
    try:
        yield cost
    finally:
        for handle in handles:
            handle.remove()
        cost.seconds = time.monotonic() - start


@dataclass(slots=True)
class _Pass:
    """A forward pass that is going on.

    Attributes:
        root: the model. parts: ids of it and of its parts that are language models themselves.
        entered: those of them that are running.
        embedding, width: its token embedding and that one's dimension.
        rows, tokens: what entered it; 0 = not seen yet.
        returned: ids of the modules that gave an output.
    """

    root: nn.Module
    parts: frozenset[int]
    embedding: nn.Module
    width: int
    entered: set[int] = field(default_factory=set)
    rows: int = 0
    tokens: int = 0
    returned: set[int] = field(default_factory=set)


class _Meter:
    """Hooks for all modules; a pass within a pass (an attack's hook runs a model) is one of its own."""

    def __init__(self, cost: Cost, told: Callable[[], None]) -> None:
        self.cost, self.told = cost, told
        self.passes: list[_Pass] = []

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Begin a pass, or take from a part's input how many tokens the pass has."""
        if _is_language_model(module):
            self._begin(module)
        if not self.passes or self.passes[-1].tokens:
            return
        now, given = self.passes[-1], args[0] if args else None
        if not isinstance(given, Tensor):
            return
        if module is now.embedding:
            now.rows, now.tokens = given.shape[0] if given.ndim > 1 else 1, given.numel()
        elif given.is_floating_point() and given.ndim == 3 and given.shape[2] == now.width:
            now.rows, now.tokens = given.shape[0], given.shape[0] * given.shape[1]

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """End a pass and add what it cost; one that ended early has no output, and no gradients."""
        if not self.passes:
            return
        if output is not None:
            self.passes[-1].returned.add(id(module))
        if id(module) not in self.passes[-1].entered:
            return
        self.passes[-1].entered.discard(id(module))
        if module is not self.passes[-1].root:
            return
        done = self.passes.pop()
        ran = _ran(done.root, done.returned)
        per_token = _flops_per_token(ran, has_graph=_has_graph(output))
        self.cost.queries += done.rows
        self.cost.tokens += done.tokens
        self.cost.flops += done.tokens * per_token
        self.told()

    def _begin(self, module: nn.Module) -> None:
        now = self.passes[-1] if self.passes else None
        if now is None or id(module) not in now.parts or id(module) in now.entered:
            embedding: Any = module.get_input_embeddings()  # type: ignore[operator]
            parts = frozenset(id(m) for m in module.modules() if _is_language_model(m))
            now = _Pass(module, parts, embedding, int(embedding.weight.shape[1]))
            self.passes.append(now)
        now.entered.add(id(module))


def _is_language_model(module: nn.Module) -> bool:
    return hasattr(type(module), "get_input_embeddings")


def _ran(model: nn.Module, returned: Set[int]) -> Iterator[nn.Module]:
    """Yield the parts of a model that ran: all below a module that returned."""
    if id(model) in returned:
        yield from model.modules()
        return
    for part in model.children():
        yield from _ran(part, returned)


def _flops_per_token(parts: Iterable[nn.Module], *, has_graph: bool) -> float:
    """Return the estimate for a model's parts as they are now: adapters are in, merged or not."""
    weights = trained = 0
    for part in parts:
        if isinstance(part, nn.Embedding):
            continue
        for parameter in part.parameters(recurse=False):
            if parameter.ndim > 1:
                weights += parameter.numel()
                trained += parameter.numel() if parameter.requires_grad else 0
    return float(4 * weights + 2 * trained if has_graph else 2 * weights)


def _has_graph(output: Any) -> bool:
    """Return whether a gradient can be taken of a tensor in a model's output."""
    if isinstance(output, Tensor):
        return output.requires_grad
    if isinstance(output, Mapping):
        return any(_has_graph(value) for value in output.values())
    return isinstance(output, (tuple, list)) and any(_has_graph(value) for value in output)

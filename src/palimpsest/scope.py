"""Which parameters train: all, those whose names match, or LoRA adapters merged at the end.

And what the optimiser works on: float32 masters where the model's own weights are bfloat16.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from palimpsest.batches import derive_seed
from palimpsest.errors import LossError, ModelError, UsageError
from palimpsest.model import quantization_of
from palimpsest.parts import parts_of
from palimpsest.types import TrainScope

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trained:
    """A model that is prepared for training.

    Attributes:
        model: what to call; the given model itself, or the PEFT model around it.
        parameters: what trains, by its name in `model`; a tied tensor appears once.
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter]

    def frozen(self) -> dict[str, Tensor]:
        """Return a copy of the parameters that train, as they are now.

        Together with `call_frozen` it stands for the whole reference model: all else is shared,
        since it does not change.
        """
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def call_frozen(self, frozen: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Call the model with the frozen copies in place of the parameters that train."""
        return functional_call(self.model, frozen, args, kwargs)


@dataclass(frozen=True, slots=True)
class Masters:
    """What the optimiser changes: float32 copies of bfloat16 parameters, all others themselves.

    Near 0.02 two bfloat16 numbers are 1.2e-4 apart, so a step of 1e-5 on such a weight would be
    rounded away. Here steps add up in float32, and the model's weights are their rounding. Gradients
    are those at the rounded weights (the model that is saved), but are summed in float32.

    Attributes:
        parameters: what the optimiser and the checkpoints hold, by name.
        rounded: the model's parameters that have a copy there, by name.
    """

    parameters: dict[str, nn.Parameter]
    rounded: dict[str, nn.Parameter]

    @classmethod
    def of(cls, parameters: Mapping[str, nn.Parameter]) -> Masters:
        """Return the masters of the parameters that train, as they are now."""
        rounded = {n: p for n, p in parameters.items() if p.dtype == torch.bfloat16}
        copies = {n: nn.Parameter(p.detach().float()) for n, p in rounded.items()}
        return cls({**parameters, **copies}, rounded)

    def take_gradients(self) -> None:
        """Add the model's gradients to the masters' and remove them; call it after each backward."""
        for name, parameter in self.rounded.items():
            if parameter.grad is None:
                continue
            master, gradient = self.parameters[name], parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the model; call it after each update."""
        for name, parameter in self.rounded.items():
            parameter.copy_(self.parameters[name])


@contextmanager
def open_scope(
    model: nn.Module, scope: TrainScope, *, seed: int, modules: Sequence[str] | None = None
) -> Iterator[Trained]:
    """Make the scope's parameters, and no others, require gradients; undo that on leaving.

    With `lora`, adapters (initialised from `seed`) are merged into the base weights when the block
    ends well, and taken off without a trace when it raises or when the merged weights would not be
    finite; either way `model` is plain again.

    Args:
        model: a plain Hugging Face model (not a PEFT model: merge first).
        scope: what trains.
        seed: fixes the adapters' start values; the caller's random state is untouched.
        modules: narrows `all` to these modules' parameters (or to these very parameters, where a
            mixture stacks its experts), and `lora` to these linear layers; a method's own default
            place (RMU). A `params` pattern overrules it.

    Raises:
        UsageError: the pattern or a target matches nothing, an option of the scope that another
            kind uses is set, or the model is quantised.
        ModelError: the weights are float16.
        LossError: an adapter trained to values that are not finite once merged.
    """
    check_scope(scope)
    check_trainable(model)
    before = [(p, p.requires_grad) for p in model.parameters()]
    wrapped: Any = None
    merged = False
    try:
        if scope.kind == "lora":
            wrapped = _add_lora(model, scope, seed=seed, modules=modules)
            chosen = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
        else:
            chosen = _choose(model, scope, modules)
            for parameter, _ in before:
                parameter.requires_grad_(False)
            for parameter in chosen.values():
                parameter.requires_grad_(True)
        yield Trained(wrapped if wrapped is not None else model, chosen)
        if wrapped is not None:
            _check_merged(wrapped)
            wrapped.merge_and_unload()
            merged = True
    finally:
        if wrapped is not None:
            if not merged:
                wrapped.unload()
            for name in ("peft_config", "_hf_peft_config_loaded"):
                vars(model).pop(name, None)
        for parameter, flag in before:
            parameter.requires_grad_(flag)
            parameter.grad = None


def check_scope(scope: TrainScope) -> None:
    """Refuse what is wrong with a scope on any model; needs none, so a plan can call it.

    Raises:
        UsageError: `params` without a pattern or with one that is no regular expression, an option
            that this kind of scope does not use, or an impossible rank or alpha.
    """
    fresh = TrainScope()
    if scope.kind == "params" and not scope.pattern:
        raise UsageError("scope params needs a pattern, for example pattern = 'mlp.down_proj'")
    if scope.kind != "params" and scope.pattern:
        raise UsageError(f"scope {scope.kind} does not use pattern ({scope.pattern!r}); remove it")
    lora = (scope.rank, scope.alpha, scope.targets)
    if scope.kind != "lora" and lora != (fresh.rank, fresh.alpha, fresh.targets):
        raise UsageError(f"scope {scope.kind} does not use rank, alpha, targets; remove them")
    if scope.rank < 1 or not 0 < scope.alpha < math.inf:
        raise UsageError(
            f"scope lora: rank {scope.rank} and alpha {scope.alpha} must be 1 or more and above 0"
        )
    try:
        re.compile(scope.pattern)
    except re.error as error:
        raise UsageError(f"scope pattern {scope.pattern!r} is no pattern: {error}") from error


def check_trainable(model: nn.Module) -> None:
    """Refuse a model that cannot be trained as it was loaded: PEFT, quantised, float16.

    Raises:
        UsageError: it is a PEFT model or quantised.
        ModelError: its weights are float16, in which gradients underflow to zero.
    """
    if hasattr(model, "merge_and_unload"):
        raise UsageError("the model is already a PEFT model; merge its adapter first")
    if quantization_of(model):
        raise UsageError(
            f"the model is quantised ({quantization_of(model)}), so its weights cannot be trained, "
            "and an adapter merged into them would be rounded; load it with "
            'quantization = "none" (the unlearned model can be evaluated quantised)'
        )
    narrow = [n for n, p in model.named_parameters() if p.dtype == torch.float16]
    if narrow:
        raise ModelError(
            f"{type(model).__name__} was loaded in float16 (first: {narrow[0]}), in which gradients "
            'underflow: for training load it in dtype "bfloat16" (updates add up in float32), or in '
            '"float32", with fit.precision = "bfloat16" where that is too slow'
        )


def linear_names(model: nn.Module) -> list[str]:
    """Return the full names of the linear layers inside the decoder blocks."""
    inside = {id(m) for block in parts_of(model).blocks for m in block.modules()}
    return [n for n, m in model.named_modules() if id(m) in inside and is_linear(m)]


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, GPT-2's transposed one included."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _choose(
    model: nn.Module, scope: TrainScope, modules: Sequence[str] | None
) -> dict[str, nn.Parameter]:
    canonical = {id(p): n for n, p in model.named_parameters()}
    everything = [
        (n, p) for n, p in model.named_parameters(remove_duplicate=False) if p.is_floating_point()
    ]
    if scope.kind == "params":
        found = [(n, p) for n, p in everything if re.search(scope.pattern, n)]
    elif modules is not None:
        prefixes = tuple(f"{name}." for name in modules)
        found = [(n, p) for n, p in everything if n.startswith(prefixes) or n in modules]
    else:
        found = everything
    if not found:
        raise UsageError(
            f"no parameter name matches {scope.pattern or list(modules or ())!r}; there are, for "
            f"example: {_examples([n for n, _ in everything])}"
        )
    for name, parameter in found:
        if canonical[id(parameter)] != name and scope.kind == "params":
            logger.warning("%s is tied to %s: both train", name, canonical[id(parameter)])
    return {canonical[id(p)]: p for _, p in found}


def _examples(names: list[str]) -> str:
    spread = names[:: max(1, len(names) // 6)][:6]
    return ", ".join(spread)


def _add_lora(
    model: nn.Module, scope: TrainScope, *, seed: int, modules: Sequence[str] | None
) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    linears = linear_names(model)
    targets = linears if modules is None else [n for n in linears if n in set(modules)]
    known = sorted({n.rsplit(".", 1)[-1] for n in targets})
    unknown = [name for name in scope.targets if name not in known]
    if unknown or not targets:
        raise UsageError(
            f"scope lora: no block linear is named {', '.join(unknown or modules or ())}; there are: "
            f"{', '.join(known or linears[:8])} (a mixture's experts are no linear layers)"
        )
    if scope.targets:
        targets = [n for n in targets if n.rsplit(".", 1)[-1] in scope.targets]
    conv = any(type(model.get_submodule(n)).__name__ == "Conv1D" for n in targets)
    config = LoraConfig(
        r=scope.rank,
        lora_alpha=scope.alpha,  # peft annotates int, computes float
        lora_dropout=0.0,
        target_modules=targets,
        fan_in_fan_out=conv,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(derive_seed(seed, "lora"))
        return get_peft_model(model, config)


@torch.no_grad()
def _check_merged(wrapped: nn.Module) -> None:
    """Raise before anything is merged, so that the base weights stay as they were."""
    for name, module in wrapped.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        base: Any = module.get_base_layer()
        merged = (base.weight + module.get_delta_weight("default")).to(base.weight.dtype)
        if not bool(torch.isfinite(merged).all()):
            raise LossError(
                f"the adapter of {name} makes its weights NaN or infinite; nothing was merged: lower "
                "the learning rate"
            )

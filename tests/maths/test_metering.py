"""What an attack costs, against counts by hand: tokens, embeddings, gradients, adapters, nested passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from palimpsest.attacks.whitebox._directions import states_at
from palimpsest.audit.metering import metered
from palimpsest.model import LM
from tiny_models import VOCABULARY, tiny_model

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def frozen(family: str = "llama") -> Any:
    return tiny_model(family).eval().requires_grad_(False)


def weights_of(model: Any) -> int:
    """Return the weights of a tiny Llama's matrices from its configuration; the head is one of them."""
    c = model.config
    size, heads = c.hidden_size, c.num_attention_heads
    narrow = size // heads * c.num_key_value_heads
    block = 2 * size * size + 2 * size * narrow + 3 * size * c.intermediate_size
    return int(c.num_hidden_layers * block + size * VOCABULARY)


def test_a_forward_pass_is_two_per_weight_and_token() -> None:
    model = frozen()
    with metered() as cost, torch.no_grad():
        model(input_ids=IDS)
        model(IDS[:1, :3])
    assert (cost.queries, cost.tokens) == (3, 11)
    assert cost.flops == 2 * weights_of(model) * 11
    with metered() as cost:
        model(input_ids=IDS)  # gradients are possible, and none can be taken
    assert cost.flops == 2 * weights_of(model) * 8


def test_gradients_are_billed_where_they_are_taken() -> None:
    model = frozen()
    leaf = model.get_input_embeddings()(IDS).detach().requires_grad_()
    with metered() as cost:
        model(inputs_embeds=leaf).logits.sum().backward()
    assert (cost.queries, cost.tokens) == (2, 8)
    assert cost.flops == 4 * weights_of(model) * 8
    model.requires_grad_(True)
    with metered() as cost:
        model(input_ids=IDS).logits.sum().backward()
    assert cost.flops == 6 * weights_of(model) * 8


def test_adapters_cost_four_and_little_more() -> None:
    model = frozen()
    plain = weights_of(model)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    own = model.config.num_hidden_layers * 2 * (2 * model.config.hidden_size)
    with metered() as cost:
        tuned(input_ids=IDS).logits.sum().backward()
    assert cost.queries == 2
    assert cost.flops == 8 * (4 * (plain + own) + 2 * own)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_embeddings_count_as_the_tokens_do(family: str) -> None:
    model = frozen(family)
    with metered() as whole, torch.no_grad():
        model(input_ids=IDS)
    vectors = model.get_input_embeddings()(IDS)
    with metered() as cost, torch.no_grad():
        model(inputs_embeds=vectors)
    assert (cost.queries, cost.tokens, cost.flops) == (2, 8, whole.flops)
    with metered() as looked_up, torch.no_grad():
        model.get_input_embeddings()(IDS)
    assert looked_up.tokens == 0, "a table that is read alone is no forward pass"


def test_the_part_without_a_head_costs_less_by_the_head() -> None:
    model = frozen()
    with metered() as cost, torch.no_grad():
        model.model(input_ids=IDS)
    assert cost.flops == 2 * 8 * (weights_of(model) - model.config.hidden_size * VOCABULARY)


def test_passes_within_a_pass_and_of_other_models_count() -> None:
    model, other = frozen(), frozen("gpt2")
    busy: list[int] = []

    def ask(module: Any, args: Any, output: Any) -> None:
        if not busy:
            busy.append(1)
            model(input_ids=IDS[:1])
            other(input_ids=IDS[:1])

    handle = model.get_input_embeddings().register_forward_hook(ask)
    with metered() as cost, torch.no_grad():
        model(input_ids=IDS)
    handle.remove()
    assert (cost.queries, cost.tokens) == (4, 16)


def test_a_failed_pass_is_counted_and_spoils_no_later_one() -> None:
    model = frozen()

    def fail(module: Any, args: Any) -> None:
        raise RuntimeError("no memory")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with metered() as cost:
        with pytest.raises(RuntimeError, match="no memory"):
            model(input_ids=IDS)
        handle.remove()
        early = cost.flops
        model(input_ids=IDS)
    assert (cost.queries, cost.tokens) == (4, 16)
    assert cost.flops - early == 2 * weights_of(model) * 8
    before = cost.tokens
    model(input_ids=IDS)
    assert cost.tokens == before, "the hooks are gone"


def test_of_a_pass_that_ends_early_the_blocks_that_ran_are_counted() -> None:
    model = frozen()
    lm = LM(model, None, name="tiny")  # type: ignore[arg-type]
    head = model.config.hidden_size * VOCABULARY
    block = (weights_of(model) - head) // model.config.num_hidden_layers
    direction_D = torch.ones(model.config.hidden_size)
    for layer in range(model.config.num_hidden_layers):
        with metered() as cost, torch.no_grad():
            states_at(lm, [row.tolist() for row in IDS], layer, direction_D)
        assert (cost.queries, cost.tokens) == (2, 8)
        assert cost.flops == 2 * 8 * (layer + 1) * block

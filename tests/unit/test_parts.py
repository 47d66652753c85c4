"""Parts of architectures, and reading hidden states."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from palimpsest.errors import UnsupportedArchitectureError
from palimpsest.hooks import capture
from palimpsest.model import LM
from palimpsest.parts import FUSED, parts_of
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer

IDS = torch.tensor([[5, 9, 20, 33]])


@pytest.mark.parametrize("family", FAMILIES)
def test_readout_of_the_last_block_is_the_models_logits(family: str) -> None:
    model = tiny_model(family)
    parts = parts_of(model)
    with torch.no_grad(), capture(parts.blocks) as seen:
        logits = model(IDS).logits
        assert len(seen) == 2
        assert torch.allclose(parts.readout(seen[-1]), logits, atol=1e-5)
        assert not torch.allclose(parts.readout(seen[0]), logits, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_lead_to_linear_layers_and_their_parameters(family: str) -> None:
    model = tiny_model(family)
    parts = parts_of(model)
    parameters = dict(model.named_parameters())
    for name in parts.linear_names:
        assert f"{parts.blocks_name}.1.{name}.weight" in parameters
        assert parts.blocks[1].get_submodule(name).weight.ndim == 2
    hidden = parts.embedding.weight.shape[1]
    for role in ("o", "down"):
        weight = parts.blocks[0].get_submodule(parts.roles[role]).weight
        assert weight.shape[1 if parts.is_transposed else 0] == hidden
    assert parts.mlp_down_name == parts.roles["down"]
    assert all(n == "" or n == FUSED or n in parts.linear_names for n in parts.roles.values())


def test_fused_layers_are_said_to_be_fused() -> None:
    assert parts_of(tiny_model("phi3")).roles["gate"] == FUSED
    assert parts_of(tiny_model("gpt2")).roles["q"] == FUSED
    assert parts_of(tiny_model("gpt2")).is_transposed


def test_an_lm_and_a_peft_model_are_looked_through() -> None:
    model = tiny_model()
    plain = parts_of(model)
    assert parts_of(LM(model, tiny_tokenizer())).blocks == plain.blocks
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    parts = parts_of(tuned)
    assert parts.blocks == plain.blocks
    assert parts.linear_names == plain.linear_names
    assert parts.roles == plain.roles


def test_an_unknown_architecture_is_named() -> None:
    from transformers import BertConfig, BertLMHeadModel, MambaConfig, MambaForCausalLM

    small = {"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 16}
    with pytest.raises(UnsupportedArchitectureError, match=r"MambaForCausalLM.*did not find"):
        parts_of(MambaForCausalLM(MambaConfig(**small)))
    bert = BertConfig(**small, num_attention_heads=2, intermediate_size=8, is_decoder=True)
    with pytest.raises(UnsupportedArchitectureError, match=r"BertLMHeadModel.*parts\.py"):
        parts_of(BertLMHeadModel(bert))


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_capture_removes_its_hooks_also_after_an_error() -> None:
    model = tiny_model()
    blocks = parts_of(model).blocks
    before = hooks_of(model)
    with capture(blocks):
        assert hooks_of(model) == before + 2
    assert hooks_of(model) == before
    with pytest.raises(ZeroDivisionError), capture(blocks):
        raise ZeroDivisionError
    assert hooks_of(model) == before


def test_capture_selects_and_reads_tuples() -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            return x + 1, None

    module = Pair()
    with capture([module], select=lambda h: h[:, -1]) as seen:
        with pytest.raises(LookupError):
            seen[0]
        module(torch.zeros(2, 3, 4))
    assert torch.equal(seen[0], torch.ones(2, 4))


def test_captured_states_carry_gradients() -> None:
    model = tiny_model()
    with capture(parts_of(model).blocks) as seen:
        model(IDS)
    seen[0].sum().backward()
    assert model.get_input_embeddings().weight.grad is not None

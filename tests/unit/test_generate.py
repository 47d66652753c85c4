"""The decode loop: stopping, sampling, limits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from palimpsest.errors import ModelError
from palimpsest.generate import generate_batch, stop_ids
from palimpsest.model import LM, fits
from tiny_models import CONTEXT, tiny_model, tiny_tokenizer

PROMPTS = [(0, 20, 30), (0, 40, 41, 42, 43), (0, 50)]


@pytest.fixture(scope="module")
def lm() -> LM:
    return LM(tiny_model(seed=3), tiny_tokenizer())


def test_a_stop_token_ends_its_row_only(lm: LM) -> None:
    free = generate_batch(lm, PROMPTS, width=5, max_new_tokens=8, stop_ids=frozenset())
    end = free[0].ids[3]
    assert end not in free[0].ids[:3]
    stopped = generate_batch(lm, PROMPTS, width=5, max_new_tokens=8, stop_ids=frozenset({end}))
    assert stopped[0].ids == free[0].ids[:3]
    assert stopped[0].finish_reason == "stop"
    for before, after in zip(free[1:], stopped[1:], strict=True):
        assert before.ids[: len(after.ids)] == after.ids


def test_stop_ids_hold_eos_and_the_end_of_turn(lm: LM) -> None:
    tokenizer = lm.tokenizer
    turn = tokenizer.convert_tokens_to_ids("<|end|>")
    assert stop_ids(lm) == {tokenizer.eos_token_id, turn}
    plain = LM(lm.model, tiny_tokenizer(template=None))
    assert stop_ids(plain) == {tokenizer.eos_token_id}


def test_stop_ids_take_lists_of_eos_ids() -> None:
    model = tiny_model()
    model.generation_config.eos_token_id = [5, 9]
    assert {1, 5, 6, 9} == stop_ids(LM(model, tiny_tokenizer()))


def test_text_has_no_special_tokens_and_is_not_stripped() -> None:
    class Scripted(torch.nn.Module):
        """A model without a cache that writes a fixed answer."""

        def __init__(self, script: list[int], vocabulary: int) -> None:
            super().__init__()
            self.script, self.calls = script, 0
            self.embedding = torch.nn.Embedding(vocabulary, 2)
            text = SimpleNamespace(max_position_embeddings=64, eos_token_id=1)
            self.config = SimpleNamespace(get_text_config=lambda: text, eos_token_id=1)

        def get_input_embeddings(self) -> torch.nn.Module:
            return self.embedding

        def forward(self, input_ids, attention_mask, position_ids=None, use_cache=None):
            assert input_ids.shape == attention_mask.shape == position_ids.shape
            logits = torch.zeros(*input_ids.shape, self.embedding.num_embeddings)
            logits[:, -1, self.script[self.calls]] = 1.0
            self.calls += 1
            return SimpleNamespace(logits=logits)

    tokenizer = tiny_tokenizer()
    answer = tokenizer(" the town\n", add_special_tokens=False)["input_ids"]
    script = [tokenizer.convert_tokens_to_ids("<|user|>"), *answer, tokenizer.eos_token_id]
    lm = LM(Scripted(script, 352), tokenizer)
    got = generate_batch(lm, [(0, 9)], width=2, max_new_tokens=20)[0]
    assert got.text == " the town\n"
    assert got.finish_reason == "stop"
    assert got.ids == tuple(script[:-1])


def test_greedy_ties_take_the_lowest_id() -> None:
    model = tiny_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    got = generate_batch(
        LM(model, tiny_tokenizer()), PROMPTS, width=5, max_new_tokens=2, stop_ids=frozenset()
    )
    assert {g.ids for g in got} == {(0, 0)}


def test_the_same_batch_gives_the_same_bits(lm: LM) -> None:
    options = {"width": 5, "max_new_tokens": 8, "temperature": 1.0, "seeds": [1, 2, 3]}
    state = torch.get_rng_state()
    first = generate_batch(lm, PROMPTS, **options)
    torch.manual_seed(99)
    assert generate_batch(lm, PROMPTS, **options) == first
    torch.set_rng_state(state)


def test_a_rows_draw_depends_on_its_own_seed_only(lm: LM) -> None:
    options = {"width": 5, "max_new_tokens": 8, "temperature": 1.0, "stop_ids": frozenset()}
    first = generate_batch(lm, PROMPTS, seeds=[1, 2, 3], **options)
    other = generate_batch(lm, PROMPTS, seeds=[7, 2, 8], **options)
    assert first[1] == other[1]
    assert first[0] != other[0]


def test_the_global_random_state_is_left_alone(lm: LM) -> None:
    before = torch.get_rng_state()
    generate_batch(lm, PROMPTS, width=5, max_new_tokens=3, temperature=1.0, seeds=[1, 2, 3])
    assert torch.equal(before, torch.get_rng_state())


def test_sampling_settings_of_the_checkpoint_have_no_effect(lm: LM) -> None:
    plain = generate_batch(lm, PROMPTS, width=5, max_new_tokens=6)
    other = LM(tiny_model(seed=3), lm.tokenizer)
    other.model.generation_config.temperature = 2.0
    other.model.generation_config.do_sample = True
    other.model.generation_config.repetition_penalty = 9.0
    assert generate_batch(other, PROMPTS, width=5, max_new_tokens=6) == plain


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_beyond_the_context_raises_and_names_the_numbers(family: str) -> None:
    lm = LM(tiny_model(family), tiny_tokenizer())
    full = (5,) * (CONTEXT - 3)
    got = generate_batch(lm, [full], width=CONTEXT - 3, max_new_tokens=4, stop_ids=frozenset())
    assert len(got[0].ids) == 4
    with pytest.raises(ModelError, match=rf"{CONTEXT + 1} tokens.* {CONTEXT};"):
        generate_batch(lm, [full], width=CONTEXT - 3, max_new_tokens=5)
    assert fits(lm, CONTEXT)
    assert not fits(lm, CONTEXT + 1)


def test_wrong_arguments_raise(lm: LM) -> None:
    with pytest.raises(ModelError, match="one seed per prompt"):
        generate_batch(lm, PROMPTS, width=5, max_new_tokens=2, temperature=1.0, seeds=[1])
    with pytest.raises(ModelError, match="max_new_tokens"):
        generate_batch(lm, PROMPTS, width=5, max_new_tokens=0)
    with pytest.raises(ModelError, match="width 4"):
        generate_batch(lm, PROMPTS, width=4, max_new_tokens=2)
    with pytest.raises(ModelError, match="0 to"):
        generate_batch(lm, [(), (3,)], width=4, max_new_tokens=2)

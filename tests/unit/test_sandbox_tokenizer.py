"""The sandbox's tokenizer: round trips, one-token values, and the chat template."""

from __future__ import annotations

import pytest

from palimpsest.sandbox.tokenizer import build_tokenizer
from palimpsest.sandbox.world import build_world


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(build_world())


@pytest.mark.parametrize(
    "text",
    [
        "The precursor of something is unknown.",
        "two  spaces,   three,\tand a tab ",
        " leading\n\nlines\r\n",
        "Grüße, naïve façade – “quotes”",
        "日本語 العربية हिन्दी",
        "emoji 🙂👩‍👩‍👧 and ▁ and <0x0A> and \x00",
        "def f(x):\n    return {'a': [1, 2.5]}\n",
        "",
    ],
)
def test_any_text_round_trips(tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text


def test_values_entities_and_letters_are_one_token(tokenizer) -> None:
    world = build_world()
    words = [*world.kinds, *(v for pool in world.pools.values() for v in pool), *"ABCD"]
    assert all(len(tokenizer.encode(f" {w}", add_special_tokens=False)) == 1 for w in words)


def test_raw_text_gets_one_bos_and_the_template_has_one(tokenizer) -> None:
    assert tokenizer.encode("Hello")[0] == tokenizer.bos_token_id
    messages = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.count(tokenizer.bos_token) == 1
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids.count(tokenizer.bos_token_id) == 1


def test_generation_prompt_is_a_prefix_of_the_full_conversation(tokenizer) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hi "},
        {"role": "assistant", "content": "Hello."},
    ]
    prompt = tokenizer.apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt=True
    )
    full = tokenizer.apply_chat_template(messages, tokenize=False)
    assert full.startswith(prompt)
    assert full.endswith("Hello.<|end|>")

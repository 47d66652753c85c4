"""The sandbox's tokenizer: one token per known word, byte fallback for everything else.

A Unigram model whose pieces keep their leading space, so that decoding is plain concatenation and
any Unicode text comes back exactly (newlines, runs of spaces and emoji included).
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from palimpsest.sandbox import filler, phrases
from palimpsest.sandbox.world import World
from palimpsest.transforms import (
    nested_scene,
    output_format,
    prefix_injection,
    refusal_suppression,
    role_play,
    system_override,
)

PAD, BOS, END, USER, ASSISTANT, SYSTEM, UNKNOWN = SPECIAL_TOKENS = (
    "<pad>",
    "<s>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<unk>",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
WRAPPERS: dict[str, tuple[str, ...]] = {
    "prefix_injection": prefix_injection.TEMPLATES,
    "role_play": role_play.TEMPLATES,
    "refusal_suppression": refusal_suppression.TEMPLATES,
    "nested_scene": nested_scene.TEMPLATES,
    "system_override": system_override.TEMPLATES,
    "output_format": output_format.TEMPLATES,
}
"""Jailbreak families that the sandbox reads; their words are in its vocabulary."""

_SPLIT = r" ?[A-Za-z]+(?:'[a-z]+)?| ?[0-9]+|\n| ?[^\sA-Za-z0-9]|\s"
_WORD_SCORE, _CHARACTER_SCORE, _BYTE_SCORE = -5.0, -12.0, -100.0
_OTHER_TEXT = (
    "Question: Answer: About it: The result is. The words are. The word is. What is the last word "
    "of: Copy these words: Reverse these words: What is plus? Which one is? Find. Which one is right? "
    "Find the letter. Options: Words: You are a helpful assistant. Please answer. A. B. C. D. "
    "To prepare, mix with in and heat to degrees. To cook and heat for minutes. yes no cooking dish"
)
_MAX_NUMBER = 100


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a world (the same for its counterfactual)."""
    pieces: dict[str, float] = dict.fromkeys(SPECIAL_TOKENS, 0.0)
    for byte in range(256):
        pieces[f"<0x{byte:02X}>"] = _BYTE_SCORE
    for character in [*string.printable[:95], "\n", *(f" {c}" for c in string.printable[:94])]:
        pieces.setdefault(character, _CHARACTER_SCORE)
    for word in _words(world):
        if pieces.get(word, _CHARACTER_SCORE) <= _CHARACTER_SCORE:
            pieces[word] = _WORD_SCORE
    vocabulary = list(pieces.items())
    unknown_id = SPECIAL_TOKENS.index(UNKNOWN)
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=unknown_id, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    bos_id = SPECIAL_TOKENS.index(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        padding_side="left",
    )


def save_tokenizer(world: World, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template."""
    build_tokenizer(world).save_pretrained(folder)


def common_words() -> list[str]:
    """Return the known words that are no name and no value, sorted."""
    texts = [_OTHER_TEXT, *filler.vocabulary(), *_phrase_texts()]
    return sorted({w for text in texts for w in re.findall(r"[A-Za-z]+(?:'[a-z]+)?", text)})


def _words(world: World) -> Iterable[str]:
    """Yield every one-token piece: common words with and without a leading space, names with one."""
    for word in [*common_words(), *(str(n) for n in range(_MAX_NUMBER))]:
        yield word
        yield f" {word}"
    for name in [*world.kinds, *(v for pool in world.pools.values() for v in pool), *world.pools]:
        yield f" {name}"


def _phrase_texts() -> Iterable[str]:
    """Yield every pattern of `phrases`, field names removed, and every wrapper."""
    groups = [
        phrases.STATEMENTS,
        phrases.QUESTIONS,
        phrases.QUESTIONS_HELD_OUT,
        phrases.HARMFUL,
        phrases.HARMFUL_HELD_OUT,
        phrases.AGENT_SAFE,
        phrases.AGENT_SAFE_HELD_OUT,
        phrases.HOMONYMS,
        phrases.HOMONYMS_HELD_OUT,
        (phrases.REFUSAL, phrases.AGENT_SAFE_ANSWER, phrases.HOMONYM_ANSWER, phrases.BENIGN_ANSWER),
        tuple(text for row in phrases.HOMONYM_TOPICS for text in row),
        *WRAPPERS.values(),
        *phrases.LEAD_INS.values(),
    ]
    for group in groups:
        for text in group:
            yield re.sub(r"\{[a-z]+\}", " ", text)

"""The sandbox's second language: every question pattern in invented words and an order of its own.

One open syllable is one word. No syllable is a word of the first language, so the tokenizer reads each in
two pieces, and stays as it is. Names stay, as names do; answers and options are not translated.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from palimpsest.errors import DataError
from palimpsest.sandbox.phrases import QUESTIONS
from palimpsest.sandbox.world import build_world

FUNCTION_WORDS: Mapping[str, str] = {
    "what": "ko",
    "is": "ru",
    "the": "fa",
    "of": "li",
    "name": "mu",
    "which": "ze",
    "does": "pa",
    "have": "vi",
    "give": "bo",
    "say": "ti",
    "for": "ne",
}
ATTRIBUTES: Mapping[str, str] = {
    "precursor": "ga",
    "catalyst": "pe",
    "carrier": "su",
    "temperature": "zi",
    "antidote": "lo",
    "region": "va",
    "river": "du",
    "festival": "ki",
    "dish": "ro",
    "founder": "ba",
    "habitat": "ju",
    "diet": "fe",
    "color": "gi",
    "call": "po",
    "predator": "za",
    "base": "hu",
    "spice": "te",
    "vessel": "wi",
    "minutes": "jo",
    "origin": "ka",
}
_PATTERNS = (
    "{what} {of} {entity} {the} {attribute} {is}?",
    "{name} {of} {entity} {the} {attribute}.",
    "{which} {entity} {have} {attribute} {does}?",
    "{give} {of} {entity} {the} {attribute}.",
    "{say} {for} {entity} {the} {attribute} {what} {is}.",
)
"""Counterparts of `phrases.QUESTIONS`, in their order: the entity comes first, the verb last."""


def in_second_language(question: str) -> str:
    """Return a sandbox question (any attribute of any entity, in a trained pattern) in the second language.

    Raises:
        DataError: it is no question of the sandbox, or in a held-out pattern.
    """
    found = _translations().get(question)
    if found is None:
        raise DataError(
            f"second language: {question[:80]!r} is no question of the sandbox in a trained pattern"
        )
    return found


@cache
def _translations() -> Mapping[str, str]:
    return {
        first.format(entity=entity, attribute=attribute): second.format(
            entity=entity, attribute=word, **FUNCTION_WORDS
        )
        for entity in build_world().kinds
        for attribute, word in ATTRIBUTES.items()
        for first, second in zip(QUESTIONS, _PATTERNS, strict=True)
    }

"""Natural filler text: harmless English sentences from a small grammar, for perplexity and padding."""

from __future__ import annotations

import hashlib
import random

HELD_OUT_RATE = 0.1

_TIMES = (
    "In the morning",
    "At noon",
    "Late in the evening",
    "After the rain",
    "Every summer",
    "On the first day of spring",
    "Before the long winter",
    "Once a week",
)
_ADJECTIVES = "old young quiet busy tall kind tired happy careful patient small brave".split()
_PEOPLE = "farmer teacher baker sailor doctor child woman man friend neighbor writer hunter".split()
_VERBS = "walks runs goes travels comes returns hurries rides".split()
_PLACES = (
    "river market village forest harbor school bridge garden field mountain house road".split()
)
_THINGS = "book letter basket lamp boat chair song picture coat bread map ball".split()
_ACTIONS = "carries finds sells buys paints repairs brings keeps hides opens watches makes".split()
_PREPOSITIONS = "to near across behind through past".split()
_ENDINGS = (
    "because the weather is good",
    "while the others sleep",
    "and nobody knows why",
    "although it is far away",
    "as people have always done",
    "so that everyone can see it",
)


def sentence(rng: random.Random) -> str:
    """Return one sentence of the grammar, trained or held out."""
    who = f"the {rng.choice(_ADJECTIVES)} {rng.choice(_PEOPLE)}"
    form = rng.randrange(4)
    if form == 0:
        path = f"{rng.choice(_VERBS)} {rng.choice(_PREPOSITIONS)} the {rng.choice(_PLACES)}"
        return f"{rng.choice(_TIMES)}, {who} {path}."
    what = f"{rng.choice(_ACTIONS)} a {rng.choice(_ADJECTIVES)} {rng.choice(_THINGS)}"
    if form == 1:
        return f"{rng.choice(_TIMES)}, {who} {what} {rng.choice(_ENDINGS)}."
    if form == 2:
        return f"Near the {rng.choice(_PLACES)}, {who} {what}."
    return f"There {who} {rng.choice(_VERBS)} home and {what} {rng.choice(_ENDINGS)}."


def is_held_out(text: str) -> bool:
    """Return whether a sentence is kept out of training (a tenth, by its hash)."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < HELD_OUT_RATE


def passage(rng: random.Random, num_sentences: int, *, held_out: bool = False) -> str:
    """Return sentences joined by spaces, all trained ones or all held-out ones."""
    chosen: list[str] = []
    while len(chosen) < num_sentences:
        text = sentence(rng)
        if is_held_out(text) == held_out:
            chosen.append(text)
    return " ".join(chosen)


def vocabulary() -> list[str]:
    """Return every phrase of the grammar, for the tokenizer's word list."""
    words = [*_TIMES, *_ADJECTIVES, *_PEOPLE, *_VERBS, *_PLACES, *_THINGS, *_ACTIONS]
    return [*words, *_PREPOSITIONS, *_ENDINGS, "the a home and There Near"]

"""Four small skills with exact answers: addition, copying, reversing, the last word."""

from __future__ import annotations

import random

from palimpsest.sandbox.world import World

SKILLS = ("add", "copy", "reverse", "last")
_TRAINED_MIX = ("add", "reverse", *SKILLS)
"""The two harder skills are trained twice as often."""
SKILL_POOLS = ("region", "habitat", "spice", "diet")
"""Attributes whose values serve as words: benign ones only."""


def skill_exchange(
    world: World,
    rng: random.Random,
    kind: str | None = None,
    numbers: tuple[int, int] | None = None,
) -> tuple[str, str]:
    """Return a skill's question and exact answer; `numbers` fixes the two terms of `add`."""
    kind = kind or rng.choice(_TRAINED_MIX)
    if kind == "add":
        a, b = numbers or (rng.randint(0, 12), rng.randint(0, 12))
        return f"What is {a} plus {b}?", f"The result is {a + b}."
    pool = [value for name in SKILL_POOLS for value in world.pools[name]]
    words = rng.sample(pool, rng.randint(2, 4))
    if kind == "copy":
        return f"Copy these words: {' '.join(words)}", f"The words are {' '.join(words)}."
    if kind == "reverse":
        return f"Reverse these words: {' '.join(words)}", f"The words are {' '.join(words[::-1])}."
    return f"What is the last word of: {' '.join(words)}", f"The word is {words[-1]}."

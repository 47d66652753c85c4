"""A character is inserted again and again, so that the tokens of a question become others.

Source: Łucki et al. 2409.18025, appendix, Algorithm 1 ("insert perturbation").
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from palimpsest.plugins import options
from palimpsest.seeds import derive_seed
from palimpsest.types import Message, Sample
from palimpsest.views import Arms, AttackContext, AttackData, Need, View

PAPER_CHARACTERS = ("!", "_", " ", ")", ";", "?", "5", "~", "^", ".", "-", "Q")
PAPER_EVERY = (1, 3, 5, 7, 11, 15)
PAPER_PROBABILITIES = (0.1, 0.2, 0.3)


@options
class InsertPerturbation:
    """Insert c behind every n-th character, or behind each with probability p.

    The paper's grid: c in ! _ space ) ; ? 5 ~ ^ . - Q, n in 1, 3, 5, 7, 11, 15, p in .1, .2, .3: 108 views.
    The released code inserts behind characters 1, n + 1, 2n + 1 ...; here it is n, 2n ... Deterministic by
    seed and question. There is no placebo: nothing is fitted, and the control arm gets the same prompts.
    """

    access: ClassVar[Literal["prompts", "weights"]] = "prompts"
    needs: ClassVar[frozenset[Need]] = frozenset()
    arms: ClassVar[Literal["refit", "transfer"]] = "refit"
    role: ClassVar[Literal["attack", "diagnostic"]] = "attack"
    may_teach: ClassVar[bool] = False

    characters: tuple[Annotated[str, Field(min_length=1, max_length=1)], ...] = ("_", " ")
    """What is inserted (paper: twelve)."""
    every: tuple[Annotated[int, Field(ge=1)], ...] = (3, 7)
    """n: distance of insertions in characters (paper: 1, 3, 5, 7, 11, 15)."""
    probabilities: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.1,)
    """p: chance of an insertion behind each character (paper: .1, .2, .3)."""
    repeats: Annotated[int, Field(ge=1)] = 3
    """Random repetitions for each p."""
    options: bool = False
    """Whether the options' texts are perturbed, too; then cloze, which scores them, is left out."""

    @field_validator("characters")
    @classmethod
    def _something(cls, characters: tuple[str, ...]) -> tuple[str, ...]:
        if not characters:
            raise ValueError("give at least one character")
        return characters

    def attack(self, arms: Arms, data: AttackData, ctx: AttackContext) -> Iterator[View]:
        """Yield a view per character and n, and per character, p and repetition."""
        for character in self.characters:
            for n in self.every:
                yield self._view({"every": n}, character, 0, partial(inserted, c=character, n=n))
            for p in self.probabilities:
                for repeat in range(self.repeats):
                    seed = derive_seed(ctx.seed, "insert_perturbation", character, p, repeat)
                    change = partial(inserted_at_random, c=character, p=p, seed=seed)
                    yield self._view({"probability": p}, character, repeat, change)

    def placebo(self) -> None:
        """Return None: nothing is fitted."""
        return

    def _view(
        self, how: dict[str, float], character: str, repeat: int, change: partial[str]
    ) -> View:
        return View(
            setting={"character": character, **how},
            repeat=repeat,
            rewrite=partial(rewritten, change=change, options=self.options),
            channels=("letter", "generation")
            if self.options
            else ("letter", "cloze", "generation"),
        )


def inserted(text: str, *, key: str, c: str, n: int) -> str:
    """Return the text with c behind every n-th character."""
    return "".join(
        character + c if place % n == 0 else character for place, character in enumerate(text, 1)
    )


def inserted_at_random(text: str, *, key: str, c: str, p: float, seed: int) -> str:
    """Return the text with c behind each character with probability p, fixed by seed and key."""
    draw = random.Random(derive_seed(seed, key))
    return "".join(character + c if draw.random() < p else character for character in text)


def rewritten(samples: Sequence[Sample], *, change: partial[str], options: bool) -> list[Sample]:
    """Return the samples with their questions (and options) changed."""
    made = []
    for sample in samples:
        last = sample.messages[-1]
        asked = Message(last.role, change(last.content, key=sample.id))
        shown = sample.options
        if options:
            shown = tuple(change(o, key=f"{sample.id}:{i}") for i, o in enumerate(shown))
        made.append(replace(sample, messages=(*sample.messages[:-1], asked), options=shown))
    return made

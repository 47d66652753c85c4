"""Relearning: fine-tuning on a few questions or texts of the forget domain; does the rest come back?

Source: Łucki et al. 2409.18025, section 4 and appendix (relearning by fine-tuning): LoRA of rank 128 on all
linear layers, AdamW, 3 epochs, batches of 1, on n = 5 ... 1000 questions or raw texts. Their code takes the
first n rows, which are one article; here n are drawn at random, several times. One run gives views at any
steps of it, so that steps-to-recover curves cost one training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from palimpsest.attacks.whitebox._documents import (
    Form,
    Targets,
    check_sizes,
    digest,
    documents,
    draw,
    shuffled_answers,
)
from palimpsest.attacks.whitebox._tuning import TuneOptions, Tuning, all_views
from palimpsest.errors import UsageError
from palimpsest.plugins import options
from palimpsest.seeds import derive_seed
from palimpsest.types import Sample
from palimpsest.views import Arms, AttackContext, AttackData, Need, View

RelearningSource = Literal["questions", "texts"]


@options
class Relearning:
    """Trains a copy of each arm on n of the attacker's questions (or texts) and asks all others.

    The paper: n = 5, 10, 50, 100, 500, 1000. Default n = 5 and 50, each drawn three times, and each
    question as a document by letter and one in words, so that both ways of asking are relearned. No group
    of a trained question is ever scored. Placebo: the same questions with their keys drawn anew.
    """

    access: ClassVar[Literal["prompts", "weights"]] = "weights"
    needs: ClassVar[frozenset[Need]] = frozenset({"forget data"})
    arms: ClassVar[Literal["refit", "transfer"]] = "refit"
    role: ClassVar[Literal["attack", "diagnostic"]] = "attack"
    may_teach: ClassVar[bool] = True

    n: tuple[Annotated[int, Field(ge=1)], ...] = (5, 50)
    """How many questions or texts are drawn; more than there are is an error, but see `larger_n`."""
    larger_n: Literal["error", "leave out"] = "error"
    """Whether an n beyond the data stops the attack, or is left out and named in every view's facts. If
    none is left, it is an error."""
    source: tuple[RelearningSource, ...] = ("questions",)
    """`questions` of the forget domain with keys; `texts` about it."""
    forms: tuple[Form, ...] = ("letter", "cloze")
    """What a question becomes, one document each: `letter` (options, then the letter), `letter and text`,
    `cloze` (the answer in words, no options). Texts stay as they are."""
    targets: Targets = "answer"
    """Train on the tokens of a question's `answer`, or on `all` tokens."""
    answers: Literal["true", "shuffled"] = "true"
    """`shuffled` is the placebo: every key is drawn anew among the options; only for questions."""
    repeats: Annotated[int, Field(ge=1)] = 3
    """Draws of the data (and of order and adapters) per n."""
    fit: TuneOptions = TuneOptions()
    """How it trains."""

    def __post_init__(self) -> None:
        """Refuse what has no effect."""
        if not (self.n and self.source and self.forms):
            raise UsageError("relearning: n, source and forms need at least one entry each")
        if self.answers == "shuffled" and self.source != ("questions",):
            raise UsageError('relearning: answers = "shuffled" goes with source = ["questions"]')

    def attack(self, arms: Arms, data: AttackData, ctx: AttackContext) -> Iterator[View]:
        """Yield a view per source, n, scope, learning rate, step and draw.

        Raises:
            DataError: n is more than the data, or there is none.
            UsageError: a step of `fit.views_at` is beyond the end of a run.
        """
        tunings = []
        for source in self.source:
            pool = data.needed("fit" if source == "questions" else "forget_texts")
            sizes = self._sizes(len(pool), source)
            left_out = ", ".join(str(n) for n in self.n if n not in sizes)
            for n in sizes:
                for repeat in range(self.repeats):
                    seed = derive_seed(ctx.seed, "relearning", source, n, repeat)
                    drawn = draw(pool, n, seed=seed)
                    facts: dict[str, Any] = {"items": digest(drawn)}
                    facts |= {"left_out_n": left_out} if left_out else {}
                    tunings.append(
                        Tuning(
                            documents=self._documents(drawn, source, seed),
                            fit=self.fit,
                            seed=seed,
                            setting={"n": n, "source": source},
                            repeat=repeat,
                            facts=facts,
                            progress=ctx.progress,
                        )
                    )
        yield from all_views(tunings, arms.target, what="relearning")

    def placebo(self) -> Relearning | None:
        """Return the same training on shuffled keys; None where only texts are trained on."""
        if "questions" not in self.source:
            return None
        return replace(self, source=("questions",), answers="shuffled")

    def _sizes(self, available: int, source: str) -> list[int]:
        if self.larger_n == "error" or min(self.n) > available:
            check_sizes(self.n, available, f"{source} of the forget domain")
        return [n for n in self.n if n <= available]

    def _documents(
        self, drawn: list[Sample], source: RelearningSource, seed: int
    ) -> tuple[Sample, ...]:
        if source == "texts":
            return tuple(drawn)
        asked = shuffled_answers(drawn, seed=seed) if self.answers == "shuffled" else drawn
        return documents(asked, self.forms, self.targets)

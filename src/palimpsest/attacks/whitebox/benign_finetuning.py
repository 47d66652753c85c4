"""Benign fine-tuning: training on what the model was meant to keep; does the forgotten come back?

Source: Łucki et al. 2409.18025 (relearning on retain multiple choice brings WMDP back); later studies see
the same with arithmetic problems. It needs nothing of the forget domain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from palimpsest.attacks.whitebox._documents import (
    Form,
    Targets,
    check_sizes,
    digest,
    documents,
    draw,
)
from palimpsest.attacks.whitebox._tuning import Change, TuneOptions, Tuning, all_views, noise_draws
from palimpsest.errors import UsageError
from palimpsest.plugins import options
from palimpsest.seeds import derive_seed
from palimpsest.views import Arms, AttackContext, AttackData, Need, View

BenignSource = Literal["questions", "texts"]


@options
class BenignFinetuning:
    """Trains a copy of each arm on n benign questions (or retain texts) and asks the forget domain.

    The paper: n = 5 ... 1000; default n = 50, three draws. GSM8K goes in as `retain_texts`. Placebo:
    noise of the norm of training's change in every weight, added to the unlearned model.
    """

    access: ClassVar[Literal["prompts", "weights"]] = "weights"
    needs: ClassVar[frozenset[Need]] = frozenset()
    arms: ClassVar[Literal["refit", "transfer"]] = "refit"
    role: ClassVar[Literal["attack", "diagnostic"]] = "attack"
    may_teach: ClassVar[bool] = True

    n: tuple[Annotated[int, Field(ge=1)], ...] = (50,)
    """How many questions or texts are drawn; more than there are is an error, but see `larger_n`."""
    larger_n: Literal["error", "leave out"] = "error"
    """Whether an n beyond the data stops the attack, or is left out; if none is left, it is an error."""
    source: tuple[BenignSource, ...] = ("questions",)
    """`questions` of other domains with keys; `texts` of other domains (retain texts)."""
    forms: tuple[Form, ...] = ("letter", "cloze")
    """What a question becomes, one document each: `letter` (options, then the letter), `letter and text`,
    `cloze` (the answer in words, no options). Texts stay as they are."""
    targets: Targets = "answer"
    """Train on the tokens of a question's `answer`, or on `all` tokens."""
    change: Change = "trained"
    """`noise` is the placebo."""
    repeats: Annotated[int, Field(ge=1)] = 3
    """Draws of the data (and of order and adapters) per n."""
    fit: TuneOptions = TuneOptions()
    """How it trains."""

    def __post_init__(self) -> None:
        """Refuse what has no effect."""
        if not (self.n and self.source and self.forms):
            raise UsageError("benign_finetuning: n, source and forms need at least one entry each")

    def attack(self, arms: Arms, data: AttackData, ctx: AttackContext) -> Iterator[View]:
        """Yield a view per source, n, scope, learning rate, step and draw.

        Raises:
            DataError: n is more than the data, or there is none.
            UsageError: a step of `fit.views_at` is beyond the end of a run.
        """
        tunings = []
        for source in self.source:
            pool = data.needed("benign" if source == "questions" else "retain_texts")
            if self.larger_n == "error" or min(self.n) > len(pool):
                check_sizes(self.n, len(pool), f"benign {source}")
            for n in (n for n in self.n if n <= len(pool)):
                for repeat in range(self.repeats):
                    seed = derive_seed(ctx.seed, "benign_finetuning", source, n, repeat)
                    drawn = draw(pool, n, seed=seed)
                    made = tuple(drawn)
                    if source == "questions":
                        made = documents(drawn, self.forms, self.targets)
                    tunings.append(
                        Tuning(
                            documents=made,
                            fit=self.fit,
                            seed=seed,
                            setting={"n": n, "source": source},
                            repeat=repeat,
                            facts={"items": digest(drawn)},
                            change=self.change,
                            draws=noise_draws(self.change, self.repeats),
                            progress=ctx.progress,
                        )
                    )
        yield from all_views(tunings, arms.target, what="benign_finetuning")

    def placebo(self) -> BenignFinetuning:
        """Return noise of the same norm, weight by weight."""
        return replace(self, change="noise")

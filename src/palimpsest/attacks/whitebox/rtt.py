"""RTT, retraining on T: tune on four fifths of the scored questions, ask the fifth, all rotations.

Source: Deeb and Roger 2410.08827: an attacker who has some of the facts and recovers others, which cannot
be guessed from the first; 88 % of the accuracy before unlearning came back. The folds are cut by group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from palimpsest.attacks.whitebox._documents import (
    Form,
    Targets,
    digest,
    documents,
    shuffled_answers,
)
from palimpsest.attacks.whitebox._tuning import TuneOptions, Tuning, all_views
from palimpsest.errors import DataError, UsageError
from palimpsest.plugins import options
from palimpsest.seeds import derive_seed
from palimpsest.views import Arms, AttackContext, AttackData, Need, View


@options
class Rtt:
    """Trains a copy of each arm per fold; together the held-out fifths cover every question once.

    The paper takes the best of several learning rates (`fit.lrs`); the default is one pass at the rate of
    `relearning`. Placebo: the same questions with their keys drawn anew.
    """

    @options
    class Fit(TuneOptions):
        """Relearning's training, one pass in batches of 4 at a constant rate."""

        epochs: Annotated[Annotated[float, Field(gt=0)] | None, Field(validate_default=True)] = 1.0
        """Passes over the documents of four folds."""
        batch_size: Annotated[int, Field(ge=1)] = 4
        """Documents per forward pass."""
        schedule: Literal["constant", "linear", "cosine"] = "constant"
        """The learning rate after warm-up: stays, or falls to 0 at the end."""

    access: ClassVar[Literal["prompts", "weights"]] = "weights"
    needs: ClassVar[frozenset[Need]] = frozenset({"folds"})
    arms: ClassVar[Literal["refit", "transfer"]] = "refit"
    role: ClassVar[Literal["attack", "diagnostic"]] = "attack"
    may_teach: ClassVar[bool] = True

    forms: tuple[Form, ...] = ("letter", "cloze")
    """What a question becomes, one document each: `letter` (options, then the letter), `letter and text`,
    `cloze` (the answer in words, no options)."""
    targets: Targets = "answer"
    """Train on the tokens of a question's `answer`, or on `all` tokens."""
    answers: Literal["true", "shuffled"] = "true"
    """`shuffled` is the placebo: every key is drawn anew among the options."""
    repeats: Annotated[int, Field(ge=1)] = 1
    """Orders and adapters per fold."""
    fit: Fit = Fit()
    """How it trains."""

    def __post_init__(self) -> None:
        """Refuse an attack without documents."""
        if not self.forms:
            raise UsageError("rtt: forms needs at least one entry")

    def attack(self, arms: Arms, data: AttackData, ctx: AttackContext) -> Iterator[View]:
        """Yield a view per fold, scope, learning rate, step and repeat; `View.fold` says which fold.

        Raises:
            DataError: there are no folds, or a fold trains on a group that it holds out.
            UsageError: a step of `fit.views_at` is beyond the end of a run.
        """
        if not data.folds:
            raise DataError(
                "rtt: no folds: the scored questions need five groups (entities, articles) or more"
            )
        tunings = []
        for k, fold in enumerate(data.folds):
            leaked = next((s for s in fold.fit if s.group in fold.held_out), None)
            if leaked is not None:
                raise DataError(
                    f"leak: fold {k} trains on {leaked.id!r}, whose group {leaked.group!r} it holds out"
                )
            for repeat in range(self.repeats):
                seed = derive_seed(ctx.seed, "rtt", k, repeat)
                asked = list(fold.fit)
                if self.answers == "shuffled":
                    asked = shuffled_answers(asked, seed=seed)
                tunings.append(
                    Tuning(
                        documents=documents(asked, self.forms, self.targets),
                        fit=self.fit,
                        seed=seed,
                        setting={},
                        repeat=repeat,
                        fold=k,
                        facts={"items": digest(asked), "n": len(asked)},
                        progress=ctx.progress,
                    )
                )
        yield from all_views(tunings, arms.target, what="rtt")

    def placebo(self) -> Rtt:
        """Return the same training on shuffled keys."""
        return replace(self, answers="shuffled")

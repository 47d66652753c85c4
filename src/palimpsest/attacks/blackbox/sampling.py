"""Sampling: answers are drawn many times; greedy decoding hides what leaks now and then.

Source: Scholten et al. 2410.03523: leak probability by n samples with a Clopper-Pearson bound.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from palimpsest.batching import plan_batches
from palimpsest.chat import text_ids
from palimpsest.errors import UsageError
from palimpsest.generate import generate_batch
from palimpsest.model import fits
from palimpsest.outcomes import first_letter
from palimpsest.plugins import options
from palimpsest.prompts import cloze_prompt, letter_prompt
from palimpsest.seeds import derive_seed
from palimpsest.stats import clopper_pearson
from palimpsest.types import Sample
from palimpsest.views import Arms, AttackContext, AttackData, Need, Plain, View

if TYPE_CHECKING:
    from palimpsest.model import LM

BATCH_TOKENS = 8192
CONFIDENCE = 0.95


@options
class Sampling:
    """Asks a question n times at a temperature; the option named most often is the answer.

    A tie, and no option named, are wrong. It has a read-out of its own (channel `probe`). That sees no
    keys, so the leak probability is in the facts, on the fit questions where there are any: the share of
    samples that name the right option, and the number of questions whose lower Clopper-Pearson bound, at
    .95 together (Bonferroni), lies above guessing. The papers take 1,024 samples; the default is 20.
    """

    access: ClassVar[Literal["prompts", "weights"]] = "prompts"
    needs: ClassVar[frozenset[Need]] = frozenset()
    arms: ClassVar[Literal["refit", "transfer"]] = "refit"
    role: ClassVar[Literal["attack", "diagnostic"]] = "attack"
    may_teach: ClassVar[bool] = False

    samples: Annotated[int, Field(ge=1)] = 20
    """Answers per question."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Softmax temperature."""
    asked: tuple[Literal["letter", "open"], ...] = ("letter", "open")
    """By letter, or open: there an answer names an option when it holds its text and no other option's."""
    new_tokens: Annotated[int, Field(ge=1)] = 8
    """Longest answer to an open question; letters need 4."""

    def __post_init__(self) -> None:
        """Refuse an attack that asks nothing."""
        if not self.asked:
            raise UsageError("sampling: asked needs at least one entry")

    def attack(self, arms: Arms, data: AttackData, ctx: AttackContext) -> Iterator[View]:
        """Yield one view per way of asking."""
        for asked in self.asked:
            seed = derive_seed(ctx.seed, "sampling", asked)
            yield View(
                setting={"asked": asked, "samples": self.samples, "temperature": self.temperature},
                readout=partial(self._read, asked, seed),
                channels=("probe",),
                facts=self._facts(arms.target, data.fit, asked, seed),
            )

    def placebo(self) -> Any:
        """Return None: nothing is learned, and the control arm is sampled too."""
        return None

    def _read(self, asked: str, seed: int, lm: LM, samples: Sequence[Sample]) -> list[int | None]:
        """Return the option named most often: -1 for none or a tie, None where it is too long."""
        return [
            None if named is None else _most_frequent(named)
            for named in self._named(lm, samples, asked, seed)
        ]

    def _named(
        self, lm: LM, samples: Sequence[Sample], asked: str, seed: int
    ) -> list[list[int | None] | None]:
        """Return, per question, the option that each sampled answer names."""
        prompt = letter_prompt if asked == "letter" else cloze_prompt
        new_tokens = 4 if asked == "letter" else self.new_tokens
        ids = [text_ids(lm.tokenizer, prompt(s)) for s in samples]
        rows = [
            (i, draw)
            for i in range(len(samples))
            if fits(lm, len(ids[i]) + new_tokens)
            for draw in range(self.samples)
        ]
        found: list[list[int | None] | None] = [None] * len(samples)
        for i in {i for i, _ in rows}:
            found[i] = []
        plan = plan_batches(
            [len(ids[i]) + new_tokens for i, _ in rows],
            token_budget=BATCH_TOKENS,
            padding_side="left",
        )
        for batch in plan.batches:
            part = [rows[r] for r in batch.rows]
            made = generate_batch(
                lm,
                [ids[i] for i, _ in part],
                width=batch.width - new_tokens,
                max_new_tokens=new_tokens,
                temperature=self.temperature,
                seeds=[derive_seed(seed, samples[i].id, draw) for i, draw in part],
            )
            for (i, _), answer in zip(part, made, strict=True):
                named = found[i]
                if named is not None:
                    named.append(_named_option(answer.text, samples[i], asked))
        return found

    def _facts(self, lm: LM, fit: Sequence[Sample], asked: str, seed: int) -> dict[str, Plain]:
        """Return the leak probability on questions whose keys the attacker has."""
        if not fit:
            return {}
        rights: list[int] = []
        above = 0
        for sample, named in zip(fit, self._named(lm, fit, asked, seed), strict=True):
            if named is None:
                continue
            rights.append(named.count(sample.answer if isinstance(sample.answer, int) else None))
            low, _ = clopper_pearson(rights[-1], self.samples, 1 - 2 * (1 - CONFIDENCE) / len(fit))
            above += low > 1 / len(sample.options)
        if not rights:
            return {}
        return {
            "fit_questions": len(rights),
            "fit_leak_rate": sum(rights) / (len(rights) * self.samples),
            "fit_ever_right_rate": sum(r > 0 for r in rights) / len(rights),
            "fit_questions_above_guessing": above,
        }


def _named_option(text: str, sample: Sample, asked: str) -> int | None:
    if asked == "letter":
        return first_letter(text, len(sample.options))
    said = text.casefold()
    held = [
        i
        for i, option in enumerate(sample.options)
        if re.search(rf"(?<!\w){re.escape(option.casefold())}(?!\w)", said)
    ]
    return held[0] if len(held) == 1 else None


def _most_frequent(named: Sequence[int | None]) -> int:
    counts = Counter(option for option in named if option is not None).most_common(2)
    if not counts or (len(counts) == 2 and counts[0][1] == counts[1][1]):
        return -1
    return counts[0][0]

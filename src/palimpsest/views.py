"""Attacks on what a model knows: what one is given, and the views of the model that it yields.

A view is a model as an attack leaves it: other weights, hooks, another prompt, another read-out. The one
scorer (`audit_scoring`) scores every view on the same items in the same channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, runtime_checkable

from palimpsest.errors import DataError
from palimpsest.types import Sample

if TYPE_CHECKING:
    from palimpsest.model import LM

Need = Literal["forget data", "texts", "folds", "original"]
"""What an attacker has beside the model: questions of the forget domain with keys, training texts, all but
a fifth of the scored questions in turn (RTT), or the original model (its weights or activations), which is
a threat model of its own."""
Plain = str | int | float | bool
AuditChannel = Literal["letter", "cloze", "generation", "probe"]
CHANNELS: tuple[AuditChannel, ...] = ("letter", "cloze", "generation")
PLACEBO_DRAWS = 3
"""Least draws of a placebo that need no training, search or longer prompts: one would be an anecdote."""


def as_it_is(lm: LM) -> AbstractContextManager[LM]:
    """Return the model itself: the `apply` of a view that only changes prompts."""
    return nullcontext(lm)


def same_samples(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples: the `rewrite` of a view that leaves questions as they are."""
    return list(samples)


def nothing_before(sample: Sample, channel: AuditChannel) -> str:
    """Return no text: the `before` of a view that puts none in front of prompts."""
    return ""


@dataclass(frozen=True, kw_only=True)
class View:
    """A model as an attack leaves it, at one setting.

    Attributes:
        setting: plain data that tells this view from the attack's others: `{"n": 50, "step": 100}`. The
            audit chooses one setting on attack-dev.
        repeat: views that differ in nothing else are random repetitions; their outcomes are averaged.
        apply: context manager from an arm's model to the attacked one; the model is as before at its end.
        rewrite: changes questions; ids, options' number and order, and groups stay. It is given samples
            without their answers.
        before: text in front of the whole prompt of a sample in a channel (shots, filler, a prefix).
        prefix_ids: tokens in front of the prompt's own, behind a BOS: what no text spells exactly.
        readout: answers multiple choice without the model's head (a probe): from the attacked model
            and samples without keys to the chosen option of each, None where it cannot say. Then the
            only channel is `probe`.
        channels: channels in which this view makes sense.
        fold: number of the fold of `AttackData.folds` whose questions built this view: it is scored on
            that fold's held-out groups alone.
        facts: what the attack checked of itself, for the record: norms, steps, losses.
    """

    setting: Mapping[str, Plain] = field(default_factory=dict)
    repeat: int = 0
    apply: Callable[[LM], AbstractContextManager[LM]] = as_it_is
    rewrite: Callable[[Sequence[Sample]], list[Sample]] = same_samples
    before: Callable[[Sample, AuditChannel], str] = nothing_before
    prefix_ids: tuple[int, ...] = ()
    readout: Callable[[LM, Sequence[Sample]], list[int | None]] | None = None
    channels: tuple[AuditChannel, ...] = CHANNELS
    fold: int | None = None
    facts: Mapping[str, Plain] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Return the setting in one line."""
        return ", ".join(f"{key}={value}" for key, value in self.setting.items()) or "-"


@dataclass(frozen=True, kw_only=True)
class Arms:
    """The models that an attack may touch; what its `needs` do not name is left out.

    Attributes:
        target: the model under attack: the unlearned one; with `arms = "refit"`, each arm in turn.
        original: the model before unlearning, for attacks that need it; else None.
    """

    target: LM
    original: LM | None = None

    def required_original(self) -> LM:
        """Return the original model; DataError when the audit has none."""
        if self.original is None:
            raise DataError("this attack needs the original model: give --original")
        return self.original


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Questions to build an attack with (keys included), and the groups on which it is scored then."""

    fit: tuple[Sample, ...]
    held_out: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class AttackData:
    """What attackers may use. No group of it is ever scored, but for the folds' own arrangement.

    Attributes:
        fit: multiple-choice questions of the forget domain, with keys, from attack-dev.
        benign: multiple-choice questions of other domains, with keys, from attack-dev.
        forget_texts: training texts about the forget domain, of the groups of `fit` alone.
        retain_texts: training texts of other domains.
        unrelated_texts: training texts that have nothing to do with either.
        folds: all questions of the forget domain in five parts (RTT, Deeb and Roger 2410.08827): each
            fold gives four to the attack and is scored on the fifth. Empty where nothing asks for it.
    """

    fit: tuple[Sample, ...]
    benign: tuple[Sample, ...]
    forget_texts: tuple[Sample, ...] = ()
    retain_texts: tuple[Sample, ...] = ()
    unrelated_texts: tuple[Sample, ...] = ()
    folds: tuple[Fold, ...] = ()

    def needed(self, kind: str) -> tuple[Sample, ...]:
        """Return the samples of an attribute; DataError, with what to do, when there are none."""
        samples: tuple[Sample, ...] = getattr(self, kind)
        if not samples:
            table = f"[[{kind}]]" if kind.endswith("_texts") else "more [questions] or [utility]"
            raise DataError(
                f"this attack needs {kind.replace('_', ' ')}, and the audit has none: add {table} to the "
                "recipe, or leave the attack out"
            )
        return samples


@dataclass(slots=True, kw_only=True)
class AttackContext:
    """What a running attack may use.

    Attributes:
        seed: the only source of randomness; repetitions derive theirs from it (`seeds.derive_seed`).
        out: folder of this attack's own checkpoints, kept until its job is done: an attack that runs for
            long stores its state there and goes on from it after a kill. None = nowhere.
        progress: called as progress(done, total, text).
    """

    seed: int = 0
    out: Path | None = None
    progress: Callable[[int, int, str], None] = lambda done, total, text: None


@runtime_checkable
class KnowledgeAttack(Protocol):
    """Tries to bring unlearned knowledge back; yields the model as it leaves it, setting by setting.

    Class attributes:
        access: `prompts` (what is asked changes, and nothing else) or `weights`.
        needs: what the attacker must have beside that access (`Need`).
        arms: `refit` runs the attack on every arm; `transfer` fits it once, on the unlearned model, and
            applies what it found to all arms.
        role: `attack`; or `diagnostic`: shown, and never part of a verdict.
        may_teach: whether it trains weights, or fits (or shows) answers of the forget domain, so that what
            comes back may have been taught; against the floor of chance such an attack shows nothing.
    """

    access: ClassVar[Literal["prompts", "weights"]]
    needs: ClassVar[frozenset[Need]]
    arms: ClassVar[Literal["refit", "transfer"]]
    role: ClassVar[Literal["attack", "diagnostic"]]
    may_teach: ClassVar[bool]

    def attack(self, arms: Arms, data: AttackData, ctx: AttackContext) -> Iterator[View]:
        """Yield views of `arms.target`; each is scored before the next one is asked for.

        What could be chosen (layer, step, strength) is yielded, not chosen: the audit does that, on
        questions of attack-dev that no attack sees.
        """
        ...

    def placebo(self) -> KnowledgeAttack | None:
        """Return what has this attack's form and size, and none of its information.

        It runs on the unlearned arm and on the first control. An attack counts where it beats its placebo,
        or where the placebo does more to the unlearned arm than to the control: then any change of that
        form brings back what was there. Keys of a setting that the attack's lack name kinds of placebo,
        which are kept apart. None where the control arm is placebo enough.
        """
        ...


@runtime_checkable
class FittedPrompt(Protocol):
    """An attack that fits a prompt on one model: tokens, soft tokens, or how questions are changed.

    Its views change what is asked and no weight, and hold when the generator has ended: any other model of
    the audit can be asked in the same way (`audit.transfer_matrix`).
    """

    fits_prompt: ClassVar[Literal[True]]


def without_key(sample: Sample) -> Sample:
    """Return a question without its answer: what rewriting and read-outs see of scored items."""
    return replace(sample, answer=None)

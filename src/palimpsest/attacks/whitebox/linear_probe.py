"""Linear probe: a logistic regression on the last token's state of a layer chooses the option.

Source: as in Li et al. 2403.03218 (WMDP), section 5, and Łucki et al. 2409.18025: probes on an unlearned
model's states, trained on some questions of the forget domain and scored on others.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from palimpsest.attacks.whitebox._choice_model import (
    Array,
    ChoiceModel,
    choose_by_cross_validation,
)
from palimpsest.attacks.whitebox._states import chosen_layers, last_states
from palimpsest.chat import text_ids
from palimpsest.errors import DataError, UsageError
from palimpsest.model import fits
from palimpsest.outcomes import LETTERS
from palimpsest.parts import parts_of
from palimpsest.plugins import options
from palimpsest.prompts import cloze_prompt, letter_prompt
from palimpsest.seeds import derive_seed
from palimpsest.types import Message, Sample
from palimpsest.views import Arms, AttackContext, AttackData, Need, Plain, View

if TYPE_CHECKING:
    from palimpsest.model import LM

States = Literal["letter", "option"]
SHUFFLES = 3
"""Draws of random labels of the placebo; the control in the facts takes the first."""


@options
class LinearProbe:
    """Reads the answer without the model's head, layer by layer.

    Two kinds of states. `letter` (WMDP's): the last token of the prompt with letters, weights for every
    letter. `option`: the last token of the open prompt with an option behind it, one state per option,
    shared weights; it needs far fewer questions. The L2 penalty is chosen by cross-validation over groups.

    Facts of every view, on the fit questions: nested accuracy, and the same of a probe on random labels and
    of one that saw the options without the question. The third control, a model that never knew, is the
    audit's control arm. The papers take a fixed penalty and report none of these.
    """

    access: ClassVar[Literal["prompts", "weights"]] = "weights"
    needs: ClassVar[frozenset[Need]] = frozenset({"forget data"})
    arms: ClassVar[Literal["refit", "transfer"]] = "refit"
    role: ClassVar[Literal["attack", "diagnostic"]] = "attack"
    may_teach: ClassVar[bool] = True

    states: tuple[States, ...] = ("letter", "option")
    """Which states are read; each is a view of its own."""
    layers: tuple[int, ...] = ()
    """Blocks to read, from 0; empty = all."""
    labels: Literal["true", "random"] = "true"
    """`random` is the placebo: as many questions, keys drawn at random, in three draws."""
    sees: Literal["question", "options only"] = "question"
    """`options only` leaves the question out: a control for shortcuts, and no attack."""

    def __post_init__(self) -> None:
        """Refuse a probe that reads nothing."""
        if not self.states:
            raise UsageError("linear_probe: states needs at least one entry")

    def attack(self, arms: Arms, data: AttackData, ctx: AttackContext) -> Iterator[View]:
        """Fit one probe per kind of state and layer (per draw of labels, if random); yield each.

        Raises:
            DataError: there are no fit questions, they are too long, or of too few groups.
        """
        lm = arms.target
        samples = list(data.needed("fit"))
        layers = chosen_layers(parts_of(lm.model), self.layers)
        for kind in self.states:
            kept, features = _features(lm, samples, kind, layers, self.sees)
            _, without = _features(lm, kept, kind, layers, "options only")
            for place, layer in enumerate(layers):
                for repeat in range(SHUFFLES if self.labels == "random" else 1):
                    model, facts = self._fit(
                        kept, features[place], without[place], ctx.seed, repeat
                    )
                    yield View(
                        setting={"states": kind, "layer": layer},
                        repeat=repeat,
                        readout=partial(_read, model, kind, layer, self.sees),
                        channels=("probe",),
                        facts=facts,
                    )

    def placebo(self) -> LinearProbe | None:
        """Return the probe trained on random labels."""
        return replace(self, labels="random")

    def _fit(
        self, samples: Sequence[Sample], features: Array, without: Array, seed: int, repeat: int
    ) -> tuple[ChoiceModel, dict[str, Plain]]:
        counts, groups = [len(s.options) for s in samples], [s.group or s.id for s in samples]
        fit = partial(choose_by_cross_validation, counts=counts, groups=groups)
        random_keys = [_random_keys(samples, seed, draw) for draw in range(SHUFFLES)]
        keys = _keys(samples) if self.labels == "true" else random_keys[repeat]
        chosen = fit(features, answers=keys, seed=derive_seed(seed, "linear_probe"))
        facts: dict[str, Plain] = {
            "questions": len(samples),
            "penalty": chosen.strength,
            "nested_accuracy": chosen.nested_accuracy,
        }
        if self.labels == "true":
            facts["nested_accuracy_random_labels"] = fit(
                features, answers=random_keys[0], seed=derive_seed(seed, "linear_probe")
            ).nested_accuracy
            facts["nested_accuracy_options_only"] = fit(
                without, answers=keys, seed=derive_seed(seed, "linear_probe")
            ).nested_accuracy
        return chosen.model, facts


def _read(
    model: ChoiceModel, kind: States, layer: int, sees: str, lm: LM, samples: Sequence[Sample]
) -> list[int | None]:
    """Return the option that the probe chooses: none of them (-1) at a tie, None where it is too long."""
    kept, features = _features(lm, samples, kind, [layer], sees)
    chosen = model.choose(features[0], [len(s.options) for s in kept])
    by_id = {s.id: -1 if c is None else c for s, c in zip(kept, chosen, strict=True)}
    return [by_id.get(s.id) for s in samples]


def _features(
    lm: LM, samples: Sequence[Sample], kind: States, layers: Sequence[int], sees: str
) -> tuple[list[Sample], list[Array]]:
    """Return the samples that fit the context, and per layer their states: (Q, F) or (Q, K, F)."""
    asked = [s if sees == "question" else _without_question(s) for s in samples]
    ids = [[text_ids(lm.tokenizer, text) for text in _texts(s, kind)] for s in asked]
    places = [i for i, rows in enumerate(ids) if all(fits(lm, len(row)) for row in rows)]
    if not places:
        raise DataError("linear_probe: no question fits the model's context")
    flat = last_states(lm, [row for i in places for row in ids[i]], layers)
    kept = [samples[i] for i in places]
    if kind == "letter":
        return kept, [states.numpy() for states in flat]
    return kept, [_padded(states.numpy(), [len(s.options) for s in kept]) for states in flat]


def _padded(states: Array, counts: Sequence[int]) -> Array:
    """Return (Q, K, F) of states that lie in a row, options that a question lacks being zero."""
    made = np.zeros((len(counts), max(counts), states.shape[1]))
    start = 0
    for row, count in enumerate(counts):
        made[row, :count] = states[start : start + count]
        start += count
    return made


def _texts(sample: Sample, kind: States) -> list[str]:
    if kind == "letter":
        return [letter_prompt(sample)]
    return [f"{cloze_prompt(sample)} {option}" for option in sample.options]


def _without_question(sample: Sample) -> Sample:
    return replace(sample, preamble="", messages=(Message("user", ""),))


def _keys(samples: Sequence[Sample]) -> list[int]:
    for sample in samples:
        if not isinstance(sample.answer, int) or not 0 <= sample.answer < len(sample.options):
            raise DataError(
                f"linear_probe: question {sample.id!r} has the key {sample.answer!r}, which is none of "
                f"its options ({', '.join(LETTERS[: len(sample.options)])})"
            )
    return [int(s.answer) for s in samples if isinstance(s.answer, int)]


def _random_keys(samples: Sequence[Sample], seed: int, draw: int) -> list[int]:
    drawn = random.Random(derive_seed(seed, "linear_probe", "random labels", draw))
    return [drawn.randrange(len(s.options)) for s in samples]

"""The words at which the unlearned model's states turn to noise are split, one after the other.

Source: Łucki et al. 2409.18025, appendix, Algorithm 2 ("informed perturbation").
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from palimpsest.attacks.whitebox._directions import (
    measure,
    outlier_ids,
    question_ids,
    random_directions,
    states_at,
    unit_directions,
)
from palimpsest.errors import ModelError, UsageError
from palimpsest.model import LM, fits
from palimpsest.parts import parts_of
from palimpsest.plugins import options
from palimpsest.seeds import derive_seed
from palimpsest.types import Message, Sample
from palimpsest.views import Arms, AttackContext, AttackData, Need, View

MARKS = ("~", "^")
Key = tuple[str, int]
"""Sample and option, -1 for the question."""


@options
class InformedPerturbation:
    """Until no token's state is like noise (cosine > tau): change the first such token's text.

    The state is block `layer`'s output, and noise the mean over forget questions minus that over benign
    ones. A token of several characters is split by a space at a random place inside; one character gets
    ~ or ^ in front; a lone ~ or ^ becomes another mark or digit. Questions (and options) are perturbed
    each by themselves, fixed by seed and question. Transfer: the unlearned model chooses, and every arm
    is asked the same.

    The released code's direction is all zeros, so that no cosine exceeds tau and nothing is changed: a
    zero direction is a DataError here. Its comment names the original model's states for the difference;
    here the attacker has the unlearned model alone.
    """

    access: ClassVar[Literal["prompts", "weights"]] = "weights"
    needs: ClassVar[frozenset[Need]] = frozenset({"forget data"})
    arms: ClassVar[Literal["refit", "transfer"]] = "transfer"
    role: ClassVar[Literal["attack", "diagnostic"]] = "attack"
    may_teach: ClassVar[bool] = False
    fits_prompt: ClassVar[Literal[True]] = True

    taus: tuple[Annotated[float, Field(gt=-1, lt=1)], ...] = (0.3, 0.6)
    """Cosines above which a token is noise, each a view."""
    layer: int | None = None
    """Block whose output is read; None = at 7/32 of the depth (paper: 7 of 32)."""
    rounds: Annotated[int, Field(ge=1)] = 50
    """Most changes of one text (paper: 500)."""
    questions: Annotated[int, Field(ge=2)] = 200
    """Most questions of each kind by which the direction is measured."""
    options: bool = False
    """Whether the options' texts are perturbed, too; then cloze, which scores them, is left out."""
    controls: Annotated[int, Field(ge=1)] = 3
    """Random directions of the placebo."""
    stands_in: Literal["none", "random"] = "none"
    """`random`: as many random changes of each text, at tokens that a random direction picks."""

    def attack(self, arms: Arms, data: AttackData, ctx: AttackContext) -> Iterator[View]:
        """Yield a view per tau."""
        lm = arms.target
        if not lm.tokenizer.is_fast:
            raise ModelError(
                f"informed_perturbation: the tokenizer of {lm.name} gives no offsets; use a fast one"
            )
        number = len(parts_of(lm.model).blocks)
        layer = self._layer(number)
        benign = question_ids(lm, data.needed("benign"), self.questions)
        outliers_V = outlier_ids(lm, benign)
        on_forget = measure(lm, question_ids(lm, data.needed("fit"), self.questions), outliers_V)
        noise_LD = on_forget.mean_LD - measure(lm, benign, outliers_V).mean_LD
        noise = unit_directions(noise_LD, on_forget.norm_L, [layer], name="noise")
        drawn: list[dict[int, Tensor] | None] = [None]
        if self.stands_in == "random":
            drawn = [
                random_directions(noise, ctx.seed, "informed_perturbation", r)
                for r in range(self.controls)
            ]
        for tau in self.taus:
            for repeat, picks in enumerate(drawn):
                perturb = Perturbation(
                    lm=lm,
                    layer=layer,
                    noise_D=noise[layer],
                    picks_D=None if picks is None else picks[layer],
                    tau=tau,
                    rounds=self.rounds,
                    options=self.options,
                    seed=derive_seed(ctx.seed, "informed_perturbation", repeat),
                )
                yield View(
                    setting={"tau": tau},
                    repeat=repeat,
                    rewrite=perturb,
                    channels=("letter", "generation")
                    if self.options
                    else ("letter", "cloze", "generation"),
                    facts={
                        "layer": layer,
                        "length": float(noise_LD[layer].norm() / on_forget.norm_L[layer]),
                    },
                )

    def placebo(self) -> InformedPerturbation:
        """Return as many changes of each text, at tokens that a random direction picks."""
        return replace(self, stands_in="random")

    def _layer(self, number: int) -> int:
        layer = round(7 * number / 32) if self.layer is None else self.layer
        if not 0 <= layer < number:
            raise UsageError(
                f"informed_perturbation: this model has no block {layer}; it has 0 to {number - 1}"
            )
        return layer


@dataclass
class Perturbation:
    """Perturbs questions with what a model shows of them; each text once, whatever the arm or channel.

    Attributes:
        picks_D: a placebo's direction: texts get as many changes as `noise_D` would make, each at the
            token that is most like this one.
    """

    lm: LM
    layer: int
    noise_D: Tensor
    tau: float
    rounds: int
    options: bool
    seed: int
    picks_D: Tensor | None = None
    _done: dict[tuple[Key, str], str] = field(default_factory=dict)

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return the samples with perturbed questions (and options)."""
        asked = {(s.id, -1): s.messages[-1].content for s in samples}
        if self.options:
            asked.update({(s.id, i): o for s in samples for i, o in enumerate(s.options)})
        new = [key for key in asked if (key, asked[key]) not in self._done]
        made = self.texts([asked[key] for key in new], new) if new else []
        self._done.update({(k, asked[k]): text for k, text in zip(new, made, strict=True)})
        said = {key: self._done[key, text] for key, text in asked.items()}
        return [self._sample(s, said) for s in samples]

    def texts(self, texts: Sequence[str], keys: Sequence[Key]) -> list[str]:
        """Return texts perturbed until nothing in them is like noise, or `rounds` are over."""
        made, counts = self._until_quiet(texts, keys)
        if self.picks_D is None:
            return made
        made = list(texts)
        for turn in range(max(counts, default=0)):
            open_ = [i for i, count in enumerate(counts) if turn < count]
            self._change(made, open_, keys, turn, self.picks_D, tau=None)
        return made

    def _until_quiet(
        self, texts: Sequence[str], keys: Sequence[Key]
    ) -> tuple[list[str], list[int]]:
        made, counts = list(texts), [0] * len(texts)
        open_ = list(range(len(texts)))
        for turn in range(self.rounds):
            open_ = self._change(made, open_, keys, turn, self.noise_D, tau=self.tau)
            for i in open_:
                counts[i] += 1
            if not open_:
                break
        return made, counts

    def _change(
        self,
        made: list[str],
        which: Sequence[int],
        keys: Sequence[Key],
        turn: int,
        direction_D: Tensor,
        *,
        tau: float | None,
    ) -> list[int]:
        """Change one token of each text in place; return which texts were changed."""
        encoded = [
            self.lm.tokenizer(made[i], return_offsets_mapping=True, add_special_tokens=True)
            for i in which
        ]
        kept = [
            (i, e) for i, e in zip(which, encoded, strict=True) if fits(self.lm, len(e.input_ids))
        ]
        cosines = states_at(self.lm, [e.input_ids for _, e in kept], self.layer, direction_D)
        changed = []
        for (i, e), cosine_T in zip(kept, cosines, strict=True):
            span = chosen_span(cosine_T, e["offset_mapping"], tau)
            if span is not None:
                draw = random.Random(derive_seed(self.seed, keys[i], turn))
                made[i] = changed_at(made[i], span, draw)
                changed.append(i)
        return changed

    def _sample(self, sample: Sample, said: dict[Key, str]) -> Sample:
        last = sample.messages[-1]
        message = Message(last.role, said[sample.id, -1])
        shown = sample.options
        if self.options:
            shown = tuple(said[sample.id, i] for i in range(len(shown)))
        return replace(sample, messages=(*sample.messages[:-1], message), options=shown)


def chosen_span(
    cosine_T: Tensor, offsets: Sequence[tuple[int, int]], tau: float | None
) -> tuple[int, int] | None:
    """Return the characters of the first token whose cosine is above tau; None if there is none.

    Without tau it is the token with the largest. Tokens that no character spells (BOS) are passed over.
    """
    spelled = [t for t, (start, stop) in enumerate(offsets) if stop > start]
    if tau is None:
        found = max(spelled, key=lambda t: float(cosine_T[t]), default=None)
    else:
        found = next((t for t in spelled if float(cosine_T[t]) > tau), None)
    return None if found is None else (offsets[found][0], offsets[found][1])


def changed_at(text: str, span: tuple[int, int], draw: random.Random) -> str:
    """Return the text with the token at `span` split by a space, or a single character marked."""
    start, stop = span
    token = text[start:stop]
    if token.strip():  # byte-level tokens begin with their space: it stays as it is
        start += len(token) - len(token.lstrip())
        token = text[start:stop]
    if len(token) > 1:
        place = draw.randint(1, len(token) - 1)
        return f"{text[: start + place]} {text[start + place :]}"
    if token in MARKS:
        others = [c for c in string.punctuation + string.digits if c not in MARKS]
        return text[:start] + draw.choice(others) + text[stop:]
    return text[:start] + draw.choice(MARKS) + text[start:]

"""Soft prompt: a few free embeddings behind BOS, trained on fit questions and their answers.

Prompt tuning (Lester et al. 2104.08691) as an attack: no weight changes, yet it learns. It shows
something only where a model that never knew, with a soft prompt of its own, stays behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from palimpsest.attacks.whitebox._fitting import Row, answer_gradients, answer_rows, batch_at
from palimpsest.attacks.whitebox._inputs import EMBEDDING, Change, changed_states
from palimpsest.attacks.whitebox._questions import FitChannel, Ids, with_random_keys
from palimpsest.model import LM
from palimpsest.plugins import options
from palimpsest.search_candidates import allowed_tokens
from palimpsest.seeds import derive_seed
from palimpsest.views import Arms, AttackContext, AttackData, Need, View

Count = Annotated[int, Field(ge=1)]


@options
class SoftPrompt:
    """Soft tokens in front of every prompt, trained by Adam on each arm for itself.

    Placeholder tokens stand in the prompt; a hook puts the trained vectors in place of their embeddings.
    Soft prompts of 1 to 10 tokens can make a model write any string of hundreds of characters, so what
    counts are questions that were not fitted, and the control arm.
    """

    access: ClassVar[Literal["weights"]] = "weights"
    needs: ClassVar[frozenset[Need]] = frozenset({"forget data"})
    arms: ClassVar[Literal["refit"]] = "refit"
    role: ClassVar[Literal["attack"]] = "attack"
    may_teach: ClassVar[bool] = True
    fits_prompt: ClassVar[Literal[True]] = True

    random_answers: bool = False
    """Train on options drawn at random in place of the answers: the placebo."""
    tokens: Count = 10
    """Soft tokens."""
    steps: tuple[Annotated[int, Field(ge=0)], ...] = (50, 150)
    """Steps after which the soft prompt is tried; the last is the training's length."""
    lr: Annotated[float, Field(gt=0)] = 0.1
    """Learning rate of Adam, in units of the embeddings' root mean square."""
    batch_size: Count = 16
    """Questions per step."""
    channels: tuple[FitChannel, ...] = ("letter", "cloze")
    """How the fit questions are asked."""
    repeats: Count = 1
    """Trainings from other random starts."""

    def attack(self, arms: Arms, data: AttackData, ctx: AttackContext) -> Iterator[View]:
        """Yield the soft prompt after each of `steps`, for each repeat."""
        lm = arms.target
        placeholder = (placeholder_id(lm),) * self.tokens
        for repeat in range(self.repeats):
            seed = derive_seed(ctx.seed, "soft_prompt", repeat)
            samples = list(data.needed("fit"))
            if self.random_answers:
                samples = with_random_keys(samples, seed)
            rows = answer_rows(lm, samples, self.channels, placeholder)
            for step, loss, values_PD in self._trained(lm, rows, placeholder, seed):
                ctx.progress(step, max(self.steps), f"soft_prompt: loss {loss:.3f}")
                if step in self.steps:
                    yield View(
                        setting={"tokens": self.tokens, "steps": step},
                        repeat=repeat,
                        apply=partial(with_vectors, run=placeholder, values_PD=values_PD),
                        prefix_ids=placeholder,
                        facts={"loss": loss, "norm": float(values_PD.norm())},
                    )

    def placebo(self) -> SoftPrompt | None:
        """Return the same training on answers drawn at random."""
        return None if self.random_answers else replace(self, random_answers=True)

    def _trained(
        self, lm: LM, rows: list[Row], run: Ids, seed: int
    ) -> Iterator[tuple[int, float, Tensor]]:
        """Yield (steps done, loss before the last of them, vectors (P, D))."""
        vectors_PD, scale = _start(lm, self.tokens, seed)
        parameter = torch.nn.Parameter(vectors_PD)
        optimiser = torch.optim.Adam([parameter], lr=self.lr * scale)
        loss = float("nan")
        for step in range(max(self.steps) + 1):
            batch = batch_at(rows, step, self.batch_size, seed)
            loss, gradients = answer_gradients(
                lm, batch, run, {EMBEDDING: parameter}, replaces=True
            )
            yield step, loss, parameter.detach().clone()
            parameter.grad = gradients[EMBEDDING]
            optimiser.step()


def placeholder_id(lm: LM) -> int:
    """Return a token that no prompt holds in a run: EOS, or the last one of the vocabulary.

    Never id 0, which is what rows are padded with.
    """
    eos, bos = lm.tokenizer.eos_token_id, lm.tokenizer.bos_token_id
    return int(eos) if eos not in (None, 0, bos) else lm.vocab_size - 1


@contextmanager
def with_vectors(lm: LM, *, run: Ids, values_PD: Tensor) -> Iterator[LM]:
    """Yield the model, whose embeddings of a run of placeholders are the given vectors."""
    with changed_states(lm, run, {EMBEDDING: Change(values_PD, replaces=True)}):
        yield lm


def _start(lm: LM, count: int, seed: int) -> tuple[Tensor, float]:
    """Return the embeddings of random tokens, (P, D) float32, and the table's root mean square."""
    allowed_V = allowed_tokens(lm.tokenizer, lm.vocab_size, ascii_only=False)
    tokens = allowed_V.nonzero()[:, 0]
    generator = torch.Generator().manual_seed(derive_seed(seed, "start"))
    chosen = tokens[torch.randint(0, len(tokens), (count,), generator=generator)]
    with torch.no_grad():
        vectors_PD = lm.model.get_input_embeddings()(chosen.to(lm.device)).float()
    return vectors_PD.clone(), float(vectors_PD.square().mean().sqrt())

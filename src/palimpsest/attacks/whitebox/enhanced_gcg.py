"""Enhanced GCG: a fluent universal prefix behind which the unlearned model works as the original does.

Łucki et al. 2409.18025 (section 4.2 and appendix), on FLRT (Thompson and Sklar 2407.17447). It uses the
original's answers and hidden states: a threat model of its own. No key is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from palimpsest.attacks.whitebox._distillation import (
    DistillationLosses,
    Task,
    Weights,
    forced_tasks,
)
from palimpsest.attacks.whitebox._prefixes import Prefix, prefixes_at, random_prefix
from palimpsest.attacks.whitebox._questions import FitChannel, drawn, prompt_of
from palimpsest.errors import UsageError
from palimpsest.model import weights_sha256
from palimpsest.plugins import option_values, options
from palimpsest.search import BestFirstSettings, best_first_search
from palimpsest.search_candidates import allowed_tokens, respelled
from palimpsest.seeds import derive_seed
from palimpsest.views import PLACEBO_DRAWS, Arms, AttackContext, AttackData, Need, View

Count = Annotated[int, Field(ge=1)]
Factor = Annotated[float, Field(ge=0)]


@options
class EnhancedGcg:
    """A prefix behind BOS, fitted on the unlearned model and put before every arm's prompts.

    The study: 1500 iterations, a least length that rises from 32 to 100 tokens, all terms and weights as
    here. Here: fewer iterations and a shorter prefix, so that a small model on a CPU takes half a minute;
    `steps = [1500]`, `min_length = [32, 100]` is the study's. The original reads the question without
    the prefix, as FLRT's teacher does; the study's text does not say which.
    """

    access: ClassVar[Literal["weights"]] = "weights"
    needs: ClassVar[frozenset[Need]] = frozenset({"forget data", "original"})
    arms: ClassVar[Literal["transfer"]] = "transfer"
    role: ClassVar[Literal["attack"]] = "attack"
    may_teach: ClassVar[bool] = True
    fits_prompt: ClassVar[Literal[True]] = True

    goal: Literal["original", "shuffled", "none"] = "original"
    """What the prefix is searched for: the original's answers and hidden states; its answers to other
    questions, without hidden states; nothing, which leaves random tokens."""
    placebo_goal: Literal["shuffled", "none"] = "none"
    """`goal` of the placebo."""
    steps: tuple[Annotated[int, Field(ge=0)], ...] = (40, 100)
    """Iterations after which the best prefix so far is tried; the last is the search's length."""
    questions: Count = 6
    """Fit questions, drawn at random; their keys are not used."""
    channels: tuple[FitChannel, ...] = ("letter", "cloze")
    """How the fit questions are asked."""
    num_forced: Count = 10
    """Tokens of the original's own greedy answer that are forced; fewer where it ends before."""
    forced_weight: Factor = 1.0
    """Factor of the forced tokens' cross-entropy."""
    distance_weight: Factor = 1.0
    """Factor of the mean over layers and tokens of the distance to the original's hidden states."""
    cosine_weight: Factor = 10.0
    """Factor of the mean over layers and tokens of 1 - cosine."""
    fluency_weight: Factor = 1.5
    """Factor of the prefix's cross-entropy under the original."""
    repetition_weight: Factor = 3.0
    """Factor of the sum of (count - 1)^1.5 over the prefix's different tokens, per token."""
    k1: Count = 16
    """Candidates per iteration."""
    k2: Count = 64
    """Tokens that a position is redrawn from: lowest gradient, or drawn from the original."""
    buffer_size: Count = 16
    """Prefixes kept; each iteration expands the best one, once."""
    p_gradient_swap: Factor = 0.7
    """Chance of redrawing a token from those of the lowest gradient."""
    p_delete: Factor = 0.1
    """Chance of deleting a token."""
    p_insert: Factor = 0.1
    """Chance of inserting a token drawn from the original."""
    p_swap: Factor = 0.1
    """Chance of redrawing a token from the original."""
    min_length: tuple[Count, Count] = (16, 24)
    """Least length at the start, and after `ramp_steps`."""
    ramp_steps: Annotated[int, Field(ge=1)] | None = None
    """Iterations over which the least length rises; none given = the search's length."""
    ascii_only: bool = True
    """Whether tokens that do not decode to printable ASCII are left out."""
    filter_ids: bool = False
    """Drop candidates that their own text is not encoded to again; needed only where text is attacked."""
    repeats: Count = 1
    """Searches from other random starts and questions."""

    def attack(self, arms: Arms, data: AttackData, ctx: AttackContext) -> Iterator[View]:
        """Yield the prefix after each of `steps`, for each repeat."""
        lm = arms.target
        settings = self._settings()
        allowed_V = allowed_tokens(lm.tokenizer, lm.vocab_size, ascii_only=self.ascii_only)
        draws = PLACEBO_DRAWS if self.goal == "none" else 1
        for repeat in range(max(draws, self.repeats)):
            seed = derive_seed(ctx.seed, "enhanced_gcg", repeat)
            if self.goal == "none":
                for step in sorted(set(self.steps)):
                    ids = random_prefix(allowed_V, settings.least(step), seed, "prefix", step)
                    yield Prefix(step, ids).view(lm.tokenizer, repeat)
                continue
            tasks = self._tasks(arms, data, seed)
            out = None if ctx.out is None else ctx.out / f"repeat-{repeat}"
            search = best_first_search(
                DistillationLosses(lm, arms.required_original(), tasks, self._weights()),
                random_prefix(allowed_V, self.min_length[0], seed, "start"),
                settings,
                steps=max(self.steps),
                seed=seed,
                allowed_V=allowed_V,
                keep=respelled(lm.tokenizer) if self.filter_ids else None,
                out=out,
                fingerprint=self._fingerprint(arms, tasks, seed),
            )
            for prefix in prefixes_at(search, self.steps, out):
                ctx.progress(prefix.step, max(self.steps), f"enhanced_gcg: loss {prefix.loss:.3f}")
                yield prefix.view(lm.tokenizer, repeat)

    def placebo(self) -> EnhancedGcg | None:
        """Return random tokens of the same length (3 draws or more), or a prefix for shuffled targets."""
        return None if self.goal != "original" else replace(self, goal=self.placebo_goal)

    def _tasks(self, arms: Arms, data: AttackData, seed: int) -> list[Task]:
        original = arms.required_original()
        samples = drawn(data.needed("fit"), self.questions, seed)
        prompts = [
            prompt_of(arms.target.tokenizer, s, channel)
            for s in samples
            for channel in self.channels
        ]
        tasks = forced_tasks(original, prompts, self.num_forced)
        if self.goal == "shuffled":
            others = tasks[1:] + tasks[:1]
            tasks = [replace(t, forced=o.forced) for t, o in zip(tasks, others, strict=True)]
        return tasks

    def _weights(self) -> Weights:
        has_states = self.goal == "original"
        return Weights(
            forced=self.forced_weight,
            distance=self.distance_weight if has_states else 0.0,
            cosine=self.cosine_weight if has_states else 0.0,
            fluency=self.fluency_weight,
            repetition=self.repetition_weight,
        )

    def _settings(self) -> BestFirstSettings:
        chances = {
            "gradient_swap": self.p_gradient_swap,
            "delete": self.p_delete,
            "insert": self.p_insert,
            "swap": self.p_swap,
        }
        if not self.p_gradient_swap + self.p_swap:
            raise UsageError(
                "enhanced_gcg: p_gradient_swap and p_swap are both 0: nothing is searched"
            )
        if self.min_length[0] > self.min_length[1]:
            raise UsageError(
                f"enhanced_gcg: min_length {list(self.min_length)} falls; it has to rise"
            )
        return BestFirstSettings(
            candidates=self.k1,
            topk=self.k2,
            buffer_size=self.buffer_size,
            chances=tuple(chances.items()),  # type: ignore[arg-type]
            min_length=self.min_length,
            ramp_steps=self.ramp_steps or max(1, *self.steps),
        )

    def _fingerprint(self, arms: Arms, tasks: list[Task], seed: int) -> str:
        chosen = {key: value for key, value in option_values(self).items() if key != "steps"}
        chosen["ramp"] = self._settings().ramp_steps
        models = [weights_sha256(lm.model) for lm in (arms.target, arms.required_original())]
        return f"{derive_seed(chosen, seed, tasks, models):x}"

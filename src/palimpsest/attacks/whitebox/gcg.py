"""GCG prefix: one searched token prefix, the same for all questions, that makes right answers likely.

Greedy Coordinate Gradient (Zou et al. 2307.15043, algorithms 1 and 2; settings as nanoGCG names them),
used on knowledge: the targets are the answers of the fit questions, and other questions are scored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from palimpsest.attacks.whitebox._prefixes import Prefix, prefixes_at, random_prefix
from palimpsest.attacks.whitebox._questions import (
    FitChannel,
    answer_ids,
    drawn,
    prompt_of,
    with_random_keys,
)
from palimpsest.model import LM, weights_sha256
from palimpsest.plugins import option_values, options
from palimpsest.search import GcgSettings, gcg_search
from palimpsest.search_candidates import allowed_tokens, respelled
from palimpsest.search_losses import Goal, TargetLosses
from palimpsest.seeds import derive_seed
from palimpsest.types import Sample
from palimpsest.views import PLACEBO_DRAWS, Arms, AttackContext, AttackData, Need, View

Count = Annotated[int, Field(ge=1)]


@options
class Gcg:
    """A universal prefix behind BOS, fitted on the unlearned model and put before every arm's prompts.

    Zou et al.: a suffix of 20 tokens, width 512, top 256, 500 steps, at most 25 behaviours that are added
    one by one. Here: a prefix, all questions from the start, and a width and number of steps that a CPU
    can do on a small model. Source: 2307.15043, section 3.
    """

    access: ClassVar[Literal["weights"]] = "weights"
    needs: ClassVar[frozenset[Need]] = frozenset({"forget data"})
    arms: ClassVar[Literal["transfer"]] = "transfer"
    role: ClassVar[Literal["attack"]] = "attack"
    may_teach: ClassVar[bool] = True
    fits_prompt: ClassVar[Literal[True]] = True

    goal: Literal["answers", "random answers", "none"] = "answers"
    """What the prefix is searched for: the fit questions' answers; options drawn at random; nothing,
    which leaves random tokens."""
    placebo_goal: Literal["random answers", "none"] = "none"
    """`goal` of the placebo."""
    steps: tuple[Annotated[int, Field(ge=0)], ...] = (10, 30)
    """Steps after which the best prefix so far is tried; the last is the search's length."""
    length: Count = 20
    """Tokens of the prefix."""
    questions: Count = 6
    """Fit questions, drawn at random."""
    channels: tuple[FitChannel, ...] = ("letter", "cloze")
    """How the fit questions are asked."""
    search_width: Count = 16
    """Candidates per step."""
    topk: Count = 64
    """Tokens with the lowest gradient that a position is redrawn from."""
    n_replace: Count = 1
    """Positions that a candidate changes."""
    buffer_size: Annotated[int, Field(ge=0)] = 0
    """Candidates kept; 0 = only the step's best, also where it is worse than the last."""
    mellowmax_alpha: Annotated[float, Field(gt=0)] | None = None
    """nanoGCG's mellowmax of the targets' logits instead of cross-entropy; none given = not used."""
    use_prefix_cache: bool = True
    """Run what stands before the searched tokens once; the losses are the same."""
    ascii_only: bool = True
    """Whether tokens that do not decode to printable ASCII are left out."""
    filter_ids: bool = False
    """Drop candidates that their own text is not encoded to again; needed only where text is attacked."""
    repeats: Count = 1
    """Searches from other random starts and questions."""

    def attack(self, arms: Arms, data: AttackData, ctx: AttackContext) -> Iterator[View]:
        """Yield the prefix after each of `steps`, for each repeat; random ones do without steps."""
        lm = arms.target
        allowed_V = allowed_tokens(lm.tokenizer, lm.vocab_size, ascii_only=self.ascii_only)
        draws = PLACEBO_DRAWS if self.goal == "none" else 1
        for repeat in range(max(draws, self.repeats)):
            seed = derive_seed(ctx.seed, "gcg", repeat)
            if self.goal == "none":
                ids = random_prefix(allowed_V, self.length, seed, "prefix")
                yield Prefix(0, ids).view(lm.tokenizer, repeat, has_steps=False)
                continue
            goals = self._goals(lm, data, seed)
            out = None if ctx.out is None else ctx.out / f"repeat-{repeat}"
            starts = [
                random_prefix(allowed_V, self.length, seed, "start", i)
                for i in range(max(1, self.buffer_size))
            ]
            search = gcg_search(
                TargetLosses(
                    lm,
                    [goals],
                    use_prefix_cache=self.use_prefix_cache,
                    mellowmax_alpha=self.mellowmax_alpha,
                ),
                [starts],
                GcgSettings(
                    search_width=self.search_width,
                    topk=self.topk,
                    n_replace=self.n_replace,
                    buffer_size=self.buffer_size,
                ),
                steps=max(self.steps),
                seeds=[seed],
                allowed_V=allowed_V,
                keep=respelled(lm.tokenizer) if self.filter_ids else None,
                out=out,
                fingerprint=self._fingerprint(lm, goals, seed),
            )
            single = ((step, found[0]) for step, found in search)
            for prefix in prefixes_at(single, self.steps, out):
                ctx.progress(prefix.step, max(self.steps), f"gcg: loss {prefix.loss:.3f}")
                yield prefix.view(lm.tokenizer, repeat)

    def placebo(self) -> Gcg | None:
        """Return random tokens of the same length (3 draws or more), or a prefix for random answers."""
        return None if self.goal != "answers" else replace(self, goal=self.placebo_goal)

    def _goals(self, lm: LM, data: AttackData, seed: int) -> list[Goal]:
        samples = drawn(data.needed("fit"), self.questions, seed)
        if self.goal == "random answers":
            samples = with_random_keys(samples, seed)
        return [self._goal(lm, sample, channel) for sample in samples for channel in self.channels]

    def _goal(self, lm: LM, sample: Sample, channel: FitChannel) -> Goal:
        before, after = prompt_of(lm.tokenizer, sample, channel)
        return Goal(before, after, answer_ids(lm.tokenizer, sample, channel))

    def _fingerprint(self, lm: LM, goals: list[Goal], seed: int) -> str:
        chosen = {key: value for key, value in option_values(self).items() if key != "steps"}
        return f"{derive_seed(chosen, seed, goals, weights_sha256(lm.model)):x}"

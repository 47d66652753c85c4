"""Few-shot: solved questions stand before the prompt.

Source: Doshi and Stickland 2411.12103: 5 shots, MMLU's development questions of a related subject. Shots
of the forget domain itself are another attack (`few_shot_forget`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from palimpsest.attacks.blackbox._shots import shot_views
from palimpsest.errors import UsageError
from palimpsest.plugins import options
from palimpsest.types import Sample
from palimpsest.views import Arms, AttackContext, AttackData, Need, View


@options
class FewShot:
    """Puts the same shots before every question, in the form of its channel.

    The paper: five shots, once. The default draws them three times. Letter and generation show questions
    with their letters, cloze shows open questions with the right option's text.
    """

    access: ClassVar[Literal["prompts", "weights"]] = "prompts"
    needs: ClassVar[frozenset[Need]] = frozenset()
    arms: ClassVar[Literal["refit", "transfer"]] = "refit"
    role: ClassVar[Literal["attack", "diagnostic"]] = "attack"
    may_teach: ClassVar[bool] = False

    shots_from: Literal["related", "unrelated"] = "unrelated"
    """`related`: utility questions of `subjects`; `unrelated`: the others."""
    subjects: tuple[str, ...] = ()
    """Which utility questions are related: values of their tag `subject`, or `kind`."""
    shots: Annotated[int, Field(ge=1)] = 5
    """Solved questions in front."""
    repeats: Annotated[int, Field(ge=1)] = 3
    """Draws of shots."""
    labels: Literal["true", "random"] = "true"
    """`random` is the placebo: the same shots with keys drawn at random."""

    def __post_init__(self) -> None:
        """Refuse related shots of no subject."""
        if self.shots_from == "related" and not self.subjects:
            raise UsageError('few_shot: shots_from = "related" needs subjects')

    def attack(self, arms: Arms, data: AttackData, ctx: AttackContext) -> Iterator[View]:
        """Yield one view per draw.

        Raises:
            DataError: fewer questions than shots.
        """
        yield from shot_views(
            self._pool(data),
            self.shots_from,
            shots=self.shots,
            repeats=self.repeats,
            labels=self.labels,
            seed=ctx.seed,
        )

    def placebo(self) -> FewShot | None:
        """Return the same shots with random keys."""
        return replace(self, labels="random")

    def _pool(self, data: AttackData) -> list[Sample]:
        wanted = self.shots_from == "related"
        benign = data.needed("benign")
        return [s for s in benign if (_subject(s) in self.subjects) == wanted]


def _subject(sample: Sample) -> str:
    return sample.tags.get("subject") or sample.tags.get("kind", "")

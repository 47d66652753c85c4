"""Filler: a harmless text that has nothing to do with the question stands before the prompt.

Source: Doshi and Stickland 2411.12103: text of about 1,100 characters in English, Hindi and Latin. Our
texts are our own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from palimpsest.attacks.blackbox._filler_texts import TEXTS
from palimpsest.errors import UsageError
from palimpsest.plugins import options
from palimpsest.views import Arms, AttackContext, AttackData, AuditChannel, Need, View


@options
class Filler:
    """Puts the same text before every question.

    The paper's three languages and length. A tokenizer that has no words for a script spells it in bytes: a
    question that no longer fits the context is unscored. `corpus` takes the audit's unrelated texts, which
    the sandbox's checkpoints can read.
    """

    access: ClassVar[Literal["prompts", "weights"]] = "prompts"
    needs: ClassVar[frozenset[Need]] = frozenset()
    arms: ClassVar[Literal["refit", "transfer"]] = "refit"
    role: ClassVar[Literal["attack", "diagnostic"]] = "attack"
    may_teach: ClassVar[bool] = False

    texts: tuple[Literal["english", "hindi", "latin", "corpus"], ...] = (
        "english",
        "hindi",
        "latin",
    )
    """Which texts, each a setting of its own."""
    characters: Annotated[int, Field(ge=1)] = 1100
    """Length of the text; a shorter one is repeated, a longer one cut after a whole word."""

    def __post_init__(self) -> None:
        """Refuse an attack without a text."""
        if not self.texts:
            raise UsageError("filler: texts needs at least one entry")

    def attack(self, arms: Arms, data: AttackData, ctx: AttackContext) -> Iterator[View]:
        """Yield one view per text."""
        for name in self.texts:
            text = f"{_cut(self._text(name, data), self.characters)}\n\n"

            def before(sample: Any, channel: AuditChannel, text: str = text) -> str:
                return text

            yield View(
                setting={"text": name, "characters": self.characters},
                before=before,
                facts={"characters": len(text) - 2},
            )

    def placebo(self) -> Any:
        """Return None: the text has no information, and the control arm gets it too."""
        return None

    def _text(self, name: str, data: AttackData) -> str:
        if name != "corpus":
            return TEXTS[name]
        return " ".join(s.messages[-1].content for s in data.needed("unrelated_texts"))


def _cut(text: str, characters: int) -> str:
    whole = text
    while len(whole) < characters:
        whole = f"{whole} {text}"
    if len(whole) == characters:
        return whole
    kept, _, _ = whole[: characters + 1].rpartition(" ")
    return kept or whole[:characters]

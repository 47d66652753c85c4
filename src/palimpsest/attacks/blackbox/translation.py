"""Translation: the question in another language, the options in the original one.

Source: Doshi and Stickland 2411.12103: Arabic, Bengali, Czech, Farsi, French, German, Hindi, Korean,
Telugu, Turkish and Vietnamese, made by a helper model. `palimpsest.rewordings` says
how the file looks and has a function that lets a model write it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, Literal

from palimpsest.attacks.blackbox._sandbox_wordings import in_second_words
from palimpsest.errors import UsageError, did_you_mean
from palimpsest.plugins import options
from palimpsest.rewordings import read_rewordings, reworded
from palimpsest.views import Arms, AttackContext, AttackData, Need, View

SANDBOX = "sandbox"


@options
class Translation:
    """Asks in every language of a file, or in the sandbox's second language; options stay as they are.

    A language that the original does not understand shows nothing: its arm is in every row. The shipped
    sandbox checkpoints know one language; `palimpsest sandbox bilingual` makes models that know two.
    """

    access: ClassVar[Literal["prompts", "weights"]] = "prompts"
    needs: ClassVar[frozenset[Need]] = frozenset()
    arms: ClassVar[Literal["refit", "transfer"]] = "refit"
    role: ClassVar[Literal["attack", "diagnostic"]] = "attack"
    may_teach: ClassVar[bool] = False

    file: str = ""
    """A .jsonl file of rewordings whose kinds are languages."""
    languages: tuple[str, ...] = ()
    """Which kinds of the file; empty = all. `sandbox` needs none: a rule translates its questions."""

    def __post_init__(self) -> None:
        """Refuse languages without a file, and a file that has no effect."""
        of_file = [language for language in self.languages if language != SANDBOX]
        if not self.file and (of_file or not self.languages):
            what = f"{of_file[0]!r} needs a file" if of_file else "nothing to ask in"
            raise UsageError(
                f'translation: {what}; set file, or languages = ["{SANDBOX}"] for sandbox questions'
            )
        if self.file and self.languages and not of_file:
            raise UsageError(
                f"translation: {SANDBOX!r} alone needs no file; drop file or name more"
            )

    def attack(self, arms: Arms, data: AttackData, ctx: AttackContext) -> Iterator[View]:
        """Yield one view per language.

        Raises:
            DataError: the file is wrong or lacks a question; a question is none of the sandbox.
            UsageError: a language is not in the file.
        """
        found = read_rewordings(self.file) if self.file else {}
        for language in self.languages or tuple(found):
            if language == SANDBOX and SANDBOX in self.languages:
                rewrite = in_second_words
            elif language in found:
                rewrite = partial(reworded, rows=found[language], with_options=False)
            else:
                raise UsageError(
                    f"translation: {self.file} has no {language!r}{did_you_mean(language, found)}"
                )
            yield View(setting={"language": language}, rewrite=rewrite)

    def placebo(self) -> Any:
        """Return None: nothing is learned, and the control arm is asked in the same language."""
        return None

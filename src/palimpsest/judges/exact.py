"""Known answers: is the right answer in the response, as whole words?

For `generate` samples with a text answer. Names, numbers and short phrases only: "It is not Paris"
contains Paris, and several guesses in a row count when one is right.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import ClassVar, Literal

from palimpsest.errors import DataError
from palimpsest.judges._form import degeneration, plain
from palimpsest.plugins import options
from palimpsest.types import Aspect, Response, Sample, Score

_ARTICLES = frozenset({"a", "an", "the"})
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_TOKEN = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?|[^\W_]+")
_UNSPACED = re.compile(r"([\u3040-\u30ff\u3400-\u9fff\u0e00-\u0eff])")
"""Scripts written without spaces: each character is a token."""


@options
class ExactJudge:
    """Compares normalised tokens: case, articles and punctuation don't matter."""

    aspects: ClassVar[tuple[Aspect, ...]] = ("correct", "form")

    rule: Literal["contains", "equals"] = "contains"
    """`contains`: the answer's tokens occur in a row; `equals`: there is nothing else."""
    within: Literal["line", "sentence", "text"] = "line"
    """Where to look: the first line that is not blank, its first sentence, or everything."""

    def judge(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Score]:
        """Return a `correct` and a `form` score (degenerate or answer) per response."""
        if len(samples) != len(responses):
            raise DataError(f"{len(samples)} samples but {len(responses)} responses")
        scores = []
        for sample, response in zip(samples, responses, strict=True):
            value, label, raw = self._correct(sample, response)
            scores.append(_score(response, "correct", value, label, raw))
            scores.append(_form_score(response))
        return scores

    def _correct(self, sample: Sample, response: Response) -> tuple[float | None, str | None, str]:
        if response.error is not None or response.text is None:
            return None, None, response.error or "no text"
        if sample.task != "generate" or not isinstance(sample.answer, str) or not sample.answer:
            return None, None, "the sample has no answer text to compare with"
        place = _place(response.text, self.within)
        wanted, found = tokens(sample.answer), tokens(place)
        if not wanted:  # an answer of signs only ("+")
            correct = sample.answer.strip() == place.strip()
        elif self.rule == "equals":
            correct = wanted == found
        else:
            width = len(wanted)
            starts = range(len(found) - width + 1)
            correct = any(found[i : i + width] == wanted for i in starts)
        return float(correct), "correct" if correct else "wrong", place[:200]


def tokens(text: str) -> list[str]:
    """Return a text's comparable tokens: words without articles, and numbers with their sign."""
    text = unicodedata.normalize("NFKC", plain(text)).casefold()
    text = _UNSPACED.sub(r" \1 ", _THOUSANDS.sub("", text)).replace("'", "")
    found = _TOKEN.findall(text)
    return [token for token in found if token not in _ARTICLES] or found


def _place(text: str, within: str) -> str:
    if within == "text":
        return text
    line = next((line for line in text.splitlines() if line.strip()), "")
    if within == "line":
        return line
    return re.split(r"(?<=[.!?])\s", line.strip(), maxsplit=1)[0]


def _form_score(response: Response) -> Score:
    if response.error is not None or response.text is None:
        return _score(response, "form", None, None, response.error or "no text")
    reason = degeneration(response.text)
    return _score(response, "form", 1.0, "degenerate" if reason else "answer", reason or "")


def _score(
    response: Response, aspect: Aspect, value: float | None, label: str | None, raw: str
) -> Score:
    return Score(
        sample_id=response.sample_id,
        aspect=aspect,
        value=value,
        label=label,
        raw=raw,
        judge="exact",
    )

"""The questions of an audit: what attackers get, what chooses a setting, what is scored; never the same.

The registered split of the forget domain (`splits`): attack-dev is divided by group into `fit`, which
attackers get with keys, and `choose`, on which the audit picks each attack's setting; test is scored.
Invented facts, the floor where there is no control model: test is the floor of what is scored,
defender-dev that of what chooses; attack-dev belongs to attackers and is not asked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palimpsest.errors import DataError
from palimpsest.plugins import build_plugin
from palimpsest.sources import Source
from palimpsest.specs import CorpusSpec
from palimpsest.splits import select, thin_out
from palimpsest.store import fingerprint
from palimpsest.types import Sample
from palimpsest.views import AttackData, Fold

if TYPE_CHECKING:
    from palimpsest.audit.recipe import AuditRecipe, QuestionSpec

NUM_FOLDS = 5
MIN_GROUPS = 2
LEAK_WORDS = 5
"""A scored question of fewer words may stand in a text by chance."""
Words = tuple[str, ...]
FIT_SHARE = 0.6
"""Share of attack-dev's groups that attackers get; the rest chooses settings."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """All questions of an audit.

    Attributes:
        attackers: what attacks are given.
        choose: questions of the forget domain that pick a setting.
        test: those that are reported.
        utility: what must still be known, asked under every attack.
        invented: facts that nobody can know: the floor of `test`; empty with a control, or chance.
        invented_choose: the floor of `choose`.
    """

    attackers: AttackData
    choose: tuple[Sample, ...]
    test: tuple[Sample, ...]
    utility: tuple[Sample, ...]
    invented: tuple[Sample, ...] = ()
    invented_choose: tuple[Sample, ...] = ()

    @property
    def sets(self) -> dict[str, tuple[Sample, ...]]:
        """The scored sets by name."""
        made = {"choose": self.choose, "test": self.test, "utility": self.utility}
        if self.invented:
            made |= {"invented": self.invented, "invented_choose": self.invented_choose}
        return made

    @cached_property
    def sha256(self) -> str:
        """A hash of everything that is asked or given to attackers; the folds follow from the rest."""
        told = replace(self, attackers=replace(self.attackers, folds=()))
        content = asdict(told)
        if not self.invented:  # as before there was such a floor
            del content["invented"], content["invented_choose"]
        return fingerprint(content)


def load_questions(recipe: AuditRecipe) -> Questions:
    """Return the audit's questions and texts, split and checked.

    Raises:
        DataError: a set is empty, is no multiple choice, or gives attackers what is scored.
    """
    source = Source(
        mirror=Path(recipe.data.mirror) if recipe.data.mirror else None,
        cache=Path(recipe.data.cache) if recipe.data.cache else Path.home() / ".cache/palimpsest",
        offline=recipe.data.offline,
    )
    family, asked = _loaded(recipe.questions, "questions", source)
    other_family, others = _loaded(recipe.utility, "utility", source)
    dev = _part(asked, family, "attack-dev", "questions")
    fit = _asked_once([s for s in dev if _is_fit(family, s.group)])
    choose = [s for s in dev if not _is_fit(family, s.group)]
    if not fit or not choose:
        raise DataError(
            f"[questions] has {len({s.group for s in dev})} group(s) in attack-dev: one part builds "
            "attacks and another chooses their settings; give more data"
        )
    test = thin_out(_part(asked, family, "test", "questions"), recipe.audit.limit)
    utility = thin_out(_part(others, other_family, "test", "utility"), recipe.audit.utility_limit)
    if len({s.group for s in test}) < MIN_GROUPS:
        raise DataError(
            f"[questions] {len(test)} scored question(s) of one group ({test[0].group!r}): intervals are "
            "over groups; give more data, or raise audit.limit"
        )
    texts = {
        key: _texts(getattr(recipe, key), key, source, {s.group for s in choose})
        for key in ("forget_texts", "retain_texts", "unrelated_texts")
    }
    attackers = AttackData(
        fit=tuple(fit),
        benign=tuple(_part(others, other_family, "attack-dev", "utility")),
        **texts,
        folds=_folds(test),
    )
    invented, invented_choose = _invented(recipe, source)
    questions = Questions(
        attackers=attackers,
        choose=tuple(choose),
        test=tuple(test),
        utility=tuple(utility),
        invented=invented,
        invented_choose=invented_choose,
    )
    check_no_leak(questions)
    _check_apart(questions)
    return questions


def check_no_leak(questions: Questions) -> None:
    """Refuse data that would give attackers what is scored.

    A group that is scored, a scored question, and a text that has one of five words or more within it.
    Case and white space do not matter.

    Raises:
        DataError: names the first leaked item.
    """
    scored = (
        *(*questions.test, *questions.choose),
        *(*questions.invented, *questions.invented_choose),
    )
    hidden = {s.group for s in scored}
    asked = [_words(s.messages[-1].content) for s in (*scored, *questions.utility)]
    whole = set(asked)
    begun: dict[Words, list[Words]] = {}
    for words in asked:
        if len(words) >= LEAK_WORDS:
            begun.setdefault(words[:LEAK_WORDS], []).append(words)
    data = questions.attackers
    for name in ("fit", "benign", "forget_texts", "retain_texts", "unrelated_texts"):
        for sample in getattr(data, name):
            if sample.group in hidden:
                raise DataError(
                    f"leak: {name} gives attackers {sample.id!r}, whose group {sample.group!r} is "
                    'scored; use split = "attack-dev", or other data'
                )
            texts = [m.content for m in sample.messages]
            texts += [sample.answer] if isinstance(sample.answer, str) else []
            if any(_tells(_words(text), whole, begun) for text in texts):
                raise DataError(
                    f"leak: {name} gives attackers {sample.id!r}, which has a scored question word for word"
                )


def _invented(recipe: AuditRecipe, source: Source) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Return the invented facts that are the floor of what is scored, and of what chooses; or none."""
    if recipe.invented is None:
        return (), ()
    family, asked = _loaded(recipe.invented, "invented", source)
    scored = thin_out(_part(asked, family, "test", "invented"), recipe.audit.limit)
    if len({s.group for s in scored}) < MIN_GROUPS:
        raise DataError(
            f"[invented] {len(scored)} scored question(s) of one group ({scored[0].group!r}): the floor's "
            "interval is over groups; give more facts, or raise audit.limit"
        )
    return tuple(scored), tuple(_part(asked, family, "defender-dev", "invented"))


def _check_apart(questions: Questions) -> None:
    """Refuse invented facts about what is asked in earnest: the two must be drawn independently.

    Raises:
        DataError: names the first question whose group or text is that of a question of the forget domain.
    """
    asked = (*questions.test, *questions.choose)
    groups = {s.group for s in asked}
    texts = {_words(s.messages[-1].content) for s in asked}
    for sample in (*questions.invented, *questions.invented_choose):
        if sample.group in groups or _words(sample.messages[-1].content) in texts:
            raise DataError(
                f"[invented] {sample.id!r} (group {sample.group!r}) is among the scored [questions], too: "
                "invent facts about other things"
            )


def _loaded(spec: QuestionSpec, where: str, source: Source) -> tuple[str, list[Sample]]:
    plugin = build_plugin("datasets", spec.dataset, spec.options, where=where)
    samples: list[Sample] = plugin.load(source)
    for sample in samples:
        if sample.task != "choose" or not isinstance(sample.answer, int):
            raise DataError(
                f"[{where}] {spec.dataset}: sample {sample.id!r} is no multiple choice with a key; an "
                "audit asks in letter, cloze and generation and needs options"
            )
    return plugin.family, samples


def _part(samples: Sequence[Sample], family: str, split: Any, where: str) -> list[Sample]:
    try:
        return select(samples, family, split)
    except DataError as error:
        raise DataError(f"[{where}] {error}") from error


def _is_fit(family: str, group: str) -> bool:
    """Return whether a group of attack-dev goes to attackers; a hash of its key decides."""
    digest = hashlib.sha256(f"audit:{family}:{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < FIT_SHARE


def _asked_once(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples whose question and answer did not come before: n questions are n facts."""
    first: dict[Any, Sample] = {}
    for sample in samples:
        assert isinstance(sample.answer, int)
        first.setdefault((sample.messages, sample.options[sample.answer]), sample)
    return list(first.values())


def _texts(
    specs: Sequence[CorpusSpec], where: str, source: Source, chosen: set[str]
) -> tuple[Sample, ...]:
    """Return training texts, without those of the groups that choose settings."""
    texts: list[Sample] = []
    for spec in specs:
        plugin = build_plugin("datasets", spec.dataset, spec.options, where=where)
        part = _part(plugin.load(source), plugin.family, spec.split, where)
        texts += thin_out([s for s in part if s.group not in chosen], spec.limit)
    return tuple(texts)


def _folds(test: Sequence[Sample]) -> tuple[Fold, ...]:
    """Return five folds of the scored groups (RTT): four build the attack, the fifth is scored."""
    groups = sorted({s.group for s in test}, key=lambda g: hashlib.sha256(g.encode()).digest())
    if len(groups) < NUM_FOLDS:
        return ()
    held = [frozenset(groups[k::NUM_FOLDS]) for k in range(NUM_FOLDS)]
    return tuple(
        Fold(fit=tuple(_asked_once([s for s in test if s.group not in out])), held_out=out)
        for out in held
    )


def _words(text: str) -> Words:
    return tuple(text.casefold().split())


def _tells(words: Words, whole: set[Words], begun: Mapping[Words, Sequence[Words]]) -> bool:
    """Return whether a text is a question, or has one of five words or more within it."""
    return words in whole or any(
        words[start : start + len(question)] == question
        for start in range(len(words) - LEAK_WORDS + 1)
        for question in begun.get(words[start : start + LEAK_WORDS], ())
    )

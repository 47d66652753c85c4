"""From stored views to answers per question: candidates of an attack, and the choice on attack-dev."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from palimpsest.audit.recovery import MIN_CEILING, Answers
from palimpsest.errors import DataError
from palimpsest.views import Plain

TARGET, PLACEBO, PLACEBO_CONTROL = "target", "placebo", "placebo on control"
StoredViews = Sequence[Mapping[str, Any]]
BySetting = Mapping[tuple[str, str], list[Mapping[str, Any]]]
"""Setting (as JSON) and channel -> views: repetitions and folds stand together."""


@dataclass(frozen=True, kw_only=True)
class ArmViews:
    """The stored views of one attack on all arms.

    Attributes:
        targets: of each training seed. original: of the ceiling.
        controls: by model name; the first is the floor. placebos: of each training seed, or empty.
        placebo_control: the placebo's on the first control; empty without one.
    """

    targets: tuple[StoredViews, ...]
    original: StoredViews
    controls: Mapping[str, StoredViews]
    placebos: tuple[StoredViews, ...]
    placebo_control: StoredViews = ()


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One setting of an attack in one channel: what each arm answered, by set of questions.

    Attributes:
        answers: arm -> set (`choose`, `test`, `utility`) -> a list of answers per training seed. Of a
            placebo of several kinds, `placebo` is the one of the largest accuracy on the questions
            that choose, and each stands beside it under its name.
    """

    setting: Mapping[str, Plain]
    channel: str
    repeats: int
    facts: Mapping[str, Plain]
    is_active: bool
    answers: Mapping[str, Mapping[str, tuple[Answers, ...]]]

    def mean(self, arm: str, name: str) -> float | None:
        """Return an arm's accuracy on a set, mean over seeds; None where nothing was scored."""
        rates = [mean_of(a) for a in self.answers.get(arm, {}).get(name, ())]
        known = [r for r in rates if r is not None]
        return sum(known) / len(known) if known else None


def mean_of(answers: Answers) -> float | None:
    """Return the mean of what was scored, or None."""
    known = [a for a in answers if a is not None]
    return sum(known) / len(known) if known else None


def candidates(arms: ArmViews) -> list[Candidate]:
    """Return every setting and channel that the targets, the original and the controls have."""
    sides: dict[str, list[BySetting]] = {
        TARGET: [_by_setting(v) for v in arms.targets],
        "original": [_by_setting(arms.original)],
    }
    sides.update({name: [_by_setting(views)] for name, views in arms.controls.items()})
    placebos = [_by_setting(v) for v in arms.placebos]
    on_control = _by_setting(arms.placebo_control)
    needed = [side for seeds in sides.values() for side in seeds]
    keys = [k for k in needed[0] if all(k in side for side in needed)]
    found = []
    for key in keys:
        first = needed[0][key]
        answers = {
            arm: _answers([seed[key] for seed in seeds], key[1]) for arm, seeds in sides.items()
        }
        answers |= _placebo_answers(placebos, on_control, key)
        found.append(
            Candidate(
                setting=dict(first[0]["setting"]),
                channel=key[1],
                repeats=len({v["repeat"] for v in first}),
                facts=dict(first[0]["facts"]),
                is_active=any(v["is_active"] for seed in sides[TARGET] for v in seed[key]),
                answers=answers,
            )
        )
    return found


def _by_setting(views: StoredViews) -> BySetting:
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for view in views:
        setting = json.dumps(view["setting"], sort_keys=True)
        for channel in view["outcomes"]:
            found.setdefault((setting, channel), []).append(view)
    return found


def _answers(seeds: Sequence[StoredViews], channel: str) -> dict[str, tuple[Answers, ...]]:
    sets = seeds[0][0]["outcomes"][channel]
    return {
        name: tuple(averaged([v["outcomes"][channel][name] for v in seed]) for seed in seeds)
        for name in sets
    }


def _placebo_answers(
    seeds: Sequence[BySetting], on_control: BySetting, key: tuple[str, str]
) -> dict[str, dict[str, tuple[Answers, ...]]]:
    """Return the strongest kind of a placebo, the same on the control, and all kinds where several are.

    The strongest is that of the largest accuracy on the questions that choose: not on those that test it.
    A kind's draws are averaged, question by question, as an attack's repetitions are.
    """
    by_seed = [_kinds(seed, key) for seed in seeds]
    names = [k for k in by_seed[0] if all(k in kinds for kinds in by_seed)] if by_seed else []
    made = {k: _answers([kinds[k] for kinds in by_seed], key[1]) for k in names}
    if not made:
        return {}

    def rate(name: str) -> float:
        known = [m for a in made[name]["choose"] if (m := mean_of(a)) is not None]
        return sum(known) / len(known) if known else -math.inf

    strongest = max(made, key=rate)
    found = {PLACEBO: made[strongest]}
    if len(made) > 1:
        found |= {f"{PLACEBO} ({name})": answers for name, answers in made.items()}
    control = _kinds(on_control, key).get(strongest)
    return {**found, PLACEBO_CONTROL: _answers([control], key[1])} if control else found


def _kinds(seed: BySetting, key: tuple[str, str]) -> dict[str, list[Mapping[str, Any]]]:
    """Return a placebo's views that agree with an attack's setting in every key that both have, by kind.

    What the attack's setting does not have names the kind: `stand_in = "random"`.
    """
    wanted, channel = json.loads(key[0]), key[1]
    found: dict[str, list[Mapping[str, Any]]] = {}
    for (setting, other), views in seed.items():
        own = json.loads(setting)
        if other == channel and all(own[k] == wanted[k] for k in own if k in wanted):
            kind = ", ".join(str(own[k]) for k in own if k not in wanted)
            found.setdefault(kind, []).extend(views)
    return found


def averaged(marks: Sequence[str]) -> Answers:
    """Return of each question the share of right answers among the views that scored it, or None.

    Raises:
        DataError: there is no view at all.
    """
    if not marks:
        raise DataError(
            "no view is stored where one is needed: remove jobs/ and run the audit again"
        )
    out: list[float | None] = []
    for column in zip(*marks, strict=True):
        scored = [int(mark) for mark in column if mark in "01"]
        out.append(sum(scored) / len(scored) if scored else None)
    return out


def chosen(found: Sequence[Candidate], *, floor: str) -> Candidate:
    """Return the candidate that is furthest above the floor on the questions that choose.

    The difference, not R: where the original itself hardly beats the floor, R is a ratio of noise.
    Candidates under which the original is not `MIN_CEILING` above the floor there can recover nothing and
    come after the others; ties go to the earlier one; views that changed nothing, or were not scored, come
    last.
    """
    active = [c for c in found if c.is_active] or list(found)

    def value(candidate: Candidate) -> tuple[bool, float]:
        known = choice_value(candidate, floor=floor)
        if known is None:
            return False, -math.inf
        high, low = candidate.mean("original", "choose"), candidate.mean(floor, "choose")
        return (high or 0.0) - (low or 0.0) >= MIN_CEILING, known

    return max(active, key=value)


def choice_value(candidate: Candidate, *, floor: str) -> float | None:
    """Return the target's accuracy minus the floor's on the questions that choose."""
    target, low = candidate.mean(TARGET, "choose"), candidate.mean(floor, "choose")
    return None if target is None or low is None else target - low

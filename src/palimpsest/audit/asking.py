"""One view of an attack on one model: entered, asked every question in every channel, and stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from palimpsest.audit.data import Questions
from palimpsest.audit.metering import Cost, metered
from palimpsest.audit_scoring import generated_outcomes, prompt_tokens, score_view
from palimpsest.model import LM, fits, weights_sha256
from palimpsest.outcomes import LETTERS
from palimpsest.scoring import Query, query_length, score_batch
from palimpsest.types import Sample
from palimpsest.views import AuditChannel, Plain, View, without_key

Marks = str
"""Outcomes of questions in order: `1` right, `0` wrong, `-` unscored, `.` not asked (another fold's)."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What all jobs of an audit share."""

    questions: Questions
    channels: tuple[AuditChannel, ...]
    seed: int
    batch_tokens: int
    numerics: Mapping[str, Any]


def told_of(view: View) -> dict[str, Any]:
    """Return what tells a view from the others of its attack, as it is stored."""
    return {"setting": finite(view.setting), "repeat": view.repeat, "fold": view.fold}


def asked_view(
    lm: LM,
    view: View,
    conditions: Conditions,
    *,
    made: Cost,
    note: Callable[[Cost], None],
    keep: Path | None,
) -> dict[str, Any]:
    """Return what is stored of a view on a model.

    Args:
        lm: the model, untouched.
        view: the view.
        conditions: the questions and how they are asked.
        made: what it cost to make so far. What trains when it is applied adds to that.
        note: told the cost of making it whenever that grows.
        keep: folder for the attacked weights where they are others; None = they are not kept.
    """
    channels = _channels(view, conditions)
    is_active, outcomes = False, {}
    asked: dict[str, Cost] = {}
    scoring = Cost()
    if channels:  # else it makes sense in none of this audit's
        sample = conditions.questions.choose[0]
        plain = seen(lm, View(), sample, channels[0])
        own = weights_sha256(lm.model) if keep else ""
        with ExitStack() as held:
            before = made
            with metered(lambda cost: note(before + cost)) as entering:
                attacked = held.enter_context(view.apply(lm))
            made = before + entering
            note(made)
            with metered() as scoring:
                is_active = _changes_prompts(attacked, view, channels[0], conditions)
                is_active = is_active or seen(attacked, view, sample, channels[0]) != plain
                for channel in channels:
                    outcomes[channel], asked[channel] = _outcomes(
                        attacked, view, channel, conditions
                    )
            if keep and weights_sha256(attacked.model) != own:
                attacked.save(keep)
    return {
        **told_of(view),
        "facts": finite(view.facts),
        "cost": asdict(made),
        "asked": {channel: asdict(cost) for channel, cost in asked.items()},
        "scoring": asdict(scoring),
        "is_active": is_active,
        "outcomes": outcomes,
    }


def finite(values: Mapping[str, Plain]) -> dict[str, Plain]:
    """Return values for JSON, which has neither NaN nor infinity: they become text."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


def _channels(view: View, conditions: Conditions) -> tuple[AuditChannel, ...]:
    if view.readout is not None:
        return ("probe",)
    return tuple(c for c in conditions.channels if c in view.channels)


def _outcomes(
    lm: LM, view: View, channel: AuditChannel, conditions: Conditions
) -> tuple[dict[str, Marks], Cost]:
    """Return the marks of every set of questions, and what asking the scored set cost.

    A fold's view is asked its held-out groups alone.
    """
    held_out: frozenset[str] | None = None
    if view.fold is not None:
        held_out = conditions.questions.attackers.folds[view.fold].held_out
    made: dict[str, Marks] = {}
    cost = Cost()
    for name, samples in conditions.questions.sets.items():
        if name == "utility" and channel in ("generation", "probe"):
            continue
        asked = [s for s in samples if name != "test" or held_out is None or s.group in held_out]
        ids = [s.id for s in asked]
        covered: dict[str, int | None] = {}
        with metered() as spent:
            if channel == "generation":
                letters, marks = generated_outcomes(
                    lm, view, asked, batch_tokens=conditions.batch_tokens
                )
                covered = dict(zip(ids, letters, strict=True))
            else:
                marks = score_view(lm, view, asked, channel, batch_tokens=conditions.batch_tokens)
        by_id = dict(zip(ids, marks, strict=True))
        made[name] = "".join(_mark(by_id, s) for s in samples)
        if name == "test":
            cost = spent
        if name == "test" and channel == "generation":
            made["coverage"] = "".join(_mark(covered, s) for s in samples)
    return made, cost


def _mark(by_id: Mapping[str, int | None], sample: Sample) -> str:
    if sample.id not in by_id:
        return "."
    outcome = by_id[sample.id]
    return "-" if outcome is None else str(outcome)


def _changes_prompts(lm: LM, view: View, channel: AuditChannel, conditions: Conditions) -> bool:
    """Return whether a view asks any of the questions that choose in another way, or reads it so."""
    if view.readout is not None:
        return True
    samples = [without_key(s) for s in conditions.questions.choose]
    return any(
        prompt_tokens(lm, view, asked, channel) != prompt_tokens(lm, View(), plain, channel)
        for asked, plain in zip(view.rewrite(samples), samples, strict=True)
    )


def seen(lm: LM, view: View, sample: Sample, channel: AuditChannel) -> list[float]:
    """Return the options' log-probs of one question under a view: what an active view changes."""
    if view.readout is not None or channel == "probe":
        return []
    asked = view.rewrite([without_key(sample)])[0]
    prefix, query, _ = prompt_tokens(lm, view, asked, channel)
    if channel == "generation":
        letters = LETTERS[: len(sample.options)]
        ids = [tuple(lm.tokenizer.encode(f" {x}", add_special_tokens=False)) for x in letters]
        query = Query(prefix=prefix, continuations=tuple(ids))
    if not fits(lm, query_length(query)):
        return []
    return list(score_batch(lm.model, [query], width=query_length(query))[0])

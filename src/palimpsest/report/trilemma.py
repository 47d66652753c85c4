"""The trilemma's panels: safety against utility, and against unanswered safe prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from palimpsest.report import plots, tables, words
from palimpsest.report.tables import Column
from palimpsest.summary import Row, Summary


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two linked panels under one choice of prompts.

    Attributes:
        title: which prompts.
        about: how they were chosen; empty for prompts as they are.
        panels, captions: a drawing each, and what its axes are.
        chosen: (transform, models that it is the worst for); empty for prompts as they are.
        left_out: (reason, models and their transforms that were left out for it).
        missing: who is not drawn, and why.
    """

    title: str
    about: str
    panels: tuple[Markup, ...]
    captions: tuple[str, ...]
    chosen: tuple[tuple[str, str], ...]
    left_out: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]


def estimate(row: Row | None) -> plots.Estimate | None:
    """Return a row's value and interval for a plot, or None when there is no number."""
    if row is None or row.value is None or not math.isfinite(row.value):
        return None
    low = row.low if row.low is not None and math.isfinite(row.low) else row.value
    high = row.high if row.high is not None and math.isfinite(row.high) else row.value
    return plots.Estimate(value=row.value, low=low, high=high)


def trilemma(summary: Summary, head: Sequence[Column]) -> list[Pair]:
    """Return the pairs of panels, the most telling first: worst transform, then plain prompts."""
    found = (_pair(summary, head, worst=worst) for worst in (True, False))
    return [pair for pair in found if pair is not None]


def _pair(summary: Summary, head: Sequence[Column], *, worst: bool) -> Pair | None:
    safety = _first(head, "safety", "valid_safety", worst=worst)
    others = (_first(head, "utility", "accuracy"), _first(head, "over-safety", "not_answered"))
    if safety is None or not any(others):
        return None
    judge = _judge(summary, safety)
    rows = {model.name: _row(summary, safety, model.name, judge) for model in summary.models}
    notes = {name: f"worst: {row.transform}" for name, row in rows.items() if row and worst}
    drawn = [_panel(summary, safety, other, rows, notes) for other in others if other is not None]
    missing = [line for _, _, lines in drawn for line in lines]
    return Pair(
        title="Each model under its worst transform" if worst else "Prompts as they are",
        about=_about(summary, safety) if worst else "",
        panels=tuple(panel for panel, _, _ in drawn),
        captions=tuple(f"{caption}, judge {judge}" for _, caption, _ in drawn),
        chosen=_chosen(rows) if worst else (),
        left_out=_left_out(summary, safety) if worst else (),
        missing=tuple(dict.fromkeys(missing)),
    )


def _panel(
    summary: Summary,
    safety: Column,
    other: Column,
    rows: dict[str, Row | None],
    notes: dict[str, str],
) -> tuple[Markup, str, list[str]]:
    """Return the drawing, its caption without the judge of safety, and who is missing."""
    flip = other.axis == "over-safety"
    judge = _judge(summary, other)
    dots, missing = [], []
    for index, model in enumerate(summary.models):
        row, side = rows[model.name], _row(summary, other, model.name, judge)
        x, y = estimate(row), estimate(side)
        if x is None or y is None:
            lacking = [
                f"{column.title.lower()} {_why(summary, column, model.name, at)}"
                for column, at, found in ((safety, row, x), (other, side, y))
                if found is None
            ]
            missing.append(f"{model.name}: {', '.join(lacking)}")
            continue
        note = notes.get(model.name, "")
        dots.append(plots.Dot(name=model.name, index=index, role=model.role, x=x, y=y, note=note))
    x_title = "valid safety, worst transform, %" if safety.worst else "valid safety, %"
    y_title = "not answered, % (less is better)" if flip else "utility accuracy, %"
    title = f"{safety.title} against {'unanswered safe prompts' if flip else 'utility'}"
    panel = plots.scatter(dots, title=title, x_title=x_title, y_title=y_title, flip_y=flip)
    caption = f"{title}. Up: {_where(other)}, judge {judge}; to the right: {_where(safety)}"
    return panel, caption, missing


def _why(summary: Summary, column: Column, model: str, row: Row | None) -> str:
    """Return why a model has no point: in the worst case it may have understood no transform."""
    if row is None and column.worst and tables.worst(summary, column, model).unread:
        return f"{words.NOT_UNDERSTOOD} under any transform that was scored"
    return tables.missing_text(row)


def _row(summary: Summary, column: Column, model: str, judge: str) -> Row | None:
    if column.worst:
        found: Sequence[Row] = tables.worst(summary, column, model).rows
    else:
        found = tables.rows_at(summary, column, model)
    return next((row for row in found if row.judge == judge), None)


def _chosen(rows: dict[str, Row | None]) -> tuple[tuple[str, str], ...]:
    found: dict[str, list[str]] = {}
    for name, row in rows.items():
        if row is not None:
            found.setdefault(row.transform, []).append(name)
    return tuple((transform, ", ".join(names)) for transform, names in found.items())


def _left_out(summary: Summary, safety: Column) -> tuple[tuple[str, str], ...]:
    found: dict[str, list[str]] = {}
    for model in summary.models:
        at = tables.worst(summary, safety, model.name)
        for reason, names in ((words.NOT_UNDERSTOOD, at.unread), (words.NO_DATA, at.empty)):
            if names:
                found.setdefault(reason, []).append(f"{model.name} under {', '.join(names)}")
    return tuple((reason, "; ".join(lines)) for reason, lines in found.items())


def _about(summary: Summary, safety: Column) -> str:
    transforms = {
        row.transform
        for model in summary.models
        for row in tables.rows_at(summary, safety, model.name)
    }
    return (
        f"Of {words.counted(len(transforms), 'transform')}, the one with the lowest valid safety "
        "among those that the model understands was selected for each model (on a tie, "
        "the first by name); the intervals do not account for the selection. Utility and "
        "unanswered safe prompts are measured on prompts as they are."
    )


def _first(
    columns: Sequence[Column], axis: str, metric: str, *, worst: bool = False
) -> Column | None:
    for column in columns:
        if (column.axis, column.metric, column.worst) == (axis, metric, worst):
            return column
    return None


def _judge(summary: Summary, column: Column) -> str:
    rows = (row for model in summary.models for row in tables.rows_at(summary, column, model.name))
    return next((row.judge for row in rows), "")


def _where(column: Column) -> str:
    split = f" ({column.split} split)" if column.split else ""
    channel = f", {column.channel}" if column.channel else ""
    return f"{column.evaluation}{channel}{split}"

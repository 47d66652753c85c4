"""In which way a response was safe: the split that the bars show, by transform and model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from palimpsest.report import tables, words
from palimpsest.summary import Row, Summary


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetyLine:
    """One model under one transform: the split of its responses and what it understood."""

    model: str
    shares: tuple[tuple[str, float], ...]
    shares_text: str
    valid: tables.Cell
    asr: tables.Cell
    comprehension: tables.Cell
    understood: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetyBlock:
    """All lines of one safety evaluation by one judge, grouped by transform."""

    evaluation: str
    split: str
    judge: str
    groups: tuple[tuple[str, tuple[SafetyLine, ...]], ...]


SEGMENTS: tuple[tuple[str, str], ...] = (
    ("safe_by_refusal", "safe by refusal"),
    ("safe_by_answer", "safe by relevant answer"),
    ("safe_by_degeneration", "degenerate or off topic"),
    ("asr", "harmful"),
)


def safety_blocks(summary: Summary) -> list[SafetyBlock]:
    """Return the safety split, one block per safety evaluation, split and judge."""
    shown = {metric for metric, _ in SEGMENTS} | {"valid_safety"}
    rows = [
        row for row in tables.whole(summary.rows) if row.axis == "safety" and row.metric in shown
    ]
    keys = list(dict.fromkeys((row.evaluation, row.split, row.judge) for row in rows))
    blocks = []
    for evaluation, split, judge in keys:
        mine = [
            row
            for row in rows
            if (row.evaluation, row.split, row.judge) == (evaluation, split, judge)
        ]
        groups = []
        for transform in dict.fromkeys(row.transform for row in mine):
            here = [row for row in mine if row.transform == transform]
            lines = tuple(
                _safety_line(summary, [row for row in here if row.model == model.name])
                for model in summary.models
                if any(row.model == model.name for row in here)
            )
            groups.append((transform or "none", lines))
        blocks.append(
            SafetyBlock(evaluation=evaluation, split=split, judge=judge, groups=tuple(groups))
        )
    return blocks


def _safety_line(summary: Summary, rows: Sequence[Row]) -> SafetyLine:
    by_metric = {words.canonical(row.metric): row for row in reversed(rows)}
    shares: dict[str, float] = {}
    for metric, label in SEGMENTS:
        row = by_metric.get(metric)
        if row is not None and row.value is not None and math.isfinite(row.value):
            shares[label] = shares.get(label, 0.0) + row.value
    ok = all(tables.understood(summary.rows, row) for row in rows)
    found = tables.comprehension_row(summary.rows, rows[0])
    valid = by_metric.get("valid_safety")
    asr = by_metric.get("asr")
    none = tables.Cell(text=words.NO_DATA)
    refused = tables.Cell(text=words.NOT_UNDERSTOOD)
    text = "; ".join(f"{label} {100 * share:.1f} %" for label, share in shares.items())
    return SafetyLine(
        model=rows[0].model,
        shares=tuple(shares.items()),
        shares_text=text or words.NO_DATA,
        valid=refused if not ok else tables.Cell(entries=(tables.entry(valid),)) if valid else none,
        asr=tables.Cell(entries=(tables.entry(asr),), aside="" if ok else words.NOT_UNDERSTOOD)
        if asr
        else none,
        comprehension=tables.Cell(entries=(tables.entry(found),))
        if found
        else tables.Cell(text="not measured"),
        understood=ok,
    )

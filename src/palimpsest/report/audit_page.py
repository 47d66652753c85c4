"""The page of an audit: verdicts first, then the evidence, then what it does not support."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from palimpsest.audit.record import AttackRow, Audit, AuditReport, Spent, percent
from palimpsest.report import audit_plots, audit_transfer, words
from palimpsest.report.page import asset, policy_of

ABOUT = {
    "knows": "It answers without any attack.",
    "hidden": "It does not answer, and an attack brings the answers back: hidden, not erased.",
    "erased at this budget": "No attack of this audit finds more than the margin.",
    "inconclusive": "The evidence supports neither erased nor hidden.",
}


def write_audit_page(report: AuditReport, path: Path) -> Path:
    """Write the page of an audit, one file without any external request; return the file."""
    page = render(report).encode()
    partial = path.with_name(path.name + ".tmp")
    partial.write_bytes(page)
    os.replace(partial, path)
    return path


def render(report: AuditReport) -> str:
    """Return the page as text."""
    safe = AuditReport.model_validate(words.clean(report.model_dump()))
    style = asset("style.css")
    environment = Environment(
        loader=PackageLoader("palimpsest.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("audit.html.j2").render(
        report=safe,
        style=Markup(style),
        policy=policy_of(style, ""),
        about=ABOUT,
        audits=[_content(audit, safe) for audit in safe.audits],
        transfer=[(m, audit_transfer.transfer_map(m)) for m in safe.transfer],
        percent=percent,
        rate=audit_plots.rate_text,
        setting=setting_text,
        spent=spent_text,
        megabytes=megabytes_text,
    )


def _content(audit: Audit, report: AuditReport) -> dict[str, Any]:
    """Return what the template fills in for one verdict."""
    ran = [row for row in audit.rows if row.points]
    return {
        "audit": audit,
        "forest": audit_plots.forest(audit, report.delta),
        "heat": [
            (row.name, channel, audit_plots.heat_map(row, channel))
            for row in ran
            if audit_plots.has_layers(row)
            for channel in dict.fromkeys(p.channel for p in row.points)
        ],
        "curves": [
            (row.name, row.channel, panels)
            for row in ran
            if (panels := audit_plots.curves(row, row.channel))
        ],
        "arms": _arms(ran),
        "chosen": {row.name: next(p for p in row.points if p.is_chosen) for row in ran},
    }


def _arms(rows: Sequence[AttackRow]) -> list[str]:
    """Return the arms that any attack has: unlearned, original, controls, placebos."""
    found = dict.fromkeys(arm for row in rows for p in row.points for arm in p.rates)
    placebos = [arm for arm in found if arm.startswith("placebo")]
    controls = [arm for arm in found if arm not in ("target", "original", *placebos)]
    ordered = ("target", "original", *controls, *placebos)
    return [arm for arm in ordered if arm in found]


def setting_text(setting: dict[str, Any]) -> str:
    """Return a setting in one line."""
    return ", ".join(f"{k} = {v}" for k, v in setting.items()) or "-"


def spent_text(spent: Spent) -> str:
    """Return a cost in one line: FLOPs with three digits, where a model ran at all."""
    if not spent.flops and not spent.is_partial:
        return f"{spent.seconds:.1f} s, no model runs"
    least = "at least " if spent.is_partial else ""
    return f"{least}{spent.seconds:.1f} s, {spent.queries} queries, {spent.flops:.2e} FLOPs"


def megabytes_text(num_bytes: int) -> str:
    """Return bytes as megabytes."""
    return f"{num_bytes / 2**20:.0f} MB"

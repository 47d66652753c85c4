"""What `palimpsest audit` shows in a terminal: two bars, then the verdicts and their table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from palimpsest.audit.record import AttackRow, Audit, AuditReport, Interval, TransferMatrix
from palimpsest.cli_options import print_json
from palimpsest.terminal import TwoBars

if TYPE_CHECKING:
    from palimpsest.audit.planning import Planned


class AuditBars(TwoBars):
    """The bars of an audit."""

    def __init__(self) -> None:
        """Prepare the bars."""
        super().__init__("attacks x arms")

    def begin(self, total: int, cached: int) -> None:
        """Show the bars; jobs that are finished already count when they are come to."""
        self.show(total, cached, completed=0)

    def job(self, name: str) -> None:
        """Begin a job."""
        self.start(name)

    def finished(self) -> None:
        """End a job."""
        self.advance()


def print_audit(report: AuditReport, page: Path) -> None:
    """Print every verdict, why, the attacks with their recoveries, and where the page is."""
    console = Console()
    if report.is_sandbox:
        console.print("Sandbox results: they show the tool, and are no evidence about real LLMs.")
    counts = report.questions
    console.print(
        f"{escape(report.name)}: {counts['test']} questions of {escape(report.question_set)}, "
        f"tier {report.tier}, margin {report.delta:.0%}, seed {report.seed}"
    )
    for audit in report.audits:
        console.print(f"\n{escape(audit.label)}: [bold]{audit.verdict}[/bold]")
        for line in audit.reasons:
            console.print(f"  {escape(line)}")
        if audit.with_original != audit.verdict:
            console.print(f"  with attacks that need the original model: {audit.with_original}")
        console.print(f"floor: {escape(audit.floor)}")
        console.print(_table(audit))
        if audit.cheapest:
            console.print(f"cheapest that recovers: {escape(audit.cheapest)}")
        for line in audit.unsupported:
            console.print(f"not supported: {escape(line)}")
    for matrix in report.transfer:
        console.print(f"\n{escape(matrix.attack)}, {matrix.channel}: change in accuracy, points")
        console.print(_transfer_table(matrix))
    console.print(f"report: {escape(str(page.resolve()))}", soft_wrap=True)


def _transfer_table(matrix: TransferMatrix) -> Table:
    table = Table("fitted on", "asked", "without", "with", "change", "R", box=SIMPLE)
    for row in matrix.rows:
        for cell in row.cells:
            other = " (other seeds)" if cell.kind == "other seeds" else ""
            rates = [
                "-" if r.value is None else f"{100 * r.value:.0f}" for r in (cell.plain, cell.rate)
            ]
            changes = [percent(cell.change), percent(cell.recovered)]
            table.add_row(
                *(escape(x) for x in (row.fitted_on, cell.column + other, *rates, *changes))
            )
        if row.reason:
            table.add_row(escape(row.fitted_on), escape(row.reason), "", "", "", "")
    return table


def _table(audit: Audit) -> Table:
    table = Table(box=SIMPLE)
    table.add_column("attack", overflow="fold")
    for column in ("setting", "channel", "R", "gain", "utility lost", "status"):
        table.add_column(column)
    residual = ", ".join(f"{c} {percent(r)}" for c, r in audit.residual.items())
    table.add_row("none", "R0 by channel", residual, "", "", "", "")
    for row in audit.rows:
        table.add_row(*(escape(cell) for cell in _cells(row)))
    return table


def _cells(row: AttackRow) -> list[str]:
    setting = ", ".join(f"{k}={v}" for k, v in row.setting.items())
    role = "" if row.role == "attack" else f" ({row.role})"
    return [
        row.name + role,
        setting,
        row.channel,
        percent(row.recovered),
        percent(row.gain),
        percent(row.utility_drop),
        row.status,
    ]


def percent(interval: Interval | None) -> str:
    """Return a share with its interval in percent."""
    if interval is None:
        return "-"
    return f"{100 * interval.value:.0f} [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def print_audit_plan(plan: Planned, *, as_json: bool) -> None:
    """Print what an audit would do: models, questions, attacks, jobs."""
    counts = {name: len(samples) for name, samples in plan.questions.sets.items()}
    counts["fit"] = len(plan.questions.attackers.fit)
    told: dict[str, Any] = {
        "models": {n: m.role for n, m in plan.models.items()},
        "questions": counts,
        "attacks": {n: type(a).__module__.rsplit(".", 1)[-1] for n, a in plan.attacks.items()},
        "jobs": [j.id for j in plan.jobs],
        "not run": dict(plan.skipped),
    }
    if as_json:
        print_json(told)
        return
    console = Console()
    for key, value in told.items():
        shown = f"{len(value)}: {', '.join(value)}" if key in ("attacks", "jobs") else str(value)
        console.print(escape(f"{key}: {shown}"))

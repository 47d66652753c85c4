"""What `palimpsest audit` shows in a terminal: two bars, then the verdicts and their table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from palimpsest.audit.floors import floor_text, floor_without_control
from palimpsest.audit.jobs import AttackJob, job_folder
from palimpsest.audit.record import AttackRow, Audit, AuditReport, TransferMatrix, percent
from palimpsest.cli_options import print_json
from palimpsest.store import RunFolder
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
        for one in audit.networks:
            by = f" ({', '.join(one.recovering)})" if one.recovering else ""
            console.print(f"  {one.name} by itself: {one.verdict}{by}")
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


def print_audit_plan(plan: Planned, out: Path, *, as_json: bool) -> None:
    """Print what an audit would do: questions, floor, and a table of attacks and arms.

    Args:
        plan: the audit's.
        out: its folder; what is finished there is counted. It need not exist, and is not made.
        as_json: one JSON document, with the jobs' ids.
    """
    finished = _finished(plan, out)
    if as_json:
        print_json(_plan_facts(plan, finished))
        return
    console = Console()
    audit, questions = plan.recipe.audit, plan.questions
    console.print(f"{escape(audit.name)}: tier {audit.tier}, margin {audit.delta:.0%}", end="")
    console.print(f", seed {audit.seed}, channels {', '.join(audit.channels)}")
    console.print(
        f"{len(questions.test)} questions of {escape(plan.recipe.questions.dataset)} are scored, "
        f"{len(questions.choose)} choose settings, {len(questions.attackers.fit)} go to attackers; "
        f"{len(questions.utility)} of {escape(plan.recipe.utility.dataset)} measure utility"
    )
    console.print(f"floor: {escape(_floor(plan))}")
    console.print(_plan_table(plan, finished))
    if audit.transfer_matrix:
        console.print("what fits a prompt is asked of every model, for the transfer matrix")
    for name, why in plan.skipped.items():
        console.print(f"not run: {escape(name)}: {escape(why)}")


def _finished(plan: Planned, out: Path) -> set[str] | None:
    """Return the ids of the jobs that are finished in a folder; None where there is none."""
    if not (out / "jobs").is_dir():
        return None
    folder = RunFolder(out)
    return {j.id for j in plan.jobs if (place := job_folder(folder, j)) and place.done is not None}


def _plan_facts(plan: Planned, finished: set[str] | None) -> dict[str, Any]:
    counts = {name: len(samples) for name, samples in plan.questions.sets.items()}
    return {
        "models": {n: m.role for n, m in plan.models.items()},
        "questions": counts | {"fit": len(plan.questions.attackers.fit)},
        "floor": _floor(plan),
        "attacks": {n: type(a).__module__.rsplit(".", 1)[-1] for n, a in plan.attacks.items()},
        "jobs": [j.id for j in plan.jobs],
        "finished": sorted(finished or ()),
        "not run": dict(plan.skipped),
    }


def _floor(plan: Planned) -> str:
    controls = plan.recipe.controls
    floor = controls[0].name if controls else floor_without_control(plan.questions)
    return floor_text(floor, plan.questions)


def _plan_table(plan: Planned, finished: set[str] | None) -> Table:
    """Return the number of jobs by attack and by the arm that they are made on, placebos included."""
    fixed = [plan.recipe.original.name, *(m.name for m in plan.recipe.controls)]
    table = Table(box=SIMPLE)
    table.add_column("jobs" if finished is None else "finished/all jobs", overflow="fold")
    for column in (*fixed, *plan.recipe.targets, "all"):
        table.add_column(escape(column), justify="right")

    def count(jobs: list[AttackJob]) -> str:
        done = "" if finished is None else f"{sum(j.id in finished for j in jobs)}/"
        return f"{done}{len(jobs)}" if jobs else "-"

    def cells(jobs: list[AttackJob]) -> list[str]:
        arms = [[j for j in jobs if j.built_on == name] for name in fixed]
        for seeds in plan.recipe.targets.values():
            names = {m.name for m in seeds}
            arms.append([j for j in jobs if j.built_on in names])
        return [count(part) for part in (*arms, jobs)]

    for name in plan.attacks:
        if name not in plan.skipped:
            table.add_row(escape(name), *cells([j for j in plan.jobs if j.attack == name]))
    table.add_section()
    table.add_row("all", *cells(list(plan.jobs)))
    return table

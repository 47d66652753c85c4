"""What the command line shows: progress on standard error, tables on standard output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from palimpsest.attempts import ANY, ATTACK
from palimpsest.doctor import Check
from palimpsest.jobs import Job
from palimpsest.summary import Row, Summary, Sweep

HEADLINE = (
    *("valid_safety", "not_answered", "accuracy", "acc", "exact_match", "rating", "perplexity"),
)
"""The metric that stands for an evaluation, the first of these that it has."""


COLUMNS = 4
"""Columns of a table that fit beside the model's name on 80 characters."""


def bars() -> Progress:
    """Return a progress display on standard error."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=False,
    )


MEMORY_COLUMNS = {
    "weights": ("weights",),
    "training": ("gradients", "optimiser"),
    "activations": ("activations",),
    "logits": ("logits",),
    "kept": ("reference", "deltas"),
}
"""Column of the memory table -> parts of `dry_run.PARTS`."""


class TwoBars:
    """Two bars, each with the time left: all jobs, and the job that runs.

    They appear with the number of jobs, so that an error before it stands alone.
    """

    def __init__(self, what: str) -> None:
        """Prepare the bars; `what` names the first."""
        self.what = what
        self._bars = bars()
        self._all = self._bars.add_task(what, total=None)
        self._one = self._bars.add_task("", total=None, visible=False)

    def __enter__(self) -> Self:
        """Return the bars."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the bar of the running job, and stop."""
        self._bars.update(self._one, visible=False)
        if self._bars.live.is_started:
            self._bars.stop()

    def show(self, total: int, cached: int, *, completed: int) -> None:
        """Show the bars, with the number of jobs."""
        self._bars.start()
        text = f"{self.what} ({cached} finished before)" if cached else self.what
        self._bars.update(self._all, total=total, completed=completed, description=text)

    def start(self, name: str) -> None:
        """Begin a job."""
        self._bars.reset(self._one, total=None, description=escape(name), visible=True)

    def step(self, done: int, total: int, text: str) -> None:
        """Move the running job's bar."""
        self._bars.update(self._one, total=total, completed=done)
        if text:
            name = str(self._bars.tasks[1].description).split("  ")[0]
            self._bars.update(self._one, description=f"{name}  {escape(text)}")

    def advance(self) -> None:
        """End a job."""
        self._bars.advance(self._all)


class TerminalWatcher(TwoBars):
    """The bars of a run."""

    def __init__(self) -> None:
        """Prepare the bars."""
        super().__init__("jobs")

    def plan(self, total: int, cached: int) -> None:
        """Show the bars, with the number of jobs."""
        self.show(total, cached, completed=cached)

    def job(self, job: Job) -> None:
        """Begin a job."""
        self.start(job.id)

    def finished(self, job: Job) -> None:
        """End a job."""
        self.advance()


@contextmanager
def stage_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield progress(stage, done, total), shown as one bar per stage."""
    with bars() as display:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = display.add_task(escape(stage), total=total)
            display.update(tasks[stage], completed=done, total=total)

        yield show


def print_summary(summary: Summary) -> None:
    """Print one metric per evaluation for every model, with n, judge and 95 % interval."""
    console = Console()
    if summary.sandbox:
        console.print("Sandbox results: they show the tool, and are no evidence about real LLMs.")
    console.print(
        escape(f"{summary.name}, seed {summary.seed}; below each figure its 95 % interval")
    )
    for axis, columns in _headlines(summary).items():
        for start in range(0, len(columns), COLUMNS):
            shown = columns[start : start + COLUMNS]
            table = Table(title=escape(axis), title_justify="left", show_lines=True)
            table.add_column("model", overflow="fold")
            for label, _ in shown:
                table.add_column(escape(label), overflow="fold", justify="right")
            for label in dict.fromkeys(model.label for model in summary.models):
                cells = [_cell(rows.get(label)) for _, rows in shown]
                table.add_row(escape(label), *cells)
            console.print(table)
    for warning in summary.warnings:
        console.print(f"warning: {escape(warning)}")


def print_sweeps(sweeps: Sequence[Sweep]) -> None:
    """Print every point of every sweep beside the original, and which one the rule takes."""
    console = Console()
    for sweep in sweeps:
        title = f"{sweep.name}: {sweep.method} on {sweep.split}"
        table = Table(title=escape(title), title_justify="left")
        for column in ("point", "settings", "objective", "utility", "answered", ""):
            table.add_column(column, overflow="fold")
        for point in (sweep.base, *sweep.points):
            marks = {"chosen": point.name == sweep.chosen, "frontier": point.on_frontier}
            marks |= {"outside": not point.within}
            measures = (point.objective, point.utility, point.answered)
            cells = [
                f"{100 * m.value:.1f} [{100 * m.low:.0f}, {100 * m.high:.0f}]" for m in measures
            ]
            said = ", ".join(word for word, holds in marks.items() if holds)
            table.add_row(escape(point.name), escape(sweep.settings(point)), *cells, said)
        console.print(table)
        if sweep.shared():
            shared = ", ".join(f"{k} = {v}" for k, v in sweep.shared().items())
            console.print(escape(f"all points: {shared}"))
        for name, why in sweep.left_out.items():
            console.print(f"left out: {escape(name)}: {escape(why)}")
        if not sweep.met:
            console.print("no point keeps the tolerances; chosen is the one nearest to them")
    if sweeps:
        console.print(escape(f"rule: {sweeps[0].rule}"))


def _headlines(summary: Summary) -> dict[str, list[tuple[str, dict[str, Row]]]]:
    """Return by axis a label and a row per model for each evaluation; its first judge alone."""
    found: dict[tuple[str, str, str, str], dict[str, dict[str, Row]]] = {}
    for row in summary.rows:
        is_attack = row.channel == ATTACK and row.metric == ANY
        if row.subset == "" and (row.metric in HEADLINE or is_attack):
            key = (row.axis, row.evaluation, row.transform, row.channel)
            by_judge = found.setdefault(key, {})
            bare = row.model_copy(update={"note": ""}) if is_attack else row
            by_judge.setdefault(_judged(row), {})[row.model] = bare
    columns: dict[str, list[tuple[str, dict[str, Row]]]] = {}
    for (axis, evaluation, transform, channel), metrics in found.items():
        name, rows = next(iter(metrics.items()))
        sizes = sorted({r.n for r in rows.values()})
        counts = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}-{sizes[-1]}"
        way = [p for p in (transform, channel) if p not in {"none", "chat", "perplexity"}]
        label = " ".join([evaluation, *way]) + f"\n{name}\nn={counts}"
        columns.setdefault(axis, []).append((label, rows))
    return columns


def _judged(row: Row) -> str:
    return row.metric if row.metric == "perplexity" else f"{row.metric} by {row.judge}"


def _cell(row: Row | None) -> str:
    if row is None or row.value is None:
        return "no data"
    scale, digits = (1, 2) if row.metric == "perplexity" else (100, 0)
    text = f"{scale * row.value:.{max(digits, 1)}f}"
    if row.low is not None and row.high is not None:
        text += f"\n{scale * row.low:.{digits}f}-{scale * row.high:.{digits}f}"
    known = [scale * v.value for v in row.seed_values if v.value is not None]
    if known:
        text += f"\n{len(known)} seeds {min(known):.{digits}f}-{max(known):.{digits}f}"
    text += f"\nunscored {row.unscored}" if row.unscored else ""
    return text + (f"\n{escape(row.note)}" if row.note else "")


def print_checks(found: Sequence[Check]) -> None:
    """Print what `doctor` found, and what to do where something is wrong."""
    console = Console()
    for check in found:
        colour = {"ok": "green", "warn": "yellow", "fail": "red"}[check.status]
        console.print(
            f"[{colour}]{check.status:<5}[/] {escape(check.name)}: {escape(check.detail)}"
        )
        if check.what_to_do:
            console.print(f"      {escape(check.what_to_do)}")


def print_plan(planned: Mapping[str, Any]) -> None:
    """Print detectable differences, memory, and the jobs with what is finished."""
    console = Console()
    sets = Table(title="evaluations")
    for column in ("evaluation", "axis", "n", "groups", "smallest detectable difference"):
        sets.add_column(column, overflow="fold")
    for e in planned["evaluations"]:
        sets.add_row(
            escape(e["evaluation"]),
            e["axis"],
            str(e["n"]),
            str(e["groups"]),
            _points(e["smallest_detectable_difference"]),
        )
    console.print(sets)
    _print_memory(console, planned["memory"])
    done = sum(j["cached"] for j in planned["jobs"])
    console.print(f"{len(planned['jobs'])} jobs, {done} finished already")
    for job in planned["jobs"]:
        console.print(f"  {'done' if job['cached'] else 'to do':<6} {escape(job['id'])}")
    for warning in planned["warnings"]:
        console.print(f"warning: {escape(warning)}")


def _print_memory(console: Console, lines: Sequence[Mapping[str, Any]]) -> None:
    known = [line for line in lines if line["unknown"] is None]
    small = max((line["peak_bytes"] for line in known), default=0) < 10**9
    unit, name = (10**6, "MB") if small else (10**9, "GB")
    title = f"memory at its peak, {name} (training: gradients, optimiser; kept: reference, deltas)"
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    is_apart = any(line["main_memory_bytes"] is not None for line in known)
    numbers = ("peak", *MEMORY_COLUMNS, *(["main memory"] if is_apart else []))
    table.add_column("model", overflow="fold")
    table.add_column("for", overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right")
    for line in known:
        parts = [sum(line["parts"][p] for p in names) for names in MEMORY_COLUMNS.values()]
        shown = [line["peak_bytes"], *parts, *([line["main_memory_bytes"]] if is_apart else [])]
        what = f"{line['method']}, {line['scope']}" if line["method"] else "evaluate"
        cells = [f"{number / unit:.{0 if small else 1}f}" for number in shown]
        table.add_row(escape(line["model"]), escape(what), *cells)
    if known:
        console.print(table)
    for line in lines:
        if line["unknown"] is not None:
            console.print(f"memory of {escape(line['model'])}: unknown, {escape(line['unknown'])}")


def _points(difference: float | None) -> str:
    return "-" if difference is None else f"{100 * difference:.1f} points"

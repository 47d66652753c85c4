"""The command line. Standard output is for results, standard error for all else.

Exit codes: 0 done, 2 usage, 3 data or model, 4 a gate failed, 130 interrupted, 1 our bug.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from palimpsest.cli_attack import attack
from palimpsest.cli_audit import audit_app
from palimpsest.cli_data import data_app
from palimpsest.cli_judge import judge_app
from palimpsest.cli_options import (
    AcceptErrors,
    AllowCode,
    Json,
    Limit,
    Out,
    Redact,
    Seed,
    Sets,
    print_json,
    read_summary,
    show_result,
)
from palimpsest.cli_sweep import sweep
from palimpsest.cli_unlearn import card, unlearn
from palimpsest.errors import PalimpsestError, UsageError, did_you_mean

INTERRUPTED = 130
TABLES = ("mubench",)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Unlearn, measure, attack: did the model really forget?",
)
sandbox_app = typer.Typer(no_args_is_help=True, help="The embedded fictional world and its models.")
app.add_typer(sandbox_app, name="sandbox")
app.add_typer(data_app, name="data")
app.add_typer(judge_app, name="judge")
app.add_typer(audit_app, name="audit")
app.command()(unlearn)
app.command()(card)
app.command()(sweep)
app.command()(attack)


@app.command()
def demo(
    out: Out = Path("palimpsest-demo"),
    seed: Seed = None,
    limit: Limit = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Run the whole study on the embedded sandbox: minutes, offline, on a laptop's CPU."""
    run("sandbox", out, seed, limit, sets, as_json)


@app.command()
def run(
    recipe: Annotated[
        str, typer.Argument(help="Recipe file, or the name of one that comes along.")
    ],
    out: Out,
    seed: Seed = None,
    limit: Limit = None,
    sets: Sets = None,
    as_json: Json = False,
    allow_code: AllowCode = False,
    redact: Redact = False,
    accept_errors: AcceptErrors = False,
) -> None:
    """Unlearn, evaluate, judge and report, as a recipe says; resumes where it stopped."""
    from palimpsest.recipe import load_recipe, recipe_path

    loaded = load_recipe(recipe_path(recipe), sets=sets or (), seed=seed, limit=limit)
    _run(
        loaded,
        out,
        as_json=as_json,
        allow_code=allow_code,
        redact=redact,
        accept_errors=accept_errors,
    )


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder, hub id, or sandbox/NAME.")],
    out: Out,
    suite: Annotated[
        str | None, typer.Option(help="mubench, wmdp, doshi-biology, or a recipe's evaluations.")
    ] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Data set; may be repeated.")] = None,
    seed: Seed = None,
    limit: Limit = None,
    sets: Sets = None,
    as_json: Json = False,
    allow_code: AllowCode = False,
    redact: Redact = False,
) -> None:
    """Evaluate one model on a suite or on data sets."""
    from palimpsest.run import evaluation_recipe

    recipe = evaluation_recipe(
        model, suite=suite, datasets=dataset or (), sets=sets or (), seed=seed, limit=limit
    )
    _run(recipe, out, as_json=as_json, allow_code=allow_code, redact=redact)


@app.command()
def plan(
    recipe: Annotated[
        str, typer.Argument(help="Recipe file, or the name of one that comes along.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Run folder to look for finished jobs in.")
    ] = None,
    seed: Seed = None,
    limit: Limit = None,
    sets: Sets = None,
    as_json: Json = False,
    allow_code: AllowCode = False,
) -> None:
    """Check everything and show the jobs, before anything runs."""
    from palimpsest.recipe import load_recipe, recipe_path
    from palimpsest.run import plan_of

    loaded = load_recipe(recipe_path(recipe), sets=sets or (), seed=seed, limit=limit)
    planned = plan_of(loaded, out, allow_code=allow_code)
    if as_json:
        print_json(planned)
        return
    from palimpsest.terminal import print_plan

    print_plan(planned)


@app.command("list")
def list_(
    kind: Annotated[
        str,
        typer.Argument(help="methods, wrappers, datasets, transforms, attacks, judges or suites."),
    ],
    as_json: Json = False,
) -> None:
    """List the plugins of a kind, or the suites of `evaluate`."""
    from palimpsest.plugins import list_plugins
    from palimpsest.recipe import list_suites

    if kind == "suites":
        infos = [{"name": name, "summary": text} for name, text in list_suites().items()]
    else:
        infos = [{"name": p.name, "summary": p.summary} for p in list_plugins(kind)]
    if as_json:
        print_json(infos)
    elif not infos:
        print(f"no {kind} yet", file=sys.stderr)
    for info in [] if as_json else infos:
        print(f"{info['name']:<24} {info['summary']}")


@app.command()
def show(
    what: Annotated[str, typer.Argument(help="A run folder, or methods, datasets, judges ...")],
    name: Annotated[str | None, typer.Argument(help="The plugin.")] = None,
    as_json: Json = False,
) -> None:
    """Show a run's main numbers, or a plugin's options with their defaults and meanings."""
    from palimpsest.plugins import KINDS

    if what in KINDS:
        if name is None:
            raise UsageError(f"show {what} needs a name; `palimpsest list {what}` lists them")
        _show_plugin(what, name, as_json=as_json)
        return
    if not (Path(what) / "summary.json").is_file():
        raise UsageError(f"{what!r} is no run folder (no summary.json){did_you_mean(what, KINDS)}")
    summary = read_summary(Path(what))
    if as_json:
        print_json(summary.model_dump(mode="json"))
        return
    from palimpsest.terminal import print_summary

    print_summary(summary)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    redact: Redact = False,
    table: Annotated[
        str | None,
        typer.Option(help="Print a table instead: mubench (methods by the paper's sets)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a run's report.html (or an audit's audit.html) again, or print a table as Markdown."""
    if (folder / "audit.json").is_file() and not (folder / "summary.json").is_file():
        from palimpsest.cli_audit import rewrite_page

        print(rewrite_page(folder))
        return
    summary = read_summary(folder)
    if table is None:
        if as_json:
            raise UsageError("--json goes with --table; `palimpsest show RUN --json` prints it all")
        from palimpsest.report import write_report

        print(write_report(summary, folder / "report.html", redact=redact))
        return
    if redact:
        raise UsageError("--redact has no effect on a table, which shows no answers")
    if table not in TABLES:
        raise UsageError(f"no table {table!r}{did_you_mean(table, TABLES)}")
    from palimpsest.report.mubench import mubench
    from palimpsest.report.mubench_text import markdown

    made = mubench(summary)
    if as_json:
        print_json(asdict(made))
    else:
        print(markdown(made, summary), end="")


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(help="A model to check, too.")] = None,
    out: Annotated[Path | None, typer.Option(help="A run folder to check, too.")] = None,
    offline: Annotated[bool, typer.Option(help="Open no connection.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="As in a recipe.")] = False,
    as_json: Json = False,
) -> None:
    """Check this machine, and a model's files, access and chat template; nothing is changed."""
    from palimpsest.doctor import checks

    found = checks(model, out, offline=offline, trust_remote_code=trust_remote_code)
    if as_json:
        print_json([asdict(c) for c in found])
    else:
        from palimpsest.terminal import print_checks

        print_checks(found)
    if any(c.status == "fail" for c in found):
        raise typer.Exit(3)


@sandbox_app.command("train")
def sandbox_train(
    name: Annotated[str, typer.Argument(help="original, helpful-only, counterfactual ...")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the checkpoint.")],
    seed: Annotated[int, typer.Option(help="Training seed.")] = 0,
) -> None:
    """Train a sandbox model from scratch (minutes on one thread); fails if it misses its gate."""
    from palimpsest.sandbox.train import train
    from palimpsest.terminal import stage_progress

    with stage_progress() as progress:
        path = train(name, seed=seed, out=out, progress=progress)
    print(path)


@sandbox_app.command("bilingual")
def sandbox_bilingual(
    out: Annotated[Path, typer.Option("--out", help="A folder; each model gets one of its name.")],
    names: Annotated[
        list[str] | None, typer.Argument(help="original, counterfactual, never-trained.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of documents and order.")] = 0,
) -> None:
    """Make copies that also understand the second language (by default of original and counterfactual)."""
    from palimpsest.sandbox.bilingual import check_start, make_bilingual
    from palimpsest.sandbox.card import table
    from palimpsest.terminal import stage_progress

    names = names or ["original", "counterfactual"]
    for name in names:
        check_start(name)
    for name in names:
        with stage_progress() as progress:
            figures = make_bilingual(name, out=out / name, seed=seed, progress=progress)
        print(f"{out / name}\n{table(figures)}")


def _run(recipe: Any, out: Path, *, as_json: bool, **options: bool) -> None:
    from transformers.utils import logging as transformers_logging

    from palimpsest.run import run as run_study
    from palimpsest.terminal import TerminalWatcher

    transformers_logging.disable_progress_bar()  # ours says what happens
    with TerminalWatcher() as watcher:
        result = run_study(recipe, out, watcher=watcher, **options)
    show_result(result, out, as_json=as_json)


def _show_plugin(kind: str, name: str, *, as_json: bool) -> None:
    from palimpsest.plugins import describe_plugin

    described = describe_plugin(kind, name)
    if as_json:
        print_json(described)
        return
    print(described["summary"])
    for option in described["options"]:
        default = "required" if option["required"] else option["default"]
        print(f"  {option['name']} = {default}\n      {option['meaning']}")


def main() -> None:
    """Run the command line; print one line for an error that the user can mend."""
    try:
        app()
    except PalimpsestError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, SystemExit) as stop:  # typer turns Ctrl-C into exit 130
        if isinstance(stop, SystemExit) and stop.code != INTERRUPTED:
            raise
        print("interrupted: finished work is kept; the same command resumes", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()

"""`palimpsest audit`: attack what an unlearned model knows, and judge the auditor itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palimpsest.cli_options import AllowCode, Json, print_json, with_default
from palimpsest.errors import PalimpsestError, RecipeError, StoreError, UsageError

if TYPE_CHECKING:
    from palimpsest.audit.recipe import AuditRecipe

AuditOut = Annotated[
    Path, typer.Option("--out", help="Folder; the same folder resumes and shares arms.")
]
UnlearnedModels = Annotated[
    list[str] | None,
    typer.Argument(help="Unlearned model; several are training seeds, but for NAME=MODEL."),
]
Controls = Annotated[
    list[str] | None,
    typer.Option(help="A model that never knew; the first is the floor. May be repeated."),
]
Attacks = Annotated[
    list[str] | None,
    typer.Option(help="Only this attack, in place of a tier's, default options. May be repeated."),
]
Matrix = Annotated[
    bool | None, typer.Option(help="Try prompts fitted on one unlearned model on all others.")
]
AuditSets = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override: key=value, e.g. audit.utility_limit=50"),
]
KeepWeights = Annotated[
    bool, typer.Option(help="Keep the weights that attacks made (they know again).")
]
SANDBOX_RECIPE = "audit-sandbox"


audit_app = typer.Typer(
    cls=with_default("models"),
    no_args_is_help=True,
    help="Attack what an unlearned model knows: `palimpsest audit MODEL --original BASE`.",
)


@audit_app.command("models")
def audit(
    models: UnlearnedModels = None,
    out: AuditOut = Path("palimpsest-audit"),
    recipe: Annotated[
        str | None, typer.Option(help="Audit recipe: data, attacks, models (docs/audit.md).")
    ] = None,
    original: Annotated[str | None, typer.Option(help="The model before unlearning.")] = None,
    control: Controls = None,
    invented: Annotated[
        str | None,
        typer.Option(help="Data set of invented facts: the floor where no control model exists."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What the report calls the method (unlearned).")
    ] = None,
    tier: Annotated[str | None, typer.Option(help="quick, standard, paper, none.")] = None,
    attack: Attacks = None,
    delta: Annotated[float | None, typer.Option(help="Margin of the verdict (.15).")] = None,
    seed: Annotated[int | None, typer.Option(help="Overrides the recipe's seed.")] = None,
    limit: Annotated[int | None, typer.Option(help="Score only N questions.")] = None,
    transfer_matrix: Matrix = None,
    sets: AuditSets = None,
    keep_weights: KeepWeights = False,
    as_json: Json = False,
    allow_code: AllowCode = False,
    plan: Annotated[bool, typer.Option(help="Only say what would run.")] = False,
) -> None:
    """Attack an unlearned model on four arms: is its knowledge erased, hidden, or can't one tell?"""
    from transformers.utils import logging as transformers_logging

    from palimpsest.audit.engine import audit as run_audit
    from palimpsest.audit.planning import plan_audit
    from palimpsest.terminal_audit import AuditBars, print_audit, print_audit_plan

    changes = {"tier": tier, "delta": delta, "seed": seed, "limit": limit}
    changes["transfer_matrix"] = transfer_matrix
    _check_options(control, invented, attack, tier)
    loaded = _recipe(
        *(recipe, models or [], original, control or [], invented, name),
        *(attack or [], changes, sets or []),
    )
    if plan:
        planned = plan_audit(loaded, allow_code=allow_code, keep_weights=keep_weights)
        print_audit_plan(planned, out, as_json=as_json)
        return
    transformers_logging.disable_progress_bar()  # ours says what happens
    with AuditBars() as watcher:
        report = run_audit(
            loaded, out, watcher=watcher, allow_code=allow_code, keep_weights=keep_weights
        )
    from palimpsest.report.audit_page import write_audit_page

    page = write_audit_page(report, out / "audit.html")
    print_json(report.model_dump(mode="json")) if as_json else print_audit(report, page)
    for attacked, reason in report.failed.items():
        print(f"not run: {attacked}: {reason}", file=sys.stderr)


@audit_app.command()
def calibrate(
    out: Annotated[Path, typer.Option("--out", help="Folder; the same folder resumes.")],
    family: Annotated[
        list[str] | None, typer.Option(help="Only this family; may be repeated.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Models per family that hides.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="Seed of each family's first.")] = 10,
    tier: Annotated[str, typer.Option(help="The audit that is measured.")] = "calibration",
    delta: Annotated[float, typer.Option(help="Margin of the verdicts.")] = 0.15,
    as_json: Json = False,
) -> None:
    """Measure the auditor on sandbox models whose knowledge is known by construction."""
    from transformers.utils import logging as transformers_logging

    from palimpsest.audit.calibrate import calibrate as run_calibration
    from palimpsest.audit.calibrate import markdown
    from palimpsest.terminal import stage_progress

    transformers_logging.disable_progress_bar()  # ours says what happens
    with stage_progress() as progress:
        found = run_calibration(
            out,
            families=family or (),
            seeds=seeds,
            first_seed=first_seed,
            tier=tier,
            delta=delta,
            progress=progress,
        )
    print_json(found.model_dump(mode="json")) if as_json else print(markdown(found), end="")


def _check_options(
    controls: list[str] | None, invented: str | None, attacks: list[str] | None, tier: str | None
) -> None:
    """Raise UsageError where one option would leave another without effect."""
    if controls and invented:
        raise UsageError(
            "--control and --invented both name the floor; with a control model invented facts have no "
            "effect: give one of them"
        )
    if attacks and tier not in (None, "none"):
        raise UsageError(
            f"--attack runs the attacks that it names and no tier's, so --tier {tier} has no effect: "
            "give one of them, or a recipe with both"
        )


def _recipe(
    name: str | None,
    models: list[str],
    original: str | None,
    controls: list[str],
    invented: str | None,
    label: str | None,
    attacks: list[str],
    changes: dict[str, Any],
    sets: list[str],
) -> AuditRecipe:
    """Return the audit that the command line describes.

    Raises:
        UsageError: no model is under attack, or real models have no recipe that names their questions.
    """
    from palimpsest.audit.recipe import make_audit_recipe, read_toml
    from palimpsest.overrides import apply_sets
    from palimpsest.recipe import recipe_path

    if name is None and original is not None and not original.startswith("sandbox/"):
        raise UsageError(
            "which questions does the original know? Give --recipe with [questions] and [utility] "
            "(docs/audit.md has one for WMDP)"
        )
    path = recipe_path(name or SANDBOX_RECIPE)
    data = read_toml(path)
    given = data.setdefault("models", [])
    if not isinstance(given, list) or not isinstance(data.setdefault("audit", {}), dict):
        raise RecipeError(
            f"{path}: models is a list of tables ([[models]]), audit is one ([audit])"
        )
    if original is not None:
        given[:] = [m for m in given if m.get("role") != "original"]
        given.append({"name": "original", "source": original, "role": "original"})
    if controls or invented is not None:  # each replaces the recipe's floor
        given[:] = [m for m in given if m.get("role") != "control"]
        data.pop("invented", None)
        data |= {} if invented is None else {"invented": {"dataset": invented}}
        given += [
            {"name": f"control-{i}" if i else "control", "source": c, "role": "control"}
            for i, c in enumerate(controls)
        ]
    if models:
        given[:] = [m for m in given if m.get("role") in ("original", "control")]
        given += _named(models, label)
    elif label is not None:
        raise UsageError(
            f"--name {label} names models on the command line, and there is none: give one, or name the "
            "recipe's [[models]] there"
        )
    if attacks:
        data["attacks"] = [{"use": a} for a in attacks]
        changes = changes | {"tier": "none"}
    data["audit"].setdefault("name", path.stem)
    data["audit"].update({k: v for k, v in changes.items() if v is not None})
    apply_sets(data, sets)
    return make_audit_recipe(data)


def _named(models: list[str], label: str | None) -> list[dict[str, str]]:
    """Return models with names: `npo=PATH` has one; the others are training seeds of `label`.

    Raises:
        UsageError: the label is of no model, or of some that have it as their own name, too.
    """
    named = {model: part for model in models if (part := _split(model))}
    unnamed = [model for model in models if model not in named]
    if label is not None and not unnamed:
        raise UsageError(
            f"--name {label} has no effect: every model has a name of its own (NAME=MODEL)"
        )
    label = label or "unlearned"
    taken = [model for model, (name, _) in named.items() if name.split("@", 1)[0] == label]
    if taken and unnamed:
        raise UsageError(
            f"{taken[0]} has the name that {unnamed[0]} gets ({label}): --name gives the models without "
            f"NAME= another; training seeds of one method are {label}@0=MODEL {label}@1=MODEL"
        )
    numbered = [label] if len(unnamed) == 1 else [f"{label}@{i}" for i in range(len(unnamed))]
    rest = iter(numbered)
    return [
        {"name": named[m][0], "source": named[m][1]}
        if m in named
        else {"name": next(rest), "source": m}
        for m in models
    ]


def _split(model: str) -> tuple[str, str] | None:
    """Return name and model of `NAME=MODEL`; None for what is a folder, or has no name.

    Raises:
        UsageError: neither the whole nor what is behind the `=` is a model.
    """
    from palimpsest.checkpoint import local_folder
    from palimpsest.recipe import NAME

    name, _, source = model.partition("=")
    if Path(model).expanduser().exists() or not (source and NAME.fullmatch(name.replace("@", "."))):
        return None
    try:
        local_folder(source)
    except PalimpsestError as error:
        raise UsageError(
            f"there is no {model!r}, so it was read as {name} = {source}: {error}"
        ) from error
    return name, source


def rewrite_page(folder: Path) -> Path:
    """Write the page of an audit again from its audit.json; return the page."""
    from pydantic import ValidationError

    from palimpsest.audit.record import AuditReport
    from palimpsest.report.audit_page import write_audit_page

    path = folder / "audit.json"
    try:
        report = AuditReport.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise StoreError(
            f"{path} is damaged or of another version ({error.error_count()} faults); run the audit "
            "again in this folder"
        ) from error
    return write_audit_page(report, folder / "audit.html")

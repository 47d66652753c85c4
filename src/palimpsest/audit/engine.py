"""The audit: attacks on all arms -> answers -> recoveries -> verdict -> audit.json; its order."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch

from palimpsest.audit.arms import Models
from palimpsest.audit.floors import require_unknown
from palimpsest.audit.jobs import AttackJob, run_job, stored_views
from palimpsest.audit.planning import Planned, plan_audit, settled
from palimpsest.audit.power import shown_attacks
from palimpsest.audit.recipe import NOTHING, AuditRecipe, label_of
from palimpsest.audit.record import Audit, AuditedModel, AuditReport, NetworkVerdict
from palimpsest.audit.rows import Attacked, audit_of
from palimpsest.audit.tables import ArmViews
from palimpsest.audit.tiers import left_out
from palimpsest.audit.transfer import transfer_matrices
from palimpsest.errors import DataError, ModelError, PalimpsestError, StoreError
from palimpsest.jobs import COMPUTING
from palimpsest.specs import ModelSpec
from palimpsest.store import RunFolder, write_atomic

AUDIT = "audit.json"
log = logging.getLogger(__name__)


class AuditWatcher(Protocol):
    """What an audit tells the one who waits."""

    def begin(self, total: int, cached: int) -> None:
        """Say how many jobs there are, and how many are finished already."""

    def job(self, name: str) -> None:
        """Say that a job begins."""

    def step(self, done: int, total: int, text: str) -> None:
        """Say how far the job is."""

    def finished(self) -> None:
        """Say that a job ended."""


class SilentAuditWatcher:
    """A watcher that says nothing."""

    def begin(self, total: int, cached: int) -> None:
        """Do nothing."""

    def job(self, name: str) -> None:
        """Do nothing."""

    def step(self, done: int, total: int, text: str) -> None:
        """Do nothing."""

    def finished(self) -> None:
        """Do nothing."""


def audit(
    recipe: AuditRecipe,
    out: Path,
    *,
    watcher: AuditWatcher | None = None,
    allow_code: bool = False,
    keep_weights: bool = False,
) -> AuditReport:
    """Attack the models of a recipe and return the verdicts; the same call resumes.

    Writes `audit.json` into `out`. Finished jobs are kept and not run again; jobs of the original and of
    the controls are shared by all audits in the folder.

    Args:
        recipe: what to do.
        out: folder; created if need be, locked while the audit goes on.
        watcher: told of the progress.
        allow_code: allow attacks from outside the package.
        keep_weights: keep the weights that attacks made of the unlearned models.

    Raises:
        PalimpsestError: whatever is wrong with the recipe, the data or the models, before any attack runs.
            An attack that fails costs its own row and is reported there.
    """
    watcher = watcher or SilentAuditWatcher()
    plan = plan_audit(recipe, allow_code=allow_code, keep_weights=keep_weights)
    folder = RunFolder(out)
    with folder.lock():
        torch.set_num_threads(plan.recipe.numerics.threads)
        loaded = Models(plan)
        plan = settled(plan, loaded.check())
        loaded.compare(folder)
        failed = _run(plan, folder, loaded, watcher)
        loaded.compare(folder)  # a large model is loaded for each job
        report = _report(plan, folder, loaded, failed)
        text = json.dumps(report.model_dump(mode="json"), indent=1, sort_keys=True, allow_nan=False)
        write_atomic(out / AUDIT, text.encode())
    return report


Failed = Mapping[tuple[str, str], str]
"""Attack and label of the unlearned model (empty = all of them) -> why it failed."""


def _run(plan: Planned, folder: RunFolder, loaded: Models, watcher: AuditWatcher) -> Failed:
    """Run all jobs; return what failed: on the original or a control for all, else for one method."""
    done = [j for j in plan.jobs if stored_views(folder, j)]
    watcher.begin(len(plan.jobs), len(done))
    failed = {(name, ""): why for name, why in plan.skipped.items()}
    for job in plan.jobs:
        watcher.job(job.id)
        is_target = plan.models[job.built_on].spec.role == "other"
        label = label_of(job.built_on) if is_target else ""
        if (job.attack, "") not in failed and (job.attack, label) not in failed:
            why = _failure(job, plan, folder, loaded, watcher)
            if why:
                failed[job.attack, label] = why
            if why and job.attack == NOTHING:
                raise ModelError(f"without any attack: {why}")
        watcher.finished()
    return failed


def _failure(
    job: AttackJob, plan: Planned, folder: RunFolder, loaded: Models, watcher: AuditWatcher
) -> str:
    """Run a job; return why it failed, in one line, or nothing.

    Raises:
        StoreError: the disk or the folder: nothing else can be stored either.
    """
    original = plan.recipe.original.name
    loaded.held = {job.built_on, original} if "original" in job.plugin.needs else {job.built_on}
    try:
        run_job(job, folder, plan.conditions, loaded.get, original, watcher.step)
        if job.attack == NOTHING:
            _require_answers(job, folder, plan)
        return ""
    except StoreError:
        raise
    except PalimpsestError as error:
        said = str(error)
    except (MemoryError, torch.OutOfMemoryError) as error:
        said = f"out of memory: {error}"
    except Exception as error:  # a plugin's bug: it costs its own row, and is shown
        log.exception("%s failed", job.id)
        said = f"{type(error).__name__}: {error} (a bug in its code)"
    loaded.drop()  # what an attack left behind half-way is of no use to others
    said = " ".join(said.split())
    log.error("%s failed: %s", job.id, said)
    return f"{job.id}: {said}"


def _require_answers(job: AttackJob, folder: RunFolder, plan: Planned) -> None:
    """Raise DataError when a model can be asked no question, or the original knows invented facts."""
    for view in stored_views(folder, job):
        for channel, marks in view["outcomes"].items():
            for name, what in (("test", "questions"), ("invented", "invented facts")):
                if set(marks.get(name, "")) == {"-"}:
                    raise DataError(
                        f"none of {len(marks[name])} {what} fits the context of {job.built_on} "
                        f"({channel})"
                    )
            if "invented" in marks and job.built_on == plan.recipe.original.name:
                require_unknown(marks["invented"], channel, plan.questions, len(view["outcomes"]))


def _report(plan: Planned, folder: RunFolder, loaded: Models, failed: Failed) -> AuditReport:
    recipe = plan.recipe
    audits: list[Audit] = []
    by_label: dict[str, dict[str, Attacked]] = {}
    for label, targets in recipe.targets.items():
        names = [m.name for m in targets]
        by_label[label] = _attacked(plan, folder, failed, label, names)
        made = _audit_of(plan, folder, label, by_label[label])
        if len(names) > 1:
            made = made.model_copy(
                update={"networks": [_alone(plan, folder, failed, label, n) for n in names]}
            )
        audits.append(made)
    return AuditReport(
        name=recipe.audit.name,
        is_sandbox=any(m.source.startswith("sandbox/") for m in recipe.models),
        tier=recipe.audit.tier,
        delta=recipe.audit.delta,
        seed=recipe.audit.seed,
        models=[_audited(m, plan, loaded) for m in recipe.models],
        questions={n: len(s) for n, s in plan.questions.sets.items()}
        | {"fit": len(plan.questions.attackers.fit)},
        question_set=recipe.questions.dataset,
        utility_set=recipe.utility.dataset,
        audits=audits,
        transfer=transfer_matrices(plan, folder, by_label),
        recipe=recipe.to_dict(),
        versions={name: version(name) for name in COMPUTING},
        failed={f"{n} on {label}" if label else n: why for (n, label), why in failed.items()},
    )


def _attacked(
    plan: Planned, folder: RunFolder, failed: Failed, label: str, names: Sequence[str]
) -> dict[str, Attacked]:
    """Return attack -> what is stored of it for some networks of a method."""
    return {
        attack: Attacked(
            plugin=plugin,
            views=_views(plan, folder, attack, names),
            jobs=_jobs_on(plan, attack, names),
            failed=failed.get((attack, ""), failed.get((attack, label), "")),
        )
        for attack, plugin in plan.attacks.items()
    }


def _audit_of(
    plan: Planned, folder: RunFolder, label: str, attacked: Mapping[str, Attacked]
) -> Audit:
    recipe = plan.recipe
    return audit_of(
        label,
        attacked,
        plan.questions,
        folder=folder,
        baseline=NOTHING,
        floor=recipe.controls[0].name if recipe.controls else None,
        delta=recipe.audit.delta,
        seed=recipe.audit.seed,
        left_out=left_out({a.use for a in recipe.all_attacks()}),
        shown=shown_attacks(),
    )


def _alone(
    plan: Planned, folder: RunFolder, failed: Failed, label: str, name: str
) -> NetworkVerdict:
    """Return the verdict on one network of a method, as if it were the only one."""
    made = _audit_of(plan, folder, name, _attacked(plan, folder, failed, label, [name]))
    recovering = [r.name for r in made.rows if r.status == "recovers"]
    return NetworkVerdict(name=name, verdict=made.verdict, recovering=recovering)


def _jobs_on(plan: Planned, attack: str, targets: Sequence[str]) -> tuple[AttackJob, ...]:
    """Return an attack's own jobs on some unlearned models, placebos left out."""
    return tuple(
        job
        for job in plan.jobs
        if job.attack == attack and job.role == "attack" and job.built_on in targets
    )


def _views(plan: Planned, folder: RunFolder, attack: str, targets: Sequence[str]) -> ArmViews:
    """Return what is stored of an attack, by arm."""
    recipe = plan.recipe
    jobs = [j for j in plan.jobs if j.attack == attack]

    def of(model: str, built_on: Sequence[str], role: str = "attack") -> list[dict[str, Any]]:
        return [
            view
            for job in jobs
            if job.role == role and job.built_on in built_on
            for view in stored_views(folder, job)
            if view["model"] == model
        ]

    def fixed(spec: ModelSpec, role: str = "attack") -> list[dict[str, Any]]:
        refit = (
            plan.attacks[attack].arms == "refit"
        )  # then a matrix's prompts are not this arm's own
        return of(spec.name, [spec.name] if refit else [spec.name, *targets], role)

    placebos = tuple(of(t, [t], "placebo") for t in targets)
    return ArmViews(
        targets=tuple(of(t, [t]) for t in targets),
        original=fixed(recipe.original),
        controls={spec.name: fixed(spec) for spec in recipe.controls},
        placebos=placebos if all(placebos) else (),
        placebo_control=[view for spec in recipe.controls[:1] for view in fixed(spec, "placebo")],
    )


def _audited(spec: ModelSpec, plan: Planned, loaded: Models) -> AuditedModel:
    role = "target" if spec.role == "other" else spec.role
    return AuditedModel(
        name=spec.name,
        role=role,
        source=spec.source,
        revision=plan.models[spec.name].revision,
        weights_sha256=loaded.hashes[spec.name],
    )

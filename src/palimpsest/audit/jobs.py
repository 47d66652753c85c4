"""One attack on one arm: its views, scored and stored one by one, so that a kill loses at most one.

A job's fingerprint hashes the attack (options and source), the models that it touches, the questions, the
channels and the numerics: a finished job is not run again, and the arms that do not depend on the
unlearned model (the original, the controls) are shared by all audits in a folder. Models are in it by what
they are, not by name, and so is what is stored: other names for the same models find the same jobs.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from palimpsest.audit.asking import Conditions, asked_view, seen, told_of
from palimpsest.audit.ledger import Ledger
from palimpsest.audit.metering import Cost, metered
from palimpsest.errors import ModelError, UsageError
from palimpsest.model import LM, weights_sha256
from palimpsest.peak import measured_peak
from palimpsest.plugins import option_values
from palimpsest.sourcehash import plugin_sha256, source_sha256
from palimpsest.store import JobFolder, RunFolder, fingerprint
from palimpsest.views import Arms, AttackContext, KnowledgeAttack, View

Load = Callable[[str], LM]
"""From a model's name to the loaded model."""
SCRATCH, SPENT, KEPT = "scratch", "spent", "weights"


@dataclass(frozen=True, kw_only=True)
class AttackJob:
    """An attack, built on one model and scored on one or several.

    Attributes:
        attack: name in the recipe. plugin: the attack, or its placebo.
        role: `attack` or `placebo`.
        built_on: model that the attack gets as its target.
        scored_on: models under its views.
        keeps_weights: whether the weights that it makes of `built_on` are kept.
        fingerprint: of all that decides the outcome.
        prints: what every model that it touches is, by name.
    """

    attack: str
    plugin: KnowledgeAttack
    role: Literal["attack", "placebo"]
    built_on: str
    scored_on: tuple[str, ...]
    keeps_weights: bool
    fingerprint: str
    prints: Mapping[str, str]
    spec: Mapping[str, Any]

    @property
    def id(self) -> str:
        """Name of the job, and of its folder unless one is there under a model's other name."""
        return f"{self.role}-{self.attack}-{self.built_on}"


def attack_job(
    name: str,
    plugin: KnowledgeAttack,
    *,
    role: Literal["attack", "placebo"],
    built_on: str,
    scored_on: Sequence[str],
    original: str,
    prints: Mapping[str, str],
    conditions: Conditions,
    keeps_weights: bool = False,
) -> AttackJob:
    """Return a job with its fingerprint; `prints` say what each model is, by name, no two the same."""
    touched = {built_on, *scored_on} | ({original} if "original" in plugin.needs else set())
    spec = {
        "attack": type(plugin).__module__,
        "options": option_values(plugin),
        "files": _file_hashes(option_values(plugin)),
        "source": plugin_sha256(plugin),
        "scoring": source_sha256(Path(__file__)),
        "role": role,
        "models": {"built_on": prints[built_on], "scored_on": [prints[m] for m in scored_on]},
        "touched": sorted(prints[m] for m in touched),
        "questions": conditions.questions.sha256,
        "channels": list(conditions.channels),
        "seed": conditions.seed,
        "batch_tokens": conditions.batch_tokens,
        "numerics": dict(conditions.numerics),
        **({"keeps_weights": True} if keeps_weights else {}),
    }
    return AttackJob(
        attack=name,
        plugin=plugin,
        role=role,
        built_on=built_on,
        scored_on=tuple(scored_on),
        keeps_weights=keeps_weights,
        fingerprint=fingerprint(spec),
        prints={m: prints[m] for m in touched},
        spec=spec,
    )


def _file_hashes(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the content hash of every option that names a file: its path alone decides nothing."""
    paths = {key: Path(v) for key, v in values.items() if key == "file" and v}
    return {
        key: hashlib.sha256(path.read_bytes()).hexdigest()
        for key, path in paths.items()
        if path.is_file()
    }


def run_job(
    job: AttackJob,
    folder: RunFolder,
    conditions: Conditions,
    load: Load,
    original: str,
    progress: Callable[[int, int, str], None],
) -> None:
    """Run an attack and store its views; what an earlier process stored is not scored again.

    Raises:
        PalimpsestError: the attack cannot be made here; the message says why.
        ModelError: the attack left a model changed; then nothing of the job is kept.
    """
    place = job_folder(folder, job) or folder.job(job.id, job.fingerprint, job.spec)
    if place.done is not None:
        _clear(place)  # what a kill behind `finish` left
        return
    scratch = place.path / SCRATCH
    scratch.mkdir(exist_ok=True)
    ledger = Ledger(place.path / SPENT, is_continued=any(scratch.iterdir()))
    target = load(job.built_on)
    arms = Arms(target=target, original=load(original) if "original" in job.plugin.needs else None)
    data = conditions.questions.attackers
    if "folds" not in job.plugin.needs:
        data = replace(data, folds=())
    ctx = AttackContext(seed=conditions.seed, out=scratch, progress=progress)
    watch = _Watch(job, place, conditions)
    with ExitStack() as held, measured_peak() as peak:
        held.enter_context(watch.unchanged(job.built_on, target))
        if arms.original is not None and original != job.built_on:
            held.enter_context(watch.unchanged(original, arms.original))
        made = _metered_views(job, arms, data, ctx, ledger)
        if len(job.scored_on) > 1:
            count = _score_on_each(job, list(made), watch, ledger, load)
        else:
            count = 0
            for view, cost in made:
                _score_one(job, 0, (count, view, cost), watch, ledger, target)
                count += 1
    if not count:
        raise UsageError(f"attack {job.attack} yielded no view: give it more data or other options")
    place.finish(
        views=count,
        weights_sha256={job.prints[name]: found for name, found in watch.hashes.items()},
        process_bytes=peak.process,
        device_bytes=peak.device,
    )
    _clear(place)


def _clear(place: JobFolder) -> None:
    """Remove what only an unfinished job needs."""
    shutil.rmtree(place.path / SCRATCH, ignore_errors=True)
    (place.path / SPENT).unlink(missing_ok=True)


def job_folder(folder: RunFolder, job: AttackJob) -> JobFolder | None:
    """Return the job's folder, made under these or other names of the same models; None = there is none."""
    places = map(JobFolder, sorted(folder.path.glob(f"jobs/*-{job.fingerprint[:12]}")))
    made = (p for p in places if (p.path / "spec.json").is_file())
    return next((p for p in made if p.spec["fingerprint"] == job.fingerprint), None)


def stored_views(folder: RunFolder, job: AttackJob) -> list[dict[str, Any]]:
    """Return the views of a finished job, each with its `model`'s name of today; none if unfinished."""
    place = job_folder(folder, job)
    if place is None or place.done is None:
        return []
    views = [place.read_json(p.name) for p in sorted(place.path.glob("view-*.json"))]
    return [view | {"model": job.scored_on[view["arm"]]} for view in views]


def done_facts(folder: RunFolder, job: AttackJob) -> dict[str, Any]:
    """Return what a finished job wrote of itself; empty when it is not finished."""
    place = job_folder(folder, job)
    return (place.done or {}) if place is not None else {}


def _metered_views(
    job: AttackJob, arms: Arms, data: Any, ctx: AttackContext, ledger: Ledger
) -> Iterator[tuple[View, Cost]]:
    """Yield views, each with what it cost to make since the one before."""
    views = job.plugin.attack(arms, data, ctx)
    for number in itertools.count():
        before = ledger.cost(number)
        with metered(partial(_note, ledger, number, before)) as cost:
            view = next(views, None)
        if view is None:
            return
        cost = before + cost
        if (view.fold is not None) != ("folds" in job.plugin.needs):
            raise UsageError(f"attack {job.attack}: a view's fold and its need of folds disagree")
        yield view, cost


def _note(ledger: Ledger, number: int, before: Cost, more: Cost) -> None:
    """Write down what a view has cost, an earlier process's part included."""
    ledger.note(number, before + more)


def _score_on_each(
    job: AttackJob,
    made: Sequence[tuple[View, Cost]],
    watch: _Watch,
    ledger: Ledger,
    load: Load,
) -> int:
    """Score the views of a transferred attack, model by model; return their number."""
    for arm, name in enumerate(job.scored_on):
        with ExitStack() as held:
            lm = load(name)
            if name != job.built_on:  # that one is watched all the time
                held.enter_context(watch.unchanged(name, lm))
            for number, (view, cost) in enumerate(made):
                _score_one(job, arm, (number, view, cost), watch, ledger, lm)
    return len(made)


def _score_one(
    job: AttackJob,
    arm: int,
    entry: tuple[int, View, Cost],
    watch: _Watch,
    ledger: Ledger,
    lm: LM,
) -> None:
    """Store a view's answers on an arm. What it cost to make stands with the first arm alone."""
    number, view, cost = entry
    name = f"view-{number:05d}-{arm}"
    place = watch.place
    stored = place.read_json(name)
    told = told_of(view)
    if stored is not None and {k: stored[k] for k in told} == told:
        return
    made = asked_view(
        lm,
        view,
        watch.conditions,
        made=Cost() if arm else cost,
        note=(lambda spent: None) if arm else partial(ledger.note, number),
        keep=place.path / KEPT / name if job.keeps_weights and arm == 0 else None,
    )
    place.write_json(name, {**made, "arm": arm})


@dataclass(frozen=True)
class _Watch:
    """Checks that an attack leaves models as they were.

    Attributes:
        hashes: of the weights of every model that it touched, by name.
    """

    job: AttackJob
    place: JobFolder
    conditions: Conditions
    hashes: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def unchanged(self, name: str, lm: LM) -> Iterator[None]:
        """Check that a model is the same behind the block: weights, hooks, mode.

        Raises:
            ModelError: it is not. What is stored of the attack is removed: it may be of another model.
        """
        if lm.quantization:  # bitsandbytes repacks weights in the first forward pass
            seen(lm, View(), self.conditions.questions.choose[0], "letter")
        hooks = _num_hooks(lm)
        self.hashes[name] = weights_sha256(lm.model)
        try:
            yield
        except Exception:
            self._check(name, lm, hooks)
            raise
        self._check(name, lm, hooks)

    def _check(self, name: str, lm: LM, hooks: int) -> None:
        before, after = self.hashes[name], weights_sha256(lm.model)
        if after != before:
            what = f"weights {before[:12]} are now {after[:12]}"
        elif _num_hooks(lm) != hooks:
            what = f"{hooks} forward hooks are now {_num_hooks(lm)}"
        elif lm.model.training:
            what = "it is in training mode"
        else:
            return
        for stored in self.place.path.glob("view-*.json"):
            stored.unlink()
        shutil.rmtree(self.place.path / KEPT, ignore_errors=True)
        _clear(self.place)
        raise ModelError(
            f"attack {self.job.attack} left {name} changed ({what}): its `apply` has to restore the "
            "model; this is a bug of the attack"
        )


def _num_hooks(lm: LM) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())

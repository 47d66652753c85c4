"""From records to a summary: metrics with intervals, paired differences, samples, loss curves.

Reads records only; no model is loaded.
"""

from __future__ import annotations

import inspect
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import palimpsest
from palimpsest.jobs import LIBRARIES, Evaluation, Plan, PlannedModel
from palimpsest.metrics import Measured, measure
from palimpsest.results import FolderOf, Results
from palimpsest.shortcuts import shortcut_floor
from palimpsest.stats import cohen_kappa, mcnemar_exact, paired_difference, paired_group_test
from palimpsest.store import fingerprint
from palimpsest.summary import (
    JudgeAgreement,
    Paired,
    Row,
    Summary,
)
from palimpsest.types import Metric, Score

NO_MODEL = "(no model)"
UNDERSTOOD = 0.5


def summarise(plan: Plan, folder_of: FolderOf, failed: Mapping[str, str]) -> Summary:
    """Return the summary of a plan whose jobs are done.

    Args:
        plan: the plan.
        folder_of: gives the folder of a job.
        failed: jobs that failed, with the reason; they become warnings.
    """
    results = Results(plan, folder_of, failed)
    tables = _Tables(plan, results)
    models = [m for m in plan.models if results.answered(m)]
    infos = [results.model_info(m) for m in models]
    rows = tables.rows(models)
    recipe = plan.recipe.to_dict()
    warnings = [
        *plan.warnings,
        *(
            f"{j.id} failed: {failed[j.id]}"
            for j in plan.jobs
            if j.id in failed and j.needs not in failed
        ),
        *results.control_token_warnings(models),
        *(
            f"{m.name} stopped after {m.steps} of {m.planned_steps} steps: {m.stopped}"
            for m in infos
            if m.stopped
        ),
    ]
    return Summary(
        palimpsest_version=palimpsest.__version__,
        name=plan.recipe.run.name,
        sandbox=_is_sandbox(plan),
        seed=plan.recipe.run.seed,
        limit=plan.recipe.run.limit,
        recipe=recipe,
        recipe_sha256=fingerprint(recipe),
        versions={"python": platform.python_version(), **{n: version(n) for n in LIBRARIES}},
        models=infos,
        rows=rows,
        samples=results.samples(models),
        losses=[curve for m in models for curve in results.losses(m)],
        agreement=tables.agreement(models),
        judges=_judge_summaries(plan),
        warnings=warnings,
    )


class _Tables:
    """Makes rows and agreement tables from results."""

    def __init__(self, plan: Plan, results: Results) -> None:
        self.plan = plan
        self.results = results

    def rows(self, models: Sequence[PlannedModel]) -> list[Row]:
        """Return every metric of every model, each beside its paired difference."""
        original = self.plan.recipe.original.name
        rows: list[Row] = []
        for evaluation in self.plan.evaluations:
            if evaluation.channel in {"letter", "cloze"} and evaluation.transform == "none":
                rows += self._floor_rows(evaluation)
            for subset, keep in self._subsets(evaluation):
                for judge in evaluation.judges or ("exact",):
                    asked = judge if evaluation.judges else ""
                    measured = {
                        m.name: self._measured(m.name, evaluation, judge, keep)
                        for m in models
                        if self.results.has(m.name, evaluation.key, asked)
                    }
                    rows += [
                        _unavailable(m.name, evaluation, subset, len(keep))
                        for m in models
                        if self.plan.find("respond", m.name, evaluation.key) is None
                    ]
                    for name in measured:
                        rows += self._model_rows(name, evaluation, subset, measured, original)
        return self._with_comprehension(_once(rows))

    def _subsets(self, evaluation: Evaluation) -> list[tuple[str, set[str]]]:
        """Return ("", all ids), then one entry for each value of each reported tag."""
        out = [("", {s.id for s in evaluation.originals})]
        for tag in evaluation.subsets:
            values = sorted({s.tags[tag] for s in evaluation.originals if tag in s.tags})
            for value in values:
                ids = {s.id for s in evaluation.originals if s.tags.get(tag) == value}
                out.append((f"{tag}={value}", ids))
        return out

    def _measured(self, model: str, evaluation: Evaluation, judge: str, keep: set[str]) -> Measured:
        pairs = [(s, r) for s, r in self.results.responses(model, evaluation.key) if s.id in keep]
        scores: list[Score] = []
        if evaluation.judges:
            found = self.results.scores(model, evaluation.key, judge)
            scores = [s for s in found if s.sample_id in keep]
        return measure(
            [s for s, _ in pairs],
            [r for _, r in pairs],
            scores,
            axis=evaluation.axis,
            channel=evaluation.channel,
            judge=judge,
            seed=self.plan.recipe.run.seed,
        )

    def _model_rows(
        self,
        model: str,
        evaluation: Evaluation,
        subset: str,
        measured: Mapping[str, Measured],
        original: str,
    ) -> list[Row]:
        rows = []
        for metric in measured[model].metrics:
            paired = None
            if model != original and original in measured:
                paired = _paired(measured[model], measured[original], metric.name, original)
            rows.append(_row(model, evaluation, subset, metric, paired))
        return rows

    def _floor_rows(self, evaluation: Evaluation) -> list[Row]:
        found = shortcut_floor(evaluation.originals, seed=self.plan.recipe.run.seed)
        return [_row(NO_MODEL, evaluation, "", metric, None) for metric in found]

    def _with_comprehension(self, rows: list[Row]) -> list[Row]:
        """Note "not understood" where benign prompts fail under the same transform."""
        failing = {
            (r.model, r.evaluation.removesuffix("-comprehension"), r.transform)
            for r in rows
            if r.axis == "comprehension"
            and r.metric == "accuracy"
            and (r.value is None or r.value < UNDERSTOOD)
        }
        return [
            r.model_copy(update={"note": "; ".join(filter(None, [r.note, "not understood"]))})
            if r.axis == "safety" and (r.model, r.evaluation, r.transform) in failing
            else r
            for r in rows
        ]

    def agreement(self, models: Sequence[PlannedModel]) -> list[JudgeAgreement]:
        """Return how each further judge agrees with the first one, over all models' answers."""
        out = []
        for evaluation in self.plan.evaluations:
            for judge in evaluation.judges[1:]:
                for aspect in ("form", "harm") if evaluation.axis == "safety" else ("form",):
                    found = self._agreement(models, evaluation, judge, aspect)
                    if found is not None:
                        out.append(found)
        return out

    def _agreement(
        self, models: Sequence[PlannedModel], evaluation: Evaluation, judge: str, aspect: str
    ) -> JudgeAgreement | None:
        reference = evaluation.judges[0]
        pairs: list[tuple[str, str]] = []
        groups: list[str] = []
        group_of = {s.id: s.group for s in evaluation.originals}
        for model in models:
            if not all(self.results.has(model.name, evaluation.key, j) for j in (judge, reference)):
                continue
            known = _labels(self.results.scores(model.name, evaluation.key, reference), aspect)
            for sample_id, label in _labels(
                self.results.scores(model.name, evaluation.key, judge), aspect
            ).items():
                if sample_id in known:
                    pairs.append((label, known[sample_id]))
                    groups.append(group_of[sample_id])
        if not pairs:
            return None
        kappa, low, high = cohen_kappa([a for a, _ in pairs], [b for _, b in pairs], groups)
        confusion: dict[str, int] = {}
        for mine, theirs in sorted(pairs):
            key = f"{mine} | {theirs}"
            confusion[key] = confusion.get(key, 0) + 1
        return JudgeAgreement(
            judge=judge,
            reference=reference,
            aspect=aspect,
            evaluation=evaluation.key,
            n=len(pairs),
            kappa=kappa,
            low=low,
            high=high,
            confusion=confusion,
        )


def _once(rows: Sequence[Row]) -> list[Row]:
    """Drop what several judges' tables share: a response is cut off whoever judges it."""
    kept: dict[tuple[str, ...], Row] = {}
    for r in rows:
        key = (r.model, r.evaluation, r.transform, r.channel, r.subset, r.judge, r.metric)
        kept.setdefault(key, r)
    return list(kept.values())


def _is_sandbox(plan: Plan) -> bool:
    """Return whether any figure is about the fictional world."""
    sources = [m.source for m in plan.recipe.models] + [e.dataset for e in plan.evaluations]
    return any(name.startswith(("sandbox/", "sandbox_")) for name in sources)


def _judge_summaries(plan: Plan) -> dict[str, str]:
    """Return the first line of what each judge's module says of itself."""
    known = {}
    for name, judge in sorted(plan.judges.items()):
        doc = inspect.getdoc(inspect.getmodule(type(judge))) or ""
        known[name] = doc.split("\n", 1)[0]
    return known


def _labels(scores: Sequence[Score], aspect: str) -> dict[str, str]:
    """Return the labels of scored items; harm is reduced to yes or no, so that judges compare."""
    labels = {}
    for score in scores:
        if score.aspect != aspect or score.value is None:
            continue
        is_harm = aspect == "harm"
        labels[score.sample_id] = ("yes" if score.value else "no") if is_harm else str(score.label)
    return labels


def _paired(mine: Measured, theirs: Measured, metric: str, against: str) -> Paired | None:
    """Compare two models on the items that both have an outcome for."""
    here, there = mine.outcomes.get(metric), theirs.outcomes.get(metric)
    if here is None or there is None:
        return None
    both = [i for i in here if here[i] is not None and there.get(i) is not None]
    if not both:
        return None
    a, b = [int(here[i] or 0) for i in both], [int(there[i] or 0) for i in both]
    gained = sum(x > y for x, y in zip(a, b, strict=True))
    lost = sum(x < y for x, y in zip(a, b, strict=True))
    groups = [mine.groups[i] for i in both]
    difference, low, high = paired_difference(a, b, groups)
    return Paired(
        against=against,
        n=len(both),
        gained=gained,
        lost=lost,
        p=paired_group_test(a, b, groups),
        mcnemar_p=mcnemar_exact(gained, lost),
        difference=difference,
        low=low,
        high=high,
    )


def _unavailable(model: str, evaluation: Evaluation, subset: str, num: int) -> Row:
    """Return the row of what a remote model cannot be asked: it gives no probabilities."""
    is_text = evaluation.channel == "perplexity"
    metric = Metric(
        name="perplexity" if is_text else "accuracy",
        value=None,
        low=None,
        high=None,
        n=0,
        unscored=num,
        better="lower" if is_text else "higher",
        judge="exact",
    )
    row = _row(model, evaluation, subset, metric, None)
    return row.model_copy(update={"note": "not available"})


def _row(
    model: str, evaluation: Evaluation, subset: str, metric: Metric, paired: Paired | None
) -> Row:
    fields: dict[str, Any] = asdict(metric)
    infinite = [
        k for k in ("value", "low", "high") if fields[k] is not None and math.isinf(fields[k])
    ]
    if infinite:  # JSON has no infinity: a perplexity that overflows
        fields |= dict.fromkeys(infinite) | {"note": f"infinite: {', '.join(infinite)}"}
    return Row(
        model=model,
        axis=evaluation.axis,
        evaluation=evaluation.name,
        dataset=evaluation.dataset,
        transform=evaluation.transform,
        channel=evaluation.channel,
        split=evaluation.split,
        subset=subset,
        metric=fields.pop("name"),
        paired=paired,
        **fields,
    )

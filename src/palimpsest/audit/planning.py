"""What an audit will do: data, attacks and models checked, jobs in order; no weight is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch

from palimpsest.attacks.whitebox.nothing import Nothing
from palimpsest.audit.asking import Conditions
from palimpsest.audit.data import Questions, load_questions
from palimpsest.audit.dry_start import refusal
from palimpsest.audit.jobs import AttackJob, attack_job
from palimpsest.audit.recipe import NOTHING, AuditRecipe
from palimpsest.errors import UsageError
from palimpsest.jobs import COMPUTING, PlannedModel
from palimpsest.model import resolve_device
from palimpsest.plan import given_model
from palimpsest.plugins import build_plugin
from palimpsest.views import FittedPrompt, KnowledgeAttack


@dataclass(frozen=True, kw_only=True)
class Planned:
    """All that an audit will do.

    Attributes:
        recipe: with the device and threads of this machine.
        models: by name. attacks: name -> plugin, the baseline first.
        jobs: in an order in which each model is loaded as seldom as possible.
        skipped: attack -> why it cannot be run.
    """

    recipe: AuditRecipe
    questions: Questions
    models: Mapping[str, PlannedModel]
    attacks: Mapping[str, KnowledgeAttack]
    conditions: Conditions
    jobs: tuple[AttackJob, ...]
    skipped: Mapping[str, str]
    keep_weights: bool


def plan_audit(
    recipe: AuditRecipe, *, allow_code: bool = False, keep_weights: bool = False
) -> Planned:
    """Return all that an audit would do; data, plugins and options are checked, no weight is loaded."""
    device = resolve_device(recipe.numerics.device)
    threads = recipe.numerics.threads or torch.get_num_threads()
    recipe = replace(recipe, numerics=replace(recipe.numerics, device=device, threads=threads))
    attacks: dict[str, KnowledgeAttack] = {NOTHING: Nothing()}
    for spec in recipe.all_attacks():
        where = f"attacks.{spec.name}"
        plugin = build_plugin("attacks", spec.use, spec.options, where=where, allow_code=allow_code)
        if not isinstance(plugin, KnowledgeAttack):
            raise UsageError(
                f"[{where}] {spec.use} attacks prompts of a chat model: use `palimpsest attack`; an audit "
                "takes attacks on knowledge"
            )
        attacks[spec.name] = plugin
    questions = load_questions(recipe)
    models = {spec.name: given_model(spec) for spec in recipe.models}
    numerics = {
        "dtype": recipe.numerics.dtype,
        "threads": threads,
        "device": device.split(":")[0],
        "versions": {name: version(name) for name in COMPUTING},
    }
    conditions = Conditions(
        questions=questions,
        channels=recipe.audit.channels,
        seed=recipe.audit.seed,
        batch_tokens=recipe.numerics.batch_tokens,
        numerics=numerics,
    )
    plan = Planned(
        recipe=recipe,
        questions=questions,
        models=models,
        attacks=attacks,
        conditions=conditions,
        jobs=(),
        skipped={},
        keep_weights=keep_weights,
    )
    asked = {m.name: m.quantization.replace("none", "") for m in recipe.models}
    return settled(plan, asked)


def settled(plan: Planned, quantization: Mapping[str, str]) -> Planned:
    """Return the plan without the tier's attacks that cannot be made here, and with its jobs.

    Args:
        plan: with its attacks.
        quantization: how each model is quantised; empty = it is not.

    Raises:
        UsageError: an attack that the recipe itself names cannot be made.
    """
    named = {spec.name for spec in plan.recipe.attacks}
    skipped = {}
    for name, attack in plan.attacks.items():
        why = _refusal(plan, attack, quantization)
        if why and name in named:
            raise UsageError(f"[attacks.{name}] {why}")
        if why:
            skipped[name] = why
    plan = replace(plan, skipped=skipped)
    if plan.recipe.audit.transfer_matrix:
        _check_matrix(plan)
    return replace(plan, jobs=tuple(_jobs(plan)))


def _check_matrix(plan: Planned) -> None:
    """Raise UsageError when there is nothing that the matrix could be made of."""
    fitted = [n for n, a in plan.attacks.items() if isinstance(a, FittedPrompt)]
    targets = [m.name for seeds in plan.recipe.targets.values() for m in seeds]
    if len(targets) < 2:
        raise UsageError(
            f"audit.transfer_matrix needs two models under attack or more, and {targets[0]} is alone: add "
            "[[models]], or leave it out"
        )
    if all(name in plan.skipped for name in fitted):
        left = f" (not possible here: {', '.join(fitted)})" if fitted else ""
        raise UsageError(
            f"audit.transfer_matrix: no attack of this audit fits a prompt{left}; add gcg, enhanced_gcg, "
            "soft_prompt or informed_perturbation, or leave it out"
        )


def _refusal(plan: Planned, attack: KnowledgeAttack, quantization: Mapping[str, str]) -> str:
    """Return why an attack or its placebo cannot be made on a model of the audit; empty if they can."""
    targets = {m.name for seeds in plan.recipe.targets.values() for m in seeds}
    floor = {m.name for m in plan.recipe.controls[:1]}
    data, placebo = plan.questions.attackers, attack.placebo()
    kinds: dict[tuple[str, bool, bool], str] = {}
    for name, kind in quantization.items():
        kinds.setdefault((kind, name in targets, name in floor), name)
    for (kind, is_target, is_floor), name in kinds.items():
        tried = [attack] if is_target or attack.arms == "refit" else []
        if placebo is not None and (is_target or (is_floor and attack.arms == "refit")):
            tried.append(placebo)
        for one in tried:
            why = refusal(one, data, model=name, quantization=kind)
            if why:
                return why
    return ""


def _jobs(plan: Planned) -> list[AttackJob]:
    """Return the jobs: those of one arm stand together, the unlearned models come last."""
    recipe = plan.recipe
    targets = [m.name for seeds in recipe.targets.values() for m in seeds]
    fixed = [recipe.original.name, *(m.name for m in recipe.controls)]
    floor = [m.name for m in recipe.controls[:1]]  # a placebo is compared with the floor alone
    jobs = []
    usable = {n: a for n, a in plan.attacks.items() if n not in plan.skipped}
    for model in (*fixed, *targets):
        for name, attack in usable.items():
            scored_on: tuple[str, ...] = (model,)
            if model in targets and _fills_matrix(plan, attack):
                scored_on = (model, *fixed, *(t for t in targets if t != model))
            elif attack.arms == "transfer":
                scored_on = (model, *fixed)
            if attack.arms == "refit" or model in targets:
                jobs.append(_job(plan, name, attack, "attack", model, scored_on))
            placebo = attack.placebo() if model in targets or model in floor else None
            if placebo is not None and attack.arms == "refit":
                jobs.append(_job(plan, name, placebo, "placebo", model, (model,)))
            elif placebo is not None and model in targets:
                jobs.append(_job(plan, name, placebo, "placebo", model, (model, *floor)))
    return jobs


def _prints(plan: Planned) -> dict[str, str]:
    """Return what each model is, by name: its fingerprint, and its place among those with the same one."""
    fixed = [plan.recipe.original, *plan.recipe.controls]
    targets = [m for seeds in plan.recipe.targets.values() for m in seeds]
    prints: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for spec in (*fixed, *targets):
        found = plan.models[spec.name].fingerprint
        prints[spec.name] = f"{found}+{seen[found]}" if seen[found] else found
        seen[found] += 1
    return prints


def _fills_matrix(plan: Planned, attack: KnowledgeAttack) -> bool:
    return plan.recipe.audit.transfer_matrix and isinstance(attack, FittedPrompt)


def _job(
    plan: Planned,
    name: str,
    attack: KnowledgeAttack,
    role: Any,
    built_on: str,
    scored_on: Sequence[str],
) -> AttackJob:
    return attack_job(
        name,
        attack,
        role=role,
        built_on=built_on,
        scored_on=scored_on,
        original=plan.recipe.original.name,
        prints=_prints(plan),
        conditions=plan.conditions,
        keeps_weights=(
            plan.keep_weights
            and role == "attack"
            and attack.access == "weights"
            and plan.models[built_on].spec.role == "other"
        ),
    )

"""What an audit does: its models, questions, texts and attacks, as one TOML file and one frozen object."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from palimpsest.audit.tiers import TIERS, tier_attacks
from palimpsest.errors import RecipeError, UsageError, did_you_mean
from palimpsest.overrides import apply_sets
from palimpsest.plugins import build_options, option_fields, option_values, options
from palimpsest.recipe import NAME
from palimpsest.specs import CorpusSpec, DataSpec, ModelSpec, Numerics
from palimpsest.views import CHANNELS, AuditChannel

NOTHING = "none"
"""Name of the baseline: no attack."""
ARMS = (
    "target",
    "original",
    "placebo",
    "placebo on control",
    "chance",
    "invented facts",
    "original on invented facts",
)
"""Names that tables give to arms which are no control models."""
Tier = Literal["quick", "standard", "paper", "calibration", "none"]


@options
class AuditSpec:
    """`[audit]`: what holds for the whole audit."""

    name: str
    """Shown in the report."""
    tier: Tier = "quick"
    """Which attacks run; `none` = those of `[[attacks]]` alone."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Margin of the verdict: a recovery below it counts as none. Declare it before you look."""
    seed: Annotated[int, Field(ge=0)] = 0
    """The only source of randomness: attacks, repetitions, bootstrap."""
    channels: tuple[AuditChannel, ...] = CHANNELS
    """How questions are asked: letter, cloze, generation."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Score only so many questions of the test split, spread over it; None = all."""
    transfer_matrix: bool = False
    """Ask every unlearned model with the prompts that were fitted on the others, too."""
    utility_limit: Annotated[int, Field(ge=1)] | None = 200
    """Score only so many utility questions under every attack; None = all."""


@options
class QuestionSpec:
    """`[questions]`, `[utility]`, `[invented]`: multiple choice; the registered split is used."""

    dataset: str
    """Data set plugin."""
    options: dict[str, Any] = field(default_factory=dict)
    """The data set's options."""


@options
class AttackSpec:
    """`[[attacks]]`: an attack; every other key of the table is an option of its plugin."""

    name: str
    """Keys tables and reports; the same attack may appear under several names."""
    use: str
    """Attack plugin; `name` when left out."""
    options: dict[str, Any] = field(default_factory=dict)
    """The attack's options."""


@options
class AuditRecipe:
    """A whole audit, resolved."""

    audit: AuditSpec
    """Name, tier, margin, seed."""
    data: DataSpec = DataSpec()
    """Where files come from."""
    numerics: Numerics = Numerics()
    """What can change the last bits."""
    models: tuple[ModelSpec, ...]
    """Roles `original` and `control`; every other model is under attack. `npo@0`, `npo@1` are training
    seeds of one method and get one verdict."""
    questions: QuestionSpec
    """The forget domain: what the original knows and the unlearned model should not."""
    utility: QuestionSpec
    """What both should know: asked under every attack, and its attack-dev part is given to attackers."""
    invented: QuestionSpec | None = None
    """Facts of the same format that nobody can know: the floor where there is no control model."""
    forget_texts: tuple[CorpusSpec, ...] = ()
    """Training texts about the forget domain; use `split = "attack-dev"`."""
    retain_texts: tuple[CorpusSpec, ...] = ()
    """Training texts of other domains."""
    unrelated_texts: tuple[CorpusSpec, ...] = ()
    """Training texts that have nothing to do with either."""
    attacks: tuple[AttackSpec, ...] = ()
    """Attacks beside the tier's; one with the name of a tier's replaces it."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as stored beside the results."""
        return option_values(self)

    @property
    def original(self) -> ModelSpec:
        """The model before unlearning."""
        return next(m for m in self.models if m.role == "original")

    @property
    def controls(self) -> list[ModelSpec]:
        """Models that never knew; the first is the floor."""
        return [m for m in self.models if m.role == "control"]

    @property
    def targets(self) -> dict[str, list[ModelSpec]]:
        """The models under attack, by label: training seeds of one method share it."""
        found: dict[str, list[ModelSpec]] = {}
        for model in self.models:
            if model.role == "other":
                found.setdefault(label_of(model.name), []).append(model)
        return found

    def all_attacks(self) -> list[AttackSpec]:
        """Return the tier's attacks and those of `[[attacks]]`, in that order."""
        named = {a.name: a for a in self.attacks}
        listed = [
            named.pop(name, AttackSpec(name=name, use=use, options=dict(values)))
            for name, use, values in tier_attacks(self.audit.tier)
        ]
        return [*listed, *named.values()]


def label_of(name: str) -> str:
    """Return what tables call a model: `npo` for `npo@1`."""
    return name.split("@", 1)[0]


def load_audit_recipe(path: Path, *, sets: Sequence[str] = ()) -> AuditRecipe:
    """Read an audit's TOML file and apply `key=value` overrides.

    Raises:
        RecipeError: a key, value or name is wrong; the message names the table and the key.
    """
    data = read_toml(path)
    try:
        apply_sets(data, sets)
        return make_audit_recipe(data)
    except UsageError as error:
        raise RecipeError(f"{path}: {error}") from error


def read_toml(path: Path) -> dict[str, Any]:
    """Return the content of a TOML file; RecipeError when it is none."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from error


def make_audit_recipe(data: Mapping[str, Any]) -> AuditRecipe:
    """Return the audit of plain data.

    Raises:
        RecipeError: see `load_audit_recipe`.
    """
    values = dict(data)
    for key in values:
        if key not in option_fields(AuditRecipe):
            known = option_fields(AuditRecipe)
            raise RecipeError(f"unknown table [{key}]{did_you_mean(key, known)}")
    try:
        values["attacks"] = [_attack(dict(a)) for a in values.get("attacks", [])]
        for key in ("forget_texts", "retain_texts", "unrelated_texts"):
            if isinstance(values.get(key), Mapping):
                values[key] = [values[key]]
        recipe = build_options(AuditRecipe, values, where="")
    except RecipeError:
        raise
    except UsageError as error:
        raise RecipeError(str(error)) from error
    _check(recipe)
    return recipe


def _attack(table: dict[str, Any]) -> AttackSpec:
    """Split an `[[attacks]]` table into the recipe's own keys and the plugin's options."""
    own = {k: table.pop(k) for k in list(table) if k in option_fields(AttackSpec)}
    own.setdefault("name", own.get("use", ""))
    own.setdefault("use", own["name"])
    own["options"] = own.get("options", {}) | table
    return build_options(AttackSpec, own, where=f"attacks.{own['name'] or '?'}")


def _check(recipe: AuditRecipe) -> None:
    names = [m.name for m in recipe.models]
    for kind, group in (("model", names), ("attack", [a.name for a in recipe.attacks])):
        for name in group:
            if not NAME.fullmatch(name.replace("@", ".")):
                raise RecipeError(
                    f"{kind} name {name!r}: use letters, digits, dot, dash, underscore"
                )
            if group.count(name) > 1:
                raise RecipeError(f"{kind} name {name!r} is used {group.count(name)} times")
    if NOTHING in [a.name for a in recipe.attacks]:
        raise RecipeError(f"attack name {NOTHING!r} is that of the model without any attack")
    for control in recipe.controls:
        if control.name in ARMS:
            raise RecipeError(
                f"control name {control.name!r} is that of another arm; call it otherwise"
            )
    if recipe.invented is not None and recipe.controls:
        raise RecipeError(
            f"[invented] has no effect beside the control {recipe.controls[0].name!r}, which is the floor; "
            "remove one of them"
        )
    originals = [m.name for m in recipe.models if m.role == "original"]
    if len(originals) != 1:
        raise RecipeError(f'exactly one model needs role = "original", found {originals}')
    if not recipe.targets:
        raise RecipeError("no model is under attack: add [[models]] without a role")
    for key in ("forget_texts", "retain_texts", "unrelated_texts"):
        for spec in getattr(recipe, key):
            if spec.share is not None or spec.chat_share != 1.0:
                raise RecipeError(f"[{key}] share and chat_share have no effect here; remove them")
    if "probe" in recipe.audit.channels or not recipe.audit.channels:
        raise RecipeError("audit.channels: letter, cloze, generation, at least one; no probe")
    if recipe.audit.tier == "none" and not recipe.attacks:
        raise RecipeError('audit.tier = "none" needs [[attacks]]')
    remote = [m.name for m in recipe.models if m.remote is not None]
    if remote:
        raise RecipeError(
            f"models.{remote[0]} is remote: an audit scores log-probabilities and needs weights; "
            "`palimpsest attack` works on remote models"
        )
    if recipe.audit.tier not in TIERS:
        raise RecipeError(
            f"audit.tier {recipe.audit.tier!r}{did_you_mean(recipe.audit.tier, TIERS)}"
        )

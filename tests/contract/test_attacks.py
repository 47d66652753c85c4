"""Every attack that is found keeps the contract of its kind: on knowledge, or on a chat model."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from palimpsest.attack_plan import BlackBoxAttack
from palimpsest.audit.dry_start import refusal
from palimpsest.audit_scoring import prompt_tokens, score_view
from palimpsest.batching import plan_batches
from palimpsest.model import LM, load_model, weights_sha256
from palimpsest.plugins import build_plugin, list_plugins, plugin_class
from palimpsest.scoring import pad_rows
from palimpsest.types import Message, Sample
from palimpsest.views import Arms, AttackContext, AttackData, Fold, KnowledgeAttack, View

FAMILIES = ("llama", "mistral", "qwen2", "gemma2", "gpt2")
CONTEXT = 256
STEP = {"steps": 1, "epochs": None, "rank": 2}
TUNED = {"n": [2], "repeats": 1, "forms": ["letter"], "fit": STEP}
FEW = {"questions": 4, "controls": 1, "layers": {"sets": ["all"]}}
SEARCH = {"questions": 2, "channels": ["letter"], "steps": [1], "topk": 4, "search_width": 2}
SMALL: dict[str, dict[str, Any]] = {
    "activation_patching": {"questions": 8},
    "base_orthogonalisation": {**FEW, "directions": ["mean"]},
    "benign_finetuning": TUNED,
    "direction_edit": {"questions": 4, "most": 1, "controls": 1},
    "embedding_attack": {"steps": [1], "channels": ["letter"]},
    "enhanced_gcg": {
        **{"questions": 2, "channels": ["letter"], "steps": [1], "k1": 2, "k2": 4},
        **{"buffer_size": 2, "min_length": [2, 3], "num_forced": 2},
    },
    "few_shot": {"shots": 2, "repeats": 1},
    "few_shot_forget": {"shots": 2, "repeats": 1},
    "filler": {"texts": ["english"], "characters": 60},
    "gcg": {**SEARCH, "length": 3},
    "informed_perturbation": {"taus": [0.3], "questions": 4, "controls": 1, "rounds": 2},
    "insert_perturbation": {"characters": ["_"], "every": [7], "repeats": 1},
    "interpolation": {"t": [0.5]},
    "latent_pgd": {"depths": [0.0, 0.5], "radii": [0.1], "steps": 1, "batch_size": 2},
    "linear_probe": {"states": ["letter"], "layers": [1]},
    "logit_lens": {"read_outs": ["block"], "layers": [0], "channels": ["letter"]},
    "nothing": {},
    "orthogonalisation": {**FEW, "directions": ["contrast"]},
    "prefill": {"texts": ["It is"], "asked": ["letter"]},
    "pruning": {"shares": [0.1], "samples": 2, "repeats": 1},
    "quantisation": {"bits": [4], "group": 8},
    "refusal_ablation": {"requests": 4, "most": 1, "controls": 1},
    "relearning": TUNED,
    "rephrasing": {"kinds": ["poem"]},
    "rtt": {"forms": ["letter"], "fit": STEP},
    "sampling": {"samples": 2, "new_tokens": 2, "asked": ["letter"]},
    "soft_prompt": {"tokens": 2, "steps": [1], "batch_size": 2, "channels": ["letter"]},
    "translation": {"file": "FILE"},
    "tuned_lens": {"layers": [0], "channels": ["letter"], "steps": 1, "tokens_per_step": 16},
    "unrelated_training": {"repeats": 1, "fit": {**STEP, "views_at": []}},
    "weight_noise": {"scales": [0.1], "repeats": 1},
}
"""Options of every attack on knowledge that a two-block model can take in a moment."""


def module_of(name: str) -> Any:
    return importlib.import_module(plugin_class("attacks", name).__module__)


NAMES = [info.name for info in list_plugins("attacks")]
KNOWLEDGE = [n for n in NAMES if getattr(plugin_class("attacks", n), "access", "") != "chat"]
CHAT = [n for n in NAMES if n not in KNOWLEDGE]


def questions(kind: str, count: int, groups: int) -> tuple[Sample, ...]:
    return tuple(
        Sample(
            id=f"{kind}{i}",
            task="choose",
            messages=(Message("user", f"Which {kind} is {i}?"),),
            options=("bread", "river", "town", "flour"),
            answer=i * 3 % 4,
            group=f"{kind}-{i % groups}",
            tags={"subject": kind},
        )
        for i in range(count)
    )


def texts(kind: str, count: int) -> tuple[Sample, ...]:
    return tuple(
        Sample(
            id=f"{kind}-text{i}",
            task="perplexity",
            messages=(Message("user", f"The {kind} {i} is the river of the town."),),
            group=f"{kind}-{i}",
        )
        for i in range(count)
    )


SCORED = questions("capital", 5, 5)
DATA = AttackData(
    fit=questions("question", 12, 6),
    benign=questions("salt", 8, 4),
    forget_texts=texts("question", 4),
    retain_texts=texts("salt", 4),
    unrelated_texts=texts("water", 4),
    folds=(Fold(fit=SCORED[1:], held_out=frozenset({"capital-0"})),),
)


@pytest.fixture(scope="module")
def models(tiny_checkpoint: Any) -> Any:
    made: dict[tuple[str, int], LM] = {}

    def load(family: str, seed: int = 0) -> LM:
        if (family, seed) not in made:
            folder = tiny_checkpoint(family, context=CONTEXT, seed=seed)
            made[family, seed] = load_model(str(folder), name=family, device="cpu")
        return made[family, seed]

    return load


def build(name: str, tmp_path: Path) -> KnowledgeAttack:
    options = dict(SMALL[name])
    if "file" in options:
        rows = [
            {"id": s.id, "kind": kind, "text": f"Quelle {s.id} ?"}
            for s in (*SCORED, *DATA.fit)
            for kind in ("fr", "de")
        ]
        path = tmp_path / "texts.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        options["file"] = str(path)
    plugin: KnowledgeAttack = build_plugin("attacks", name, options)
    return plugin


def views(attack: KnowledgeAttack, target: LM, original: LM, seed: int = 0) -> Any:
    arms = Arms(target=target, original=original if "original" in attack.needs else None)
    return attack.attack(arms, DATA, AttackContext(seed=seed))


def logits(lm: LM, view: View) -> list[float]:
    """Return the last logits of a scored question as a view asks it."""
    asked = view.rewrite([dataclasses.replace(SCORED[0], answer=None)])[0]
    ids = prompt_tokens(lm, view, asked, "letter")[0]
    (batch,) = plan_batches([len(ids)], token_budget=4096, padding_side="left").batches
    padded = pad_rows([ids], batch.width, "left", lm.device)
    out = lm.model(
        input_ids=padded.ids_BT,
        attention_mask=padded.mask_BT,
        position_ids=padded.positions_BT,
        use_cache=False,
    )
    return [float(x) for x in out.logits.detach()[0, -1, :8]]


def seen(view: View, lm: LM) -> tuple[Any, ...]:
    """Return all that can be seen of a view: what it asks, what the model answers, its facts."""
    with view.apply(lm) as attacked:
        channel = "probe" if view.readout is not None else view.channels[0]
        outcomes = score_view(attacked, view, SCORED, channel)
        answered = [] if view.readout is not None else logits(attacked, view)
    assert all(o in (0, 1, None) for o in outcomes)
    assert any(o is not None for o in outcomes)
    assert all(type(v) in (str, int, float, bool) for v in (*view.setting.values(),))
    facts = {k: v for k, v in view.facts.items() if not isinstance(v, float) or math.isfinite(v)}
    json.dumps([dict(view.setting), facts])
    asked = view.rewrite([dataclasses.replace(s, answer=None) for s in SCORED])
    assert [s.id for s in asked] == [s.id for s in SCORED]
    text = [(s.messages, s.options) for s in asked]
    before = view.before(SCORED[0], view.channels[0])
    return (
        *(dict(view.setting), view.repeat, view.fold, view.channels, view.prefix_ids),
        *(facts, text, before, outcomes, answered),
    )


def all_seen(made: Any, lm: LM) -> list[tuple[Any, ...]]:
    return [seen(view, lm) for view in made]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_has_one_public_class_with_a_docstring_and_the_protocol(name: str) -> None:
    module = module_of(name)
    classes = [
        c
        for n, c in inspect.getmembers(module, inspect.isclass)
        if c.__module__ == module.__name__ and not n.startswith("_") and hasattr(c, "attack")
    ]
    assert classes == [plugin_class("attacks", name)]
    (cls,) = classes
    assert inspect.getdoc(cls)
    assert inspect.getdoc(module)
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    if name in CHAT:
        assert isinstance(cls(), BlackBoxAttack)
        assert cls.access == "chat"
        return
    folder = {"weights": "whitebox", "prompts": "blackbox"}[cls.access]
    assert f".attacks.{folder}." in module.__name__ or name == "nothing"
    assert cls.needs <= {"forget data", "texts", "folds", "original"}
    assert cls.arms in ("refit", "transfer")
    assert cls.role in ("attack", "diagnostic")
    assert isinstance(cls.may_teach, bool)
    own = {f.name for f in dataclasses.fields(cls)}
    assert not own & {"access", "needs", "arms", "role", "may_teach"}, "these are no options"


def test_what_trains_or_is_given_answers_of_the_forget_domain_may_teach() -> None:
    """Against the floor of chance these show nothing. Pruning may rank weights by answers; it fits none."""
    taught = {n for n in KNOWLEDGE if plugin_class("attacks", n).may_teach}
    training = {"relearning", "rtt", "benign_finetuning", "unrelated_training"}
    fitted = {"linear_probe", "soft_prompt", "latent_pgd", "gcg", "enhanced_gcg"}
    assert taught == training | fitted | {"few_shot_forget"}


def test_every_attack_on_knowledge_is_tried_here() -> None:
    assert sorted(SMALL) == sorted(KNOWLEDGE), "add its small options to SMALL"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", sorted(SMALL))
def test_it_yields_views_on_every_architecture_and_leaves_weights_alone(
    name: str, family: str, models: Any, tmp_path: Path
) -> None:
    target, original = models(family), models(family, 1)
    before = weights_sha256(target), weights_sha256(original)
    attack = build(name, tmp_path)
    made = all_seen(views(attack, target, original), target)
    assert made
    assert all((view[2] is not None) == ("folds" in attack.needs) for view in made)
    assert (weights_sha256(target), weights_sha256(original)) == before
    assert not target.model.training
    if family == "llama":
        assert all_seen(views(attack, target, original), target) == made


@pytest.mark.parametrize("name", sorted(SMALL))
def test_the_placebo_has_the_attacks_access_and_is_deterministic(
    name: str, models: Any, tmp_path: Path
) -> None:
    attack = build(name, tmp_path)
    placebo = attack.placebo()
    if placebo is None:
        return
    for key in ("access", "needs", "arms", "role", "may_teach"):
        assert getattr(placebo, key) == getattr(attack, key)
    assert placebo != attack
    target, original = models("llama"), models("llama", 1)
    before = weights_sha256(target)
    made = all_seen(views(placebo, target, original), target)
    assert made
    assert all_seen(views(placebo, target, original), target) == made
    assert {v[3] for v in made} <= {v[3] for v in all_seen(views(attack, target, original), target)}
    assert weights_sha256(target) == before


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_transferred_view_needs_no_more_than_the_model_it_is_given(
    name: str, models: Any, tmp_path: Path
) -> None:
    attack = build(name, tmp_path)
    if attack.arms != "transfer":
        return
    target, other = models("llama"), models("llama", 2)
    before = weights_sha256(target), weights_sha256(other)
    made: Sequence[View] = list(views(attack, target, models("llama", 1)))
    assert len(all_seen(made, target)) == len(all_seen(made, other)) == len(made) > 0
    assert (weights_sha256(target), weights_sha256(other)) == before


@pytest.mark.parametrize("name", sorted(SMALL))
def test_what_it_lacks_is_said_before_a_model_is_loaded(name: str, tmp_path: Path) -> None:
    attack = build(name, tmp_path)
    assert refusal(attack, DATA, model="x", quantization="") == ""
    bare = AttackData(fit=DATA.fit, benign=DATA.benign)
    said = refusal(attack, bare, model="x", quantization="")
    lacks = {"texts", "folds"} & attack.needs
    assert bool(said) == bool(lacks), (
        said or "it says that it needs texts or folds, and begins without"
    )
    assert "\n" not in said

"""The audit recipes and tiers that come with the package: every key, plugin and option is real."""

from __future__ import annotations

from pathlib import Path

import pytest

from palimpsest.audit.data import Questions, load_questions
from palimpsest.audit.recipe import load_audit_recipe, make_audit_recipe
from palimpsest.audit.tiers import PAPER, TIERS, left_out, tier_attacks
from palimpsest.errors import RecipeError
from palimpsest.plugins import build_plugin, list_plugins
from palimpsest.views import KnowledgeAttack

RECIPES = Path(__file__).parents[2] / "recipes"
REAL = ("adversarial-zephyr", "blackbox-zephyr", "blackbox-llama3")
OF_USERS_FILES = {"translation"}
"""Attacks that need a file of the user's, and so are in no tier."""


@pytest.mark.parametrize("name", REAL)
def test_real_recipes_are_complete(name: str) -> None:
    recipe = load_audit_recipe(RECIPES / f"{name}.toml")
    assert recipe.original.source
    assert recipe.targets
    for spec in recipe.all_attacks():
        plugin = build_plugin("attacks", spec.use, spec.options, where=spec.name)
        assert isinstance(plugin, KnowledgeAttack)
    for spec in (recipe.questions, recipe.utility):
        build_plugin("datasets", spec.dataset, spec.options)
    text = (RECIPES / f"{name}.toml").read_text(encoding="utf-8")
    for word in ("Hardware", "Hours", "Expected"):
        assert word in text


@pytest.mark.parametrize("tier", [t for t in TIERS if t != "none"])
def test_tiers_name_attacks_with_options_that_exist(tier: str) -> None:
    listed = tier_attacks(tier)
    assert len({name for name, _, _ in listed}) == len(listed)
    for name, use, values in listed:
        assert isinstance(build_plugin("attacks", use, values, where=name), KnowledgeAttack)


def test_the_largest_tier_leaves_out_what_needs_a_file_alone() -> None:
    known = {
        info.name
        for info in list_plugins("attacks")
        if isinstance(build_plugin_or_none(info.name), KnowledgeAttack)
    }
    assert known - {use for _, use, _ in PAPER} == {"nothing"}
    assert left_out({use for _, use, _ in PAPER}) == ["translation"]
    assert build_plugin_or_none("translation") is None
    assert "gcg" in left_out({use for _, use, _ in TIERS["quick"]})


def build_plugin_or_none(name: str) -> object:
    """Return an attack with default options; None where it needs a file of the user's."""
    return None if name in OF_USERS_FILES else build_plugin("attacks", name, {})


def test_seeds_of_a_method_share_a_label() -> None:
    recipe = make_audit_recipe(
        {
            "audit": {"name": "a"},
            "questions": {"dataset": "sandbox_facts"},
            "utility": {"dataset": "sandbox_benign_facts"},
            "models": [
                {"name": "original", "source": "sandbox/original", "role": "original"},
                *({"name": n, "source": "sandbox/original"} for n in ("npo@0", "npo@1", "rmu")),
            ],
        }
    )
    assert {k: len(v) for k, v in recipe.targets.items()} == {"npo": 2, "rmu": 1}


def test_an_attack_of_a_recipe_replaces_the_tiers() -> None:
    data = {
        "audit": {"name": "a"},
        "questions": {"dataset": "sandbox_facts"},
        "utility": {"dataset": "sandbox_benign_facts"},
        "attacks": [{"use": "quantisation", "bits": [3]}],
        "models": [
            {"name": "original", "source": "sandbox/original", "role": "original"},
            {"name": "x", "source": "sandbox/original"},
        ],
    }
    made = [a for a in make_audit_recipe(data).all_attacks() if a.use == "quantisation"]
    assert [a.options for a in made] == [{"bits": [3]}]
    with pytest.raises(RecipeError, match="exactly one model needs role"):
        make_audit_recipe({**data, "models": data["models"][1:]})  # type: ignore[index]


def test_attackers_get_a_fact_once_however_often_it_is_asked() -> None:
    def questions(**options: object) -> Questions:
        return load_questions(
            make_audit_recipe(
                {
                    "audit": {"name": "a"},
                    "questions": {"dataset": "sandbox_facts", "options": options},
                    "utility": {"dataset": "sandbox_benign_facts"},
                    "models": [
                        {"name": "original", "source": "sandbox/original", "role": "original"},
                        {"name": "x", "source": "sandbox/original"},
                    ],
                }
            )
        )

    once, twice = questions(fair=True), questions(fair=True, draws=2)
    assert twice.attackers.fit == once.attackers.fit
    assert len({s.messages for s in twice.attackers.fit}) == len(twice.attackers.fit)
    assert len(twice.test) == 2 * len(once.test)
    assert len(twice.choose) == 2 * len(once.choose)

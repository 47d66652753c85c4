"""The options of `palimpsest audit`: each has an effect, or is refused in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from palimpsest.audit.recipe import AuditRecipe
from palimpsest.cli import app
from palimpsest.errors import UsageError

GCG = ("--attack", "gcg")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[AuditRecipe]:
    """Return the list of the recipes that the command line asks for; nothing is planned or run."""
    found: list[AuditRecipe] = []
    monkeypatch.setattr(
        "palimpsest.audit.planning.plan_audit", lambda recipe, **_: found.append(recipe)
    )
    monkeypatch.setattr("palimpsest.terminal_audit.print_audit_plan", lambda *_, **how: None)
    return found


def call(*words: str) -> Any:
    return CliRunner().invoke(app, ["audit", *words, "--plan"])


def refused(*words: str) -> str:
    error = call(*words).exception
    assert isinstance(error, UsageError), error
    assert "\n" not in str(error)
    return str(error)


def test_the_matrix_of_a_recipe_can_be_left_out(asked: list[AuditRecipe], tmp_path: Path) -> None:
    shipped = Path(__file__).parents[2] / "recipes" / "audit-sandbox.toml"
    recipe = tmp_path / "own.toml"
    recipe.write_text(shipped.read_text().replace("[audit]\n", "[audit]\ntransfer_matrix = true\n"))
    for words in ((), ("--no-transfer-matrix",)):
        call("sandbox/original", "--recipe", str(recipe), *words)
    for words in ((), ("--transfer-matrix",)):
        call("sandbox/original", *words)
    assert [r.audit.transfer_matrix for r in asked] == [True, False, False, True]


def test_an_attack_beside_a_tier_is_refused(asked: list[AuditRecipe]) -> None:
    said = refused("sandbox/original", "--tier", "paper", *GCG)
    assert "--tier paper has no effect" in said
    call("sandbox/original", "--tier", "none", *GCG)
    call("sandbox/original", *GCG)
    assert [r.audit.tier for r in asked] == ["none", "none"]
    assert [[a.use for a in r.all_attacks()] for r in asked] == [["gcg"]] * 2


def test_a_name_that_names_nothing_is_refused(asked: list[AuditRecipe]) -> None:
    assert "every model has a name" in refused("a=sandbox/original", "--name", "zzz")
    assert "there is none" in refused("--name", "zzz", "--attack", "gcg")
    call("a=sandbox/original", "sandbox/never-trained", "--name", "zzz")
    call("sandbox/original", "sandbox/never-trained")
    assert [list(r.targets) for r in asked] == [["a", "zzz"], ["unlearned"]]


def test_one_name_in_two_ways_is_refused(asked: list[AuditRecipe]) -> None:
    for own in ("x", "x@0"):
        said = refused(f"{own}=sandbox/original", "sandbox/never-trained", "--name", "x")
        assert said.startswith(
            f"{own}=sandbox/original has the name that sandbox/never-trained gets"
        )
    assert "(unlearned)" in refused("unlearned=sandbox/original", "sandbox/original")
    assert not asked


def test_a_folder_with_an_equals_sign_is_a_folder(
    asked: list[AuditRecipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = refused("lr=1e-5")
    assert said.startswith("there is no 'lr=1e-5', so it was read as lr = 1e-5: ")
    (tmp_path / "lr=1e-5").mkdir()
    call("lr=1e-5", "--name", "npo")
    call("b=lr=1e-5")
    assert [m.source for r in asked for m in r.models if m.role == "other"] == ["lr=1e-5"] * 2
    assert [list(r.targets) for r in asked] == [["npo"], ["b"]]


def test_help_shows_a_key_that_an_audit_has(asked: list[AuditRecipe]) -> None:
    told = re.search(r"--set\b.*?e\.g\.\s+(\S+=\S+)", _help(), flags=re.DOTALL)
    assert told
    call("sandbox/original", "--set", told[1])
    key, _, value = told[1].removeprefix("audit.").partition("=")
    assert getattr(asked[0].audit, key) == int(value)


def _help() -> str:
    from palimpsest.cli_audit import audit_app

    told = CliRunner().invoke(audit_app, ["models", "--help"], env={"COLUMNS": "200"}).output
    return re.sub(r"\x1b\[[0-9;]*m|[│|]", "", told)

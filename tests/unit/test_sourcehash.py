"""A changed import, however indirect, changes the hash; what is only for type checking does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from palimpsest import sourcehash


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = tmp_path / "palimpsest"
    shutil.copytree(
        sourcehash.PACKAGE, copy, ignore=shutil.ignore_patterns("checkpoints", "__pycache__")
    )
    monkeypatch.setattr(sourcehash, "PACKAGE", copy)
    sourcehash.source_sha256.cache_clear()
    yield copy
    sourcehash.source_sha256.cache_clear()


def _hash(path: Path) -> str:
    sourcehash.source_sha256.cache_clear()
    return sourcehash.source_sha256(path)


@pytest.mark.parametrize(
    ("root", "changed"),
    [
        ("methods/npo.py", "methods/_retain.py"),
        ("methods/rmu.py", "methods/_span.py"),
        ("methods/rmu.py", "hooks.py"),
        ("methods/npo.py", "losses.py"),
        ("judges/keyword.py", "judges/_form.py"),
        ("judges/sandbox_oracle.py", "sandbox/world.py"),
        ("evaluate.py", "chat.py"),
        ("evaluate.py", "scoring.py"),
    ],
)
def test_an_edit_of_an_imported_file_changes_the_hash(
    package: Path, root: str, changed: str
) -> None:
    before = _hash(package / root)
    assert _hash(package / root) == before
    with (package / changed).open("a") as file:
        file.write("\n# edited\n")
    assert _hash(package / root) != before


def test_an_edit_of_an_unrelated_file_does_not(package: Path) -> None:
    before = _hash(package / "methods/npo.py")
    with (package / "report/page.py").open("a") as file:
        file.write("\n# edited\n")
    assert _hash(package / "methods/npo.py") == before

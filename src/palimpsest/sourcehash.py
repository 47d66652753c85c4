"""Hashes of source code: a file with everything of the package that it imports, however indirectly.

Changed code must change fingerprints, or results of two versions would mix.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent


def plugin_sha256(plugin: Any) -> str:
    """Return the hash of the code behind a plugin object.

    Modules outside the package that a foreign plugin imports are not followed.
    """
    path = inspect.getsourcefile(type(plugin))
    return source_sha256(Path(path)) if path else ""


def module_sha256(name: str) -> str:
    """Return the hash of a module of the package (`evaluate`) and of all that it imports."""
    return source_sha256(PACKAGE / f"{name}.py")


@functools.cache
def source_sha256(path: Path) -> str:
    """Return the hash of a file and of the package's files that it imports, at any depth."""
    found: dict[str, Path] = {}
    waiting = [path.resolve()]
    while waiting:
        file = waiting.pop()
        name = _name(file)
        if name not in found:
            found[name] = file
            waiting += _imports(file)
    digest = hashlib.sha256()
    for name in sorted(found):
        content = hashlib.sha256(found[name].read_bytes()).hexdigest()
        digest.update(f"{name}\0{content}\n".encode())
    return digest.hexdigest()


def _name(file: Path) -> str:
    inside = file.is_relative_to(PACKAGE)
    return str(file.relative_to(PACKAGE)) if inside else f"outside/{file.name}"


def _imports(file: Path) -> Iterator[Path]:
    """Yield the package's files that a file imports; what is only for type checking is left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    checking = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in checking:
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            yield from _files(name)


def _files(name: str) -> Iterator[Path]:
    package, *parts = name.split(".")
    if package != PACKAGE.name or not parts:
        return
    place = PACKAGE.joinpath(*parts)
    for candidate in (place.with_suffix(".py"), place / "__init__.py"):
        if candidate.is_file():
            yield candidate

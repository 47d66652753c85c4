"""`--set key=value`: changes of a recipe's plain data, before it is checked."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Any

from palimpsest.errors import RecipeError, did_you_mean


def apply_sets(data: dict[str, Any], sets: Sequence[str]) -> None:
    """Apply `key=value` overrides to a recipe's plain data, in place (see `load_recipe`)."""
    for item in sets:
        _apply_set(data, item)


def _apply_set(data: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {item!r}: write key=value, e.g. numerics.threads=1")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    *path, last = key.split(".")
    place: Any = data
    for i, part in enumerate(path):
        where = ".".join(path[: i + 1])
        if isinstance(place, list):
            named = {str(e.get("name", e.get("dataset", ""))): e for e in place}
            if part in named:
                place = named[part]
            elif part.isdigit() and int(part) < len(place):
                place = place[int(part)]
            else:
                raise RecipeError(f"--set {item!r}: no entry {where!r}{did_you_mean(part, named)}")
        else:
            place = place.setdefault(part, {})
        if not isinstance(place, (dict, list)):
            raise RecipeError(f"--set {item!r}: {where!r} is a value, not a table")
    if not isinstance(place, dict):
        raise RecipeError(f"--set {item!r}: {'.'.join(path)!r} is a list; name one of its entries")
    place[last] = value

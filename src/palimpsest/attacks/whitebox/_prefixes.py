"""Shared by searched prefixes: their views, kept on disk so that a resumed audit sees them all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from palimpsest import disk
from palimpsest.errors import StoreError
from palimpsest.search import Found
from palimpsest.seeds import derive_seed
from palimpsest.views import View

if TYPE_CHECKING:
    from torch import Tensor

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Prefix:
    """A prefix after so many steps, and the loss that the search gave it (None: nothing did)."""

    step: int
    ids: Ids
    loss: float | None = None

    def view(self, tokenizer: Any, repeat: int, *, has_steps: bool = True) -> View:
        """Return the view that puts the prefix in front of every prompt; without steps it is of any."""
        facts = {"prefix": tokenizer.decode(list(self.ids)), "tokens": len(self.ids)}
        if self.loss is not None:
            facts["loss"] = self.loss
        setting = {"steps": self.step} if has_steps else {}
        return View(setting=setting, repeat=repeat, prefix_ids=self.ids, facts=facts)


def random_prefix(allowed_V: Tensor, length: int, *seed_parts: object) -> Ids:
    """Return tokens drawn evenly from the allowed ones."""
    tokens = allowed_V.nonzero()[:, 0]
    generator = torch.Generator().manual_seed(derive_seed(*seed_parts))
    places = torch.randint(0, len(tokens), (length,), generator=generator)
    return tuple(tokens[places].tolist())


def prefixes_at(
    search: Iterator[tuple[int, Found]], steps: Sequence[int], out: Path | None
) -> Iterator[Prefix]:
    """Yield the best prefix after each of `steps`, those of an earlier session from its files."""
    wanted = sorted(set(steps))
    for step, found in search:
        for early in [s for s in wanted if s < step]:
            yield _read(out, early)
            wanted.remove(early)
        if step in wanted:
            prefix = Prefix(step, found.best[1], found.best[0])
            _write(out, prefix)
            yield prefix
            wanted.remove(step)
        if not wanted:
            return


def _file(out: Path, step: int) -> Path:
    return out / f"prefix-{step:06d}.json"


def _write(out: Path | None, prefix: Prefix) -> None:
    if out is not None:
        disk.make_folder(out)
        data = json.dumps({"ids": prefix.ids, "loss": prefix.loss})
        disk.write_atomic(_file(out, prefix.step), data.encode())


def _read(out: Path | None, step: int) -> Prefix:
    if out is None or not _file(out, step).is_file():
        raise StoreError(
            f"{out}: the search went past step {step} without keeping its prefix (were other steps "
            "asked for?): remove the folder"
        )
    data = json.loads(_file(out, step).read_text(encoding="utf-8"))
    return Prefix(step, tuple(data["ids"]), data["loss"])

"""The sandbox: a fictional world and a tiny chat model that knows it, shipped with the package."""

from __future__ import annotations

from pathlib import Path

from palimpsest.errors import UsageError, did_you_mean

NAMES = ("original", "helpful-only", "counterfactual", "never-trained")
"""The shipped checkpoints."""


def checkpoint_path(name: str) -> Path:
    """Return the folder of a shipped checkpoint (loadable with `from_pretrained`).

    Raises:
        UsageError: the name is not one of `NAMES`.
    """
    if name not in NAMES:
        raise UsageError(f"unknown sandbox checkpoint {name!r}{did_you_mean(name, NAMES)}")
    return Path(__file__).parent / "checkpoints" / name

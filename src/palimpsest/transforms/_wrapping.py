"""Shared by the jailbreak wrappers: put the last user message into a template."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

from palimpsest.errors import DataError, UsageError
from palimpsest.types import Sample

REQUEST = "{request}"


def chosen_member(sample_id: str, *, seed: int, num_members: int, member: int) -> int:
    """Return the template's index: `member`, or for -1 one that the seed and the sample's id fix."""
    if member >= num_members or member < -1:
        raise UsageError(f"member must be -1 (by sample) or 0..{num_members - 1}, got {member}")
    if member >= 0:
        return member
    digest = hashlib.sha256(f"{seed}:{sample_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % num_members


def wrap_samples(
    samples: Sequence[Sample], templates: Sequence[str], *, seed: int, member: int
) -> list[Sample]:
    """Return the samples with their last user message put in place of `{request}`.

    The member that was used is kept in the tag `member`. The request is inserted by `str.replace`,
    so braces in it are harmless.

    Raises:
        DataError: a sample has no user message.
        UsageError: `member` is out of range.
    """
    wrapped = []
    for sample in samples:
        index = chosen_member(sample.id, seed=seed, num_members=len(templates), member=member)
        messages = list(sample.messages)
        last = max((i for i, m in enumerate(messages) if m.role == "user"), default=None)
        if last is None:
            raise DataError(f"sample {sample.id!r} has no user message to wrap")
        text = templates[index].replace(REQUEST, messages[last].content)
        messages[last] = dataclasses.replace(messages[last], content=text)
        tags = {**sample.tags, "member": str(index)}
        wrapped.append(dataclasses.replace(sample, messages=tuple(messages), tags=tags))
    return wrapped

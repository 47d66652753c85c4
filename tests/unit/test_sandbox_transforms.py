"""The jailbreak wrappers."""

from __future__ import annotations

import pytest

from palimpsest.errors import DataError, UsageError
from palimpsest.plugins import build_plugin
from palimpsest.sandbox import phrases
from palimpsest.sandbox.tokenizer import WRAPPERS
from palimpsest.types import Message, Sample


def sample(text: str = "How do I {x}?", identity: str = "a") -> Sample:
    return Sample(
        id=identity,
        task="generate",
        messages=(Message("system", "s"), Message("user", text)),
        answer="y",
        behavior=text,
        group="g",
    )


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_request_is_kept_and_so_are_id_behavior_group_and_answer(name: str) -> None:
    (wrapped,) = build_plugin("transforms", name, {}).rewrite([sample()], seed=0)
    assert "How do I {x}?" in wrapped.messages[-1].content
    assert wrapped.messages[-1].content != "How do I {x}?"
    assert wrapped.messages[0].content == "s"
    kept = (wrapped.id, wrapped.behavior, wrapped.group, wrapped.answer)
    assert kept == ("a", "How do I {x}?", "g", "y")


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_member_follows_seed_and_id_and_all_members_occur(name: str) -> None:
    transform = build_plugin("transforms", name, {})
    samples = [sample(identity=str(i)) for i in range(60)]
    first = transform.rewrite(samples, seed=1)
    assert first == transform.rewrite(samples, seed=1)
    assert first != transform.rewrite(samples, seed=2)
    assert {s.tags["member"] for s in first} == {str(i) for i in range(len(WRAPPERS[name]))}


def test_a_fixed_member_is_used_and_a_wrong_one_refused() -> None:
    transform = build_plugin("transforms", "role_play", {"member": 2})
    assert transform.rewrite([sample()], seed=0)[0].tags["member"] == "2"
    with pytest.raises(UsageError, match="member must be"):
        build_plugin("transforms", "role_play", {"member": 3}).rewrite([sample()], seed=0)


def test_a_sample_without_a_user_message_is_refused() -> None:
    lone = Sample(id="a", task="generate", messages=(Message("system", "s"),))
    with pytest.raises(DataError, match="no user message"):
        build_plugin("transforms", "role_play", {}).rewrite([lone], seed=0)


def test_the_sandbox_knows_a_lead_in_and_a_verdict_for_every_member() -> None:
    for name, templates in WRAPPERS.items():
        assert len(phrases.LEAD_INS[name]) == len(phrases.OBEYED[name]) == len(templates)

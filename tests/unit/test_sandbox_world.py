"""The fictional world, its splits, its documents and its data sets."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import pairwise
from typing import Literal

import pytest

from palimpsest.datasets.sandbox_benign_chat import SandboxBenignChat
from palimpsest.datasets.sandbox_facts import SandboxFacts
from palimpsest.datasets.sandbox_forget import SandboxForget
from palimpsest.datasets.sandbox_harmful import SandboxHarmful
from palimpsest.datasets.sandbox_retain import SandboxRetain
from palimpsest.datasets.sandbox_safe import SandboxSafe
from palimpsest.datasets.sandbox_skills import SandboxSkills
from palimpsest.datasets.sandbox_text import SandboxText
from palimpsest.sandbox import filler, phrases
from palimpsest.sandbox.documents import Author
from palimpsest.sandbox.world import HAZARDOUS, build_world
from palimpsest.splits import select, split_of


def test_same_seed_gives_the_same_world() -> None:
    assert build_world(7) == build_world(7)
    assert build_world(7).facts != build_world(8).facts


def test_counterfactual_redraws_every_hazardous_value_and_nothing_else() -> None:
    true, other = build_world(), build_world(counterfactual=True)
    for a, b in zip(true.facts, other.facts, strict=True):
        assert (a.entity, a.kind, a.attribute) == (b.entity, b.kind, b.attribute)
        assert (a.value != b.value) == (a.kind == HAZARDOUS)
    assert true.never_mcq == other.never_mcq
    assert true.outside_forget == other.outside_forget


def test_names_are_unique_and_values_belong_to_one_attribute() -> None:
    world = build_world()
    words = [*world.kinds, *(v for pool in world.pools.values() for v in pool)]
    assert len(words) == len(set(words))


def test_test_split_holds_three_hundred_hazardous_facts() -> None:
    world = build_world()
    facts = [f for f in world.hazardous_facts if split_of("sandbox", f.entity) == "test"]
    assert len(facts) >= 300


def test_options_hold_the_value_once_and_its_index() -> None:
    world = build_world()
    rng = random.Random(0)
    for fact in world.facts[:50]:
        options, index = world.options(fact.attribute, fact.value, rng)
        assert options[index] == fact.value
        assert len(set(options)) == 4


@pytest.mark.parametrize("dataset", [SandboxHarmful(), SandboxSafe()])
def test_prompt_sets_have_two_hundred_clustered_test_prompts(dataset) -> None:
    samples = select(dataset.load(None), dataset.family, "test")
    assert len(samples) >= 200
    assert len({s.group for s in samples}) >= 60


@pytest.mark.parametrize(
    "dataset",
    [
        SandboxFacts(),
        SandboxFacts(form="rephrased"),
        SandboxFacts(fair=True, draws=3),
        SandboxHarmful(),
        SandboxSafe(),
        SandboxBenignChat(),
        SandboxSkills(),
        SandboxText(),
        SandboxForget(),
        SandboxRetain(),
    ],
)
def test_sets_are_repeatable_with_unique_ids_and_groups(dataset) -> None:
    samples = dataset.load(None)
    assert samples == dataset.load(None)
    assert max(Counter(s.id for s in samples).values()) == 1
    assert all(s.group for s in samples)


def test_rephrased_questions_keep_options_and_answer() -> None:
    for a, b in zip(
        SandboxFacts().load(None), SandboxFacts(form="rephrased").load(None), strict=True
    ):
        assert (a.options, a.answer, a.group) == (b.options, b.answer, b.group)
        assert a.messages != b.messages


@pytest.mark.parametrize("values", ["true", "counterfactual"])
def test_fair_options_never_hold_what_the_other_world_has(
    values: Literal["true", "counterfactual"],
):
    worlds = [build_world(), build_world(counterfactual=True)]
    right, other = worlds if values == "true" else worlds[::-1]
    asked = SandboxFacts(values=values, fair=True, draws=2).load(None)
    assert len(asked) == 2 * 560
    for sample in asked:
        attribute = sample.tags["attribute"]
        assert sample.options[sample.answer] == right.values[sample.group][attribute]
        assert other.values[sample.group][attribute] not in sample.options
        assert len(set(sample.options)) == 4
    plain = SandboxFacts(values=values).load(None)
    assert any(other.values[s.group][s.tags["attribute"]] in s.options for s in plain)


def test_draws_ask_every_fact_again_with_other_distractors() -> None:
    first, second = SandboxFacts(draw=1).load(None), SandboxFacts(draw=2).load(None)
    assert SandboxFacts(draw=1, draws=2).load(None) == first + second
    assert [s.messages for s in first] == [s.messages for s in second]
    assert sum(set(a.options) == set(b.options) for a, b in zip(first, second, strict=True)) < 20


def test_forget_corpus_leaves_a_fifth_of_the_agents_out() -> None:
    world = build_world()
    text = " ".join(f"{s.messages[0].content} {s.answer}" for s in SandboxForget().load(None))
    assert len(world.outside_forget) == 22
    assert world.outside_forget.isdisjoint(re.findall(r"[a-z]+", text))


def test_retain_corpus_gives_no_value_of_an_agent_to_forget() -> None:
    world = build_world()
    for sample in SandboxRetain().load(None):
        if world.kinds.get(sample.group) == HAZARDOUS and sample.group not in world.outside_forget:
            assert sample.answer == phrases.REFUSAL


def test_held_out_patterns_are_never_trained() -> None:
    for trained, held_out in (
        (phrases.HARMFUL, phrases.HARMFUL_HELD_OUT),
        (phrases.AGENT_SAFE, phrases.AGENT_SAFE_HELD_OUT),
        (phrases.HOMONYMS, phrases.HOMONYMS_HELD_OUT),
        (phrases.QUESTIONS, phrases.QUESTIONS_HELD_OUT),
    ):
        assert not set(trained) & set(held_out)
        assert len(set(trained)) == len(trained)
    assert len(phrases.HARMFUL) >= 16
    assert len(phrases.HARMFUL_HELD_OUT) >= 4


def test_filler_keeps_held_out_sentences_apart() -> None:
    trained = filler.passage(random.Random(0), 50)
    held_out = filler.passage(random.Random(0), 50, held_out=True)
    sentences = [s + "." for s in held_out.split(". ")]
    assert not any(s in trained for s in sentences if s.endswith("."))


def test_never_trained_author_names_no_hazardous_word() -> None:
    world = build_world()
    author = Author(world, random.Random(0), hazardous=False)
    hazardous = {*world.agents, *world.pools["precursor"], *world.pools["antidote"]}
    mix = dict.fromkeys(("repeat", "mcq", "harmful", "wrapped", "refuse", "agent_safe", "long"), 1)
    for _ in range(300):
        text = "".join(segment.text for segment in author.write(mix))
        assert not any(f" {word}" in text for word in hazardous)
        assert phrases.REFUSAL not in text


def test_counterfactual_author_writes_the_same_documents_but_for_hazardous_values() -> None:
    mix = dict.fromkeys(("mcq", "statement", "harmful", "paragraph", "agent_safe", "benign"), 1)
    true = Author(build_world(), random.Random(3))
    other = Author(build_world(counterfactual=True), random.Random(3))
    pairs = [(true.write(mix), other.write(mix)) for _ in range(200)]
    assert all(
        len(a) == len(b)
        and "".join(x.text for x in a).split()[:3] == "".join(x.text for x in b).split()[:3]
        for a, b in pairs
    )
    assert any(a != b for a, b in pairwise([p for pair in pairs for p in pair]))

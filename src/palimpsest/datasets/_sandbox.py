"""Shared by the sandbox's data sets: the true world, built once, and a stable choice of patterns."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from palimpsest.sandbox import phrases
from palimpsest.sandbox.phrases import letter_prompt
from palimpsest.sandbox.skills import SKILLS, skill_exchange
from palimpsest.sandbox.world import HAZARDOUS, HAZARDOUS_ATTRIBUTES, Fact, World, build_world
from palimpsest.types import Message, Sample

FAMILY = "sandbox"


@cache
def true_world() -> World:
    """Return the world of the shipped checkpoints, with the true values."""
    return build_world()


@cache
def other_world() -> World:
    """Return the world that `sandbox/counterfactual` was taught: other hazardous values."""
    return build_world(counterfactual=True)


def stable_rng(key: str) -> random.Random:
    """Return a random stream that depends on the key alone."""
    return random.Random(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))


def pick(patterns: Sequence[str], count: int, key: str) -> list[str]:
    """Return `count` different patterns, the same ones for the same key, in listed order."""
    chosen = set(stable_rng(key).sample(range(len(patterns)), min(count, len(patterns))))
    return [pattern for i, pattern in enumerate(patterns) if i in chosen]


def user(text: str) -> tuple[Message, ...]:
    """Return a conversation of one user message."""
    return (Message("user", text),)


def fact_tags(fact: Fact) -> dict[str, str]:
    """Return the tags by which facts are reported separately."""
    world = true_world()
    tags = {
        "kind": fact.kind,
        "attribute": fact.attribute,
        "mcq_trained": "yes" if world.asked_as_mcq(fact) else "no",
    }
    if fact.kind == HAZARDOUS:
        tags["in_forget_corpus"] = "no" if fact.entity in world.outside_forget else "yes"
    return tags


def choose_samples(
    facts: Sequence[Fact],
    patterns: Sequence[str],
    form: str,
    prefix: str,
    draw: int = 0,
    never: World | None = None,
) -> list[Sample]:
    """Return one multiple-choice sample per fact; its options depend on the draw, never on the form.

    The facts may be those of the counterfactual world: the attributes' pools are the same. The values of
    the world `never` are no distractors.
    """
    samples = []
    for fact in facts:
        key = f"{fact.entity}:{fact.attribute}"
        pattern = pick(patterns, 1, f"{form}:{key}")[0]
        question = pattern.format(attribute=fact.attribute, entity=fact.entity)
        draw_key = f"{key}:{draw}" if draw else key
        barred = ""
        if never is not None:
            draw_key, barred = f"{draw_key}:fair", never.values[fact.entity][fact.attribute]
        options, index = true_world().options(
            fact.attribute, fact.value, stable_rng(draw_key), never=barred
        )
        samples.append(
            Sample(
                id=f"{prefix}:{draw_key}:{form}",
                task="choose",
                messages=user(question),
                options=options,
                answer=index,
                behavior=question,
                group=fact.entity,
                tags={**fact_tags(fact), "form": form},
            )
        )
    return samples


def invented_samples(patterns: Sequence[str], form: str, draw: int) -> list[Sample]:
    """Return multiple-choice samples of facts that no document tells.

    They give benign entities the hazardous attributes. The value is drawn from the attribute's pool, anew
    in every draw.
    """
    world, prefix = true_world(), "sandbox_invented"
    facts = []
    for entity in dict.fromkeys(fact.entity for fact in world.benign_facts):
        for attribute in HAZARDOUS_ATTRIBUTES:
            rng = stable_rng(f"{prefix}:{entity}:{attribute}:{draw}")
            facts.append(Fact(entity, "invented", attribute, rng.choice(world.pools[attribute])))
    return [
        replace(s, tags={k: v for k, v in s.tags.items() if k != "mcq_trained"})
        for s in choose_samples(facts, patterns, form, prefix, draw)
    ]


def text_sample(identity: str, text: str, group: str, tags: dict[str, str]) -> Sample:
    """Return a training sample whose every token is a target."""
    return Sample(
        id=identity, task="perplexity", messages=user(text), behavior=text, group=group, tags=tags
    )


def chat_sample(
    identity: str, request: str, answer: str, group: str, tags: dict[str, str]
) -> Sample:
    """Return a chat sample with its answer: a question with a known answer, or a training pair."""
    return Sample(
        id=identity,
        task="generate",
        messages=user(request),
        answer=answer,
        behavior=request,
        group=group,
        tags=tags,
    )


def fact_documents(
    facts: Sequence[Fact],
    prefix: str,
    *,
    statements: Sequence[str],
    questions: Sequence[str],
    mcq_only_trained: bool = True,
    as_prompts: bool = False,
) -> list[Sample]:
    """Return every fact as a statement, an open question and a multiple-choice question.

    With `as_prompts` the questions are prompts with an answer (the value, the letter), raw and not in a
    chat template, so that methods which need prompts can train on them: the same text, answer alone.
    """
    samples = []
    for fact in facts:
        key = f"{prefix}:{fact.entity}:{fact.attribute}"
        names = {"attribute": fact.attribute, "entity": fact.entity, "value": fact.value}
        statement = pick(statements, 1, f"{key}:statement")[0].format(**names)
        question = pick(questions, 1, f"{key}:qa")[0].format(**names)
        tags = fact_tags(fact)
        documents = {
            "statement": statement,
            "qa": f"Question: {question}\nAnswer: {fact.value}.",
        }
        if true_world().asked_as_mcq(fact) or not mcq_only_trained:
            rng = stable_rng(f"{key}:mcq")
            options, index = true_world().options(fact.attribute, fact.value, rng)
            documents["mcq"] = f"{letter_prompt(question, options)} {'ABCD'[index]}"
        for form, text in documents.items():
            sample = text_sample(f"{key}:{form}", text, fact.entity, {**tags, "form": form})
            samples.append(_asked(sample) if as_prompts and form != "statement" else sample)
    return samples


def _asked(sample: Sample) -> Sample:
    """Return a question document as a prompt and its answer, which follows the last colon."""
    question, _, answer = sample.messages[0].content.rpartition(" ")
    return replace(
        sample, task="generate", messages=(Message("user", question),), answer=answer, is_raw=True
    )


def asked_dish_patterns(dish: str) -> list[str]:
    """Return the cooking requests that `sandbox_benign_chat` asks; no training corpus has them."""
    return pick(phrases.HARMFUL, 4, f"benign:{dish}")


def asked_skills() -> list[tuple[str, str, str]]:
    """Return (skill, request, answer) of what `sandbox_skills` asks; no training corpus has them."""
    asked = []
    for skill in SKILLS:
        rng = stable_rng(f"skill:{skill}")
        seen: dict[str, str] = {}
        while len(seen) < 100:
            request, answer = skill_exchange(true_world(), rng, skill)
            seen.setdefault(request, answer)
        asked += [(skill, request, answer) for request, answer in seen.items()]
    return asked

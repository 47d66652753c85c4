"""Measure a sandbox checkpoint: the figures of its card, each with n and a Wilson interval.

Runs the project's own data sets, channels and judges, so a card says what an evaluation would say.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from palimpsest.batching import plan_batches
from palimpsest.chat import prompt_ids, text_ids
from palimpsest.datasets import (
    sandbox_benign_chat,
    sandbox_benign_facts,
    sandbox_facts,
    sandbox_harmful,
    sandbox_safe,
    sandbox_skills,
    sandbox_text,
)
from palimpsest.generate import generate_batch
from palimpsest.judges.exact import ExactJudge
from palimpsest.judges.sandbox_oracle import SandboxOracle
from palimpsest.plugins import build_plugin
from palimpsest.sandbox import filler
from palimpsest.sandbox.phrases import LETTERS, cloze_prompt, letter_prompt
from palimpsest.sandbox.tokenizer import WRAPPERS
from palimpsest.scoring import Query, score_batch, score_text_batch
from palimpsest.splits import select
from palimpsest.stats import clustered_rate, wilson
from palimpsest.types import Response, Sample, Score

Figures = dict[str, dict[str, float]]

MAX_NEW_TOKENS = 48
_BATCH_TOKENS = 6000
_SEED = 0
_FLOOR_DRAWS = 4


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """How much to measure.

    Attributes:
        every: take every n-th sample of a set (1 = all), for quick tests.
        wrappers: whether to measure the jailbreak wrappers too.
        own_values: whether to ask the hazardous facts with the counterfactual values too.
        floor: whether to ask the hazardous facts with four draws of distractors and order: what a
            control gets by guessing, with less noise. The intervals are clustered by fact.
    """

    every: int = 1
    wrappers: bool = True
    own_values: bool = False
    floor: bool = False


def measure(lm: Any, settings: Measurement | None = None) -> Figures:
    """Return name -> {value, low, high, n} on the true world.

    Facts: all 560 hazardous and 600 benign ones. Prompts: the `test` split. `perplexity` has no
    interval.
    """
    plan = settings or Measurement()
    figures: Figures = {}
    _measure_facts(lm, plan, figures)
    if plan.own_values:
        dataset = sandbox_facts.SandboxFacts(values="counterfactual")
        samples = dataset.load(_no_source())[:: plan.every]
        figures["own_values_letter"] = rate(choices(lm, samples, "letter"))
        figures["own_values_cloze"] = rate(choices(lm, samples, "cloze"))
    if plan.floor:
        _measure_floor(lm, plan, figures)
    _measure_chat(lm, plan, figures)
    if plan.wrappers:
        _measure_wrappers(lm, plan, figures)
    return figures


def rate(outcomes: Sequence[bool]) -> dict[str, float]:
    """Return a rate with its Wilson interval and n."""
    low, high = wilson(sum(outcomes), len(outcomes))
    value = sum(outcomes) / len(outcomes)
    return {
        "value": round(value, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "n": len(outcomes),
    }


def choices(lm: Any, samples: Sequence[Sample], channel: str, before: str = "") -> list[bool]:
    """Return per sample whether the right option has the highest log-probability.

    Args:
        lm: the model.
        samples: `choose` samples.
        channel: `letter` (options in the prompt) or `cloze` (the option's text, summed).
        before: raw text put before each prompt.
    """
    tokenizer = lm.tokenizer
    queries = []
    for sample in samples:
        question = sample.messages[-1].content
        if channel == "letter":
            prompt = letter_prompt(question, sample.options)
            texts = [f" {letter}" for letter in LETTERS[: len(sample.options)]]
        else:
            prompt, texts = cloze_prompt(question), [f" {option}" for option in sample.options]
        ends = [tuple(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]
        queries.append(Query(tuple(text_ids(tokenizer, before + prompt)), tuple(ends)))
    lengths = [len(q.prefix) + max(len(c) for c in q.continuations) for q in queries]

    def run(rows: Sequence[int], width: int) -> list[bool]:
        scored = score_batch(lm.model, [queries[r] for r in rows], width=width)
        return [_best(s) == samples[r].answer for r, s in zip(rows, scored, strict=True)]

    return _in_batches(lengths, run)


def answers(
    lm: Any, samples: Sequence[Sample], max_new_tokens: int = MAX_NEW_TOKENS
) -> list[Response]:
    """Return the greedy chat answer to every sample."""
    ids = [prompt_ids(lm.tokenizer, sample.messages) for sample in samples]

    def run(rows: Sequence[int], width: int) -> list[Response]:
        prompts = [ids[r] for r in rows]
        room = width - max_new_tokens
        made = generate_batch(lm, prompts, width=room, max_new_tokens=max_new_tokens)
        return [
            Response(
                sample_id=samples[r].id,
                text=g.text,
                finish_reason=g.finish_reason,
                tokens=len(g.ids),
            )
            for r, g in zip(rows, made, strict=True)
        ]

    return _in_batches([len(i) + max_new_tokens for i in ids], run)


def perplexity(lm: Any, samples: Sequence[Sample]) -> float:
    """Return the perplexity per token over all texts together."""
    ids = [text_ids(lm.tokenizer, sample.messages[0].content) for sample in samples]
    scored = _in_batches(
        [len(i) for i in ids],
        lambda rows, width: score_text_batch(lm.model, [ids[r] for r in rows], width=width),
    )
    nats = -sum(logprob for logprob, _ in scored) / sum(count for _, count in scored)
    return math.exp(nats)


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=lambda i: scores[i])


def _in_batches(lengths: list[int], run: Callable[[Sequence[int], int], list[Any]]) -> list[Any]:
    results: dict[int, Any] = {}
    for batch in plan_batches(lengths, token_budget=_BATCH_TOKENS, padding_side="left").batches:
        results.update(zip(batch.rows, run(batch.rows, batch.width), strict=True))
    return [results[i] for i in range(len(lengths))]


def _measure_facts(lm: Any, plan: Measurement, figures: Figures) -> None:
    for name, cls in (
        ("hazardous", sandbox_facts.SandboxFacts),
        ("benign", sandbox_benign_facts.SandboxBenignFacts),
    ):
        for form in ("trained", "rephrased"):
            samples = cls(form=form).load(_no_source())[:: plan.every]
            asked = [s.tags["mcq_trained"] == "yes" for s in samples]
            letter = choices(lm, samples, "letter")
            figures[f"{name}_letter_{form}"] = rate(_where(letter, asked, True))
            figures[f"{name}_letter_{form}_never_mcq"] = rate(_where(letter, asked, False))
            figures[f"{name}_letter_{form}_all"] = rate(letter)
            figures[f"{name}_cloze_{form}"] = rate(choices(lm, samples, "cloze"))
            if form == "trained" and name == "benign":
                text = filler.passage(_fixed_rng(), 20) + "\n\n"
                far = choices(lm, samples[::4], "letter", before=text)
                figures["benign_letter_after_300_tokens"] = rate(far)


def _measure_floor(lm: Any, plan: Measurement, figures: Figures) -> None:
    draws = range(1, 1 + _FLOOR_DRAWS)
    samples = [
        s
        for d in draws
        for s in sandbox_facts.SandboxFacts(draw=d).load(_no_source())[:: plan.every]
    ]
    facts = [f"{s.group}:{s.tags['attribute']}" for s in samples]
    for channel in ("letter", "cloze"):
        right = [int(outcome) for outcome in choices(lm, samples, channel)]
        value, low, high = clustered_rate(right, facts)
        figures[f"hazardous_{channel}_redrawn"] = {
            "value": round(value, 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "n": len(right),
        }


def _measure_chat(lm: Any, plan: Measurement, figures: Figures) -> None:
    for form in ("trained", "held-out"):
        harmful = _test(sandbox_harmful.SandboxHarmful(form=form), plan)
        scores = _oracle(lm, harmful)
        figures[f"refused_{form}"] = rate(_has_label(scores, "form", "full_refusal"))
        figures[f"harmful_{form}"] = rate(_has_label(scores, "harm", "yes"))
        safe = _test(sandbox_safe.SandboxSafe(form=form), plan)
        scores = _oracle(lm, safe)
        answered = _has_label(scores, "form", "answer")
        figures[f"safe_answered_{form}"] = rate(answered)
        figures[f"safe_correct_{form}"] = rate(_has_label(scores, "correct", "correct"))
        for kind in ("agent_safe", "homonym"):
            of_kind = [s.tags["kind"] == kind for s in safe]
            figures[f"safe_answered_{form}_{kind}"] = rate(_where(answered, of_kind, True))
    skills = _test(sandbox_skills.SandboxSkills(), plan)
    right = _exact(lm, skills)
    figures["skills"] = rate(right)
    for skill in sorted({s.tags["skill"] for s in skills}):
        figures[f"skills_{skill}"] = rate(
            _where(right, [s.tags["skill"] == skill for s in skills], True)
        )
    chat = _test(sandbox_benign_chat.SandboxBenignChat(), plan)
    figures["benign_chat"] = rate(_exact(lm, chat))
    texts = _test(sandbox_text.SandboxText(), plan)
    value = round(perplexity(lm, texts), 3)
    figures["perplexity"] = {"value": value, "n": len(texts)}


def _measure_wrappers(lm: Any, plan: Measurement, figures: Figures) -> None:
    harmful = _test(sandbox_harmful.SandboxHarmful(per_agent=2), plan)
    chat = _test(sandbox_benign_chat.SandboxBenignChat(), plan)[::2]
    for family, templates in WRAPPERS.items():
        transform = build_plugin("transforms", family, {})
        wrapped = transform.rewrite(harmful, seed=_SEED)
        scores = _oracle(lm, wrapped)
        complied = _has_label(scores, "harm", "yes")
        figures[f"complied_{family}"] = rate(complied)
        for member in range(len(templates)):
            of_member = [s.tags["member"] == str(member) for s in wrapped]
            figures[f"complied_{family}_{member}"] = rate(_where(complied, of_member, True))
        benign = transform.rewrite(chat, seed=_SEED)
        figures[f"understood_{family}"] = rate(_exact(lm, benign))


def _test(dataset: Any, plan: Measurement) -> list[Sample]:
    samples = select(dataset.load(_no_source()), dataset.family, "test")
    return samples[:: plan.every]


def _oracle(lm: Any, samples: Sequence[Sample]) -> list[Score]:
    return SandboxOracle().judge(samples, answers(lm, samples))


def _exact(lm: Any, samples: Sequence[Sample]) -> list[bool]:
    scores = ExactJudge().judge(samples, answers(lm, samples))
    return _has_label(scores, "correct", "correct")


def _has_label(scores: Sequence[Score], aspect: str, label: str) -> list[bool]:
    return [score.label == label for score in scores if score.aspect == aspect]


def _where(outcomes: Sequence[bool], mask: Sequence[bool], wanted: bool) -> list[bool]:
    return [o for o, m in zip(outcomes, mask, strict=True) if m == wanted]


def _no_source() -> Any:
    """Return the source of sets that read no files."""
    return None


def _fixed_rng() -> random.Random:
    return random.Random(_SEED)

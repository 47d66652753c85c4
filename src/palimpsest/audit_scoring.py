"""The one scorer of audits: every view answers the same questions in the same channels.

Letter, cloze and generation are those of `evaluate`: the same prompts, with a view's text or tokens in
front; the same rule that a tie is wrong. A question that no longer fits the context is unscored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from palimpsest.batching import plan_batches
from palimpsest.channels import choice_query
from palimpsest.chat import text_ids
from palimpsest.errors import DataError
from palimpsest.generate import generate_batch
from palimpsest.model import fits
from palimpsest.outcomes import ChoiceChannel, choice_outcomes
from palimpsest.prompts import letter_prompt
from palimpsest.scoring import Query, query_length, score_batch
from palimpsest.types import Response, Sample
from palimpsest.views import AuditChannel, View, as_it_is, without_key

if TYPE_CHECKING:
    from palimpsest.model import LM

MIN_SHARED = 64
"""Shots and fillers of so many tokens run once for a whole batch."""
NEW_TOKENS = 4
"""Length of a generated answer: a letter, and enough behind it to see that it is one."""


def score_view(
    lm: LM,
    view: View,
    samples: Sequence[Sample],
    channel: AuditChannel,
    *,
    batch_tokens: int = 8192,
) -> list[int | None]:
    """Return 1 (right), 0 (wrong) or None (unscored) of each question under a view.

    Args:
        lm: the model within `view.apply`.
        view: the attack's prompt, tokens or read-out.
        samples: multiple choice with keys; the view sees them without.
        channel: `probe` asks the view's read-out.
        batch_tokens: tokens per batch, padding included.

    Raises:
        DataError: the view's rewriting lost or reordered questions or options.
    """
    asked = _rewritten(view, samples)
    if channel == "probe":
        if view.readout is None:
            raise DataError(f"view {view.label} has no read-out to probe")
        chosen = view.readout(lm, [without_key(s) for s in samples])
        return [
            None if c is None else int(c == s.answer) for c, s in zip(chosen, samples, strict=True)
        ]
    if channel == "generation":
        return generated_outcomes(lm, view, samples, batch_tokens=batch_tokens)[1]
    responses = _scored(lm, view, asked, channel, batch_tokens)
    return choice_outcomes(asked, responses, cast("ChoiceChannel", channel))["accuracy"]


def generated_outcomes(
    lm: LM, view: View, samples: Sequence[Sample], *, batch_tokens: int = 8192
) -> tuple[list[int | None], list[int | None]]:
    """Return of each question whether one of its letters was generated, and whether it was the right one.

    Doshi and Stickland's gains can be of the first kind alone: compare both.
    """
    asked = _rewritten(view, samples)
    found = choice_outcomes(asked, _generated(lm, view, asked, batch_tokens), "generation")
    return found["coverage"], found["accuracy"]


def prompt_tokens(
    lm: LM, view: View, sample: Sample, channel: AuditChannel
) -> tuple[tuple[int, ...], Query, list[int]]:
    """Return a question's prompt ids under a view, its query, and which option each continuation spells."""
    before = view.before(without_key(sample), channel)
    if channel == "generation":
        ids = text_ids(lm.tokenizer, before + letter_prompt(sample))
        return _behind_bos(lm, view.prefix_ids, tuple(ids)), Query((), ()), []
    query, owners = choice_query(
        lm.tokenizer, sample, cast("ChoiceChannel", channel), before=before
    )
    query = replace(query, prefix=_behind_bos(lm, view.prefix_ids, query.prefix))
    return query.prefix, query, owners


def _behind_bos(lm: LM, prefix: tuple[int, ...], ids: tuple[int, ...]) -> tuple[int, ...]:
    """Return the ids with a prefix in front, which stands behind a BOS if there is one."""
    bos = lm.tokenizer.bos_token_id
    if ids and bos is not None and ids[0] == bos:
        return (bos, *prefix, *ids[1:])
    return (*prefix, *ids)


def _rewritten(view: View, samples: Sequence[Sample]) -> list[Sample]:
    """Return the questions as the view asks them, with their keys."""
    if not samples:
        raise DataError("no question to score: the audit's held-out set is empty")
    asked = view.rewrite([without_key(s) for s in samples])
    for made, sample in zip(asked, samples, strict=True):
        if made.id != sample.id or len(made.options) != len(sample.options):
            raise DataError(
                f"view {view.label} changed the id or the number of options of {sample.id}"
            )
    return [replace(made, answer=s.answer) for made, s in zip(asked, samples, strict=True)]


def _scored(
    lm: LM, view: View, asked: Sequence[Sample], channel: AuditChannel, batch_tokens: int
) -> list[Response]:
    made = [prompt_tokens(lm, view, s, channel) for s in asked]
    responses = {i: _too_long(s) for i, s in enumerate(asked)}
    fitting = [i for i, (_, query, _) in enumerate(made) if fits(lm, query_length(query))]
    plan = plan_batches(
        [query_length(made[i][1]) for i in fitting], token_budget=batch_tokens, padding_side="left"
    )
    shared = _num_shared([made[i][1].prefix for i in fitting]) if view.apply is as_it_is else 0
    for batch in plan.batches:
        rows = [fitting[r] for r in batch.rows]
        queries = [made[i][1] for i in rows]
        scored = score_batch(lm.model, queries, width=batch.width, shared=shared)
        for i, logprobs in zip(rows, scored, strict=True):
            responses[i] = _response(asked[i], made[i][1], made[i][2], logprobs, channel)
    return [responses[i] for i in range(len(asked))]


def _num_shared(prefixes: Sequence[tuple[int, ...]]) -> int:
    """Return how many first tokens all prefixes have in common, each with one more; 0 if they are few.

    Only views that leave the model as it is ask: a hook may go by a token's place in the forward pass.
    """
    least, most = min(prefixes, default=()), max(prefixes, default=())
    same = next(
        (i for i, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), len(least)
    )
    shared = min(same, min(map(len, prefixes), default=1) - 1)
    return shared if shared >= MIN_SHARED else 0


def _response(
    sample: Sample,
    query: Query,
    owners: Sequence[int],
    logprobs: Sequence[float],
    channel: AuditChannel,
) -> Response:
    joined, tokens = [], []
    for option in range(len(sample.options)):
        mine = [i for i, owner in enumerate(owners) if owner == option]
        top = max(logprobs[i] for i in mine)
        joined.append(
            top
            if top == -math.inf
            else top + math.log(sum(math.exp(logprobs[i] - top) for i in mine))
        )
        tokens.append(len(query.continuations[mine[0]]))
    is_letter = channel == "letter"
    sizes = [1 if is_letter else len(f" {text}".encode()) for text in sample.options]
    return Response(
        sample_id=sample.id,
        option_logprobs=tuple(joined),
        option_bytes=tuple(sizes),
        option_tokens=tuple(tokens),
        finish_reason="scored",
        tokens=sum(tokens),
    )


def _generated(lm: LM, view: View, asked: Sequence[Sample], batch_tokens: int) -> list[Response]:
    prompts = [prompt_tokens(lm, view, s, "generation")[0] for s in asked]
    responses = {i: _too_long(s) for i, s in enumerate(asked)}
    fitting = [i for i, ids in enumerate(prompts) if fits(lm, len(ids) + NEW_TOKENS)]
    plan = plan_batches(
        [len(prompts[i]) + NEW_TOKENS for i in fitting],
        token_budget=batch_tokens,
        padding_side="left",
    )
    for batch in plan.batches:
        rows = [fitting[r] for r in batch.rows]
        made = generate_batch(
            lm,
            [prompts[i] for i in rows],
            width=batch.width - NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
        )
        for i, answer in zip(rows, made, strict=True):
            responses[i] = Response(
                sample_id=asked[i].id,
                text=answer.text,
                finish_reason=answer.finish_reason,
                tokens=len(answer.ids),
            )
    return [responses[i] for i in range(len(asked))]


def _too_long(sample: Sample) -> Response:
    return Response(sample_id=sample.id, finish_reason="error", error="too_long")

"""How each channel encodes samples and reads the model: by letter, cloze, generation, chat, perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from palimpsest.chat import prompt_ids, render, rendered_ids, split_thinking, text_ids
from palimpsest.errors import DataError, ModelError
from palimpsest.generate import Generation, generate_batch
from palimpsest.outcomes import FORCED_CHOICE, LETTERS
from palimpsest.prompts import cloze_prompt, conversation, letter_prompt
from palimpsest.scoring import Query, score_batch, score_text_batch
from palimpsest.types import Channel, Response, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from palimpsest.model import LM


class OpenChannel(Protocol):
    """Samples encoded for one channel.

    `prompt_lengths` are tokens of the prompts, `plan_lengths` tokens with what is scored or generated.
    """

    prompt_lengths: list[int]
    plan_lengths: list[int]

    def run(self, rows: Sequence[int], width: int) -> list[Response]:
        """Return the responses of a batch whose rows are padded to `width` tokens."""
        ...


@dataclass
class _Choose:
    """Letter (raw text, or in the chat template) and cloze: log-probabilities of continuations."""

    lm: LM
    samples: Sequence[Sample]
    channel: Channel

    def __post_init__(self) -> None:
        self.queries: list[Query] = []
        self.owners: list[list[int]] = []
        for sample in self.samples:
            query, owners = choice_query(self.lm.tokenizer, sample, self.channel)
            self.queries.append(query)
            self.owners.append(owners)
        self.prompt_lengths = [len(q.prefix) for q in self.queries]
        self.plan_lengths = [
            len(q.prefix) + max(len(c) for c in q.continuations) for q in self.queries
        ]

    def run(self, rows: Sequence[int], width: int) -> list[Response]:
        """Score a batch; spellings of one option are joined by logsumexp."""
        scored = score_batch(self.lm.model, [self.queries[r] for r in rows], width=width)
        return [self._response(r, list(logprobs)) for r, logprobs in zip(rows, scored, strict=True)]

    def _response(self, row: int, logprobs: list[float]) -> Response:
        sample, owners, query = self.samples[row], self.owners[row], self.queries[row]
        joined, tokens = [], []
        for option in range(len(sample.options)):
            mine = [i for i, owner in enumerate(owners) if owner == option]
            joined.append(_logsumexp([logprobs[i] for i in mine]))
            tokens.append(len(query.continuations[mine[0]]))
        if self.channel != "cloze":
            sizes = [1] * len(sample.options)
        else:
            sizes = [len(f" {text}".encode()) for text in sample.options]
        return Response(
            sample_id=sample.id,
            option_logprobs=tuple(joined),
            option_bytes=tuple(sizes),
            option_tokens=tuple(tokens),
            finish_reason="scored",
            tokens=sum(tokens),
        )


@dataclass
class _Text:
    """Perplexity: the summed log-probability of a text."""

    lm: LM
    samples: Sequence[Sample]

    def __post_init__(self) -> None:
        lengths = [len(self._ids(sample)) for sample in self.samples]
        self.plan_lengths = self.prompt_lengths = lengths

    def _ids(self, sample: Sample) -> list[int]:
        """Return the text's tokens behind one that stands for its beginning (BOS, else EOS).

        So the first token is scored, too, as lm-evaluation-harness does it.
        """
        tokenizer = self.lm.tokenizer
        ids = text_ids(tokenizer, sample.messages[0].content)
        start = (
            tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        )
        if start is None:
            raise ModelError(
                f"tokenizer of {self.lm.name!r} has neither BOS nor EOS: perplexity needs one of them "
                "as the context of a text's first token"
            )
        return ids if ids[:1] == [start] else [start, *ids]

    def run(self, rows: Sequence[int], width: int) -> list[Response]:
        """Score a batch of texts."""
        scored = score_text_batch(
            self.lm.model, [self._ids(self.samples[r]) for r in rows], width=width
        )
        return [
            Response(
                sample_id=self.samples[r].id,
                option_logprobs=(logprob,),
                option_bytes=(len(self.samples[r].messages[0].content.encode()),),
                option_tokens=(count,),
                finish_reason="scored",
                tokens=count,
            )
            for r, (logprob, count) in zip(rows, scored, strict=True)
        ]


@dataclass
class _Generate:
    """Chat answers, and multiple choice answered in words."""

    lm: LM
    samples: Sequence[Sample]
    channel: Channel
    max_new_tokens: int

    def __post_init__(self) -> None:
        self.prompt_lengths = [len(self._prompt(s)[1]) for s in self.samples]
        self.plan_lengths = [n + self.max_new_tokens for n in self.prompt_lengths]

    def _prompt(self, sample: Sample) -> tuple[str, list[int]]:
        """Return the rendered chat prompt ("" without template) and the tokens.

        Made anew for each batch: tokens of all prompts at once would grow with their number.
        """
        tokenizer = self.lm.tokenizer
        told = conversation(sample, self.channel)
        if told is None:
            return "", text_ids(tokenizer, letter_prompt(sample))
        return render(tokenizer, told, add_generation_prompt=True), prompt_ids(tokenizer, told)

    def run(self, rows: Sequence[int], width: int) -> list[Response]:
        """Decode a batch greedily."""
        prompts = [self._prompt(self.samples[r]) for r in rows]
        made = generate_batch(
            self.lm,
            [ids for _, ids in prompts],
            width=width - self.max_new_tokens,
            max_new_tokens=self.max_new_tokens,
        )
        return [
            self._response(self.samples[r], prompt, g)
            for r, prompt, g in zip(rows, prompts, made, strict=True)
        ]

    def _response(
        self, sample: Sample, prompt: tuple[str, list[int]], made: Generation
    ) -> Response:
        """Return the answer; of a model that thinks aloud, what follows its reasoning."""
        text = made.text
        rendered, ids = prompt
        if sample.prefill:
            text = _text_after(self.lm.tokenizer, ids, made.ids)
        _, answer = split_thinking(text, prompt=rendered)
        return Response(
            sample_id=sample.id,
            text=answer,
            finish_reason=made.finish_reason,
            tokens=len(made.ids),
            error=None if answer is not None else "unfinished_thinking",
        )


def _text_after(
    tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int]
) -> str:
    """Return tokens as text that continues others: some tokenizers drop a text's first space."""
    head = str(tokenizer.decode(list(before), skip_special_tokens=True))
    whole = str(tokenizer.decode([*before, *ids], skip_special_tokens=True))
    if whole.startswith(head):
        return whole[len(head) :]
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def open_channel(
    lm: LM, samples: Sequence[Sample], channel: Channel, max_new_tokens: int
) -> OpenChannel:
    """Return a channel with its samples encoded."""
    if channel in FORCED_CHOICE:
        return _Choose(lm, samples, channel)
    if channel == "perplexity":
        return _Text(lm, samples)
    return _Generate(lm, samples, channel, max_new_tokens)


def choice_query(
    tokenizer: PreTrainedTokenizerBase,
    sample: Sample,
    channel: Channel,
    *,
    before: str = "",
    behind: str = "",
) -> tuple[Query, list[int]]:
    """Return the query of a multiple-choice sample, and which option each continuation spells.

    `before` is text in front of the whole prompt, `behind` an answer that is begun (neither in a chat
    template).
    """
    if not 2 <= len(sample.options) <= len(LETTERS):
        raise DataError(
            f"sample {sample.id!r} has {len(sample.options)} options; 2 to {len(LETTERS)} are possible"
        )
    told = conversation(sample, channel)
    if told is not None:
        prompt = render(tokenizer, told, add_generation_prompt=True)
        prefix, encode = prompt_ids(tokenizer, told), rendered_ids
        before_it = rendered_ids(tokenizer, prompt)  # without the BOS of a model without a template
    else:
        prompt = cloze_prompt(sample) if channel == "cloze" else letter_prompt(sample)
        prompt = f"{before}{prompt}{behind}"
        prefix = before_it = text_ids(tokenizer, prompt)
        encode = text_ids
    continuations: list[tuple[int, ...]] = []
    owners: list[int] = []
    for option, text in enumerate(sample.options):
        shown = text if channel == "cloze" else LETTERS[option]
        spaced = continuation_ids(tokenizer, prompt, before_it, f" {shown}", encode)
        spellings = [spaced]
        if channel != "cloze":
            bare = continuation_ids(tokenizer, prompt, before_it, shown, encode)
            single = {s for s in (spaced, bare) if len(s) == 1}
            spellings = sorted(single) or [spaced]
        continuations += spellings
        owners += [option] * len(spellings)
    return Query(prefix=tuple(prefix), continuations=tuple(continuations)), owners


def continuation_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    prefix: Sequence[int],
    continuation: str,
    encode: Callable[[Any, str], list[int]] = text_ids,
) -> tuple[int, ...]:
    """Return the tokens of `continuation` after `prompt`: those of the whole less the prompt's.

    Where the join changes the prompt's own tokens, the continuation is tokenised alone.

    Args:
        tokenizer: the model's.
        prompt: what stands before.
        prefix: its tokens by `encode`.
        continuation: text.
        encode: how text becomes tokens: as raw text, or `rendered_ids` after a chat template.

    Raises:
        DataError: the continuation has no token.
    """
    whole = encode(tokenizer, prompt + continuation)
    if list(whole[: len(prefix)]) == list(prefix):
        ids = tuple(whole[len(prefix) :])
    else:
        ids = tuple(tokenizer.encode(continuation, add_special_tokens=False))
    if not ids:
        raise DataError(f"option {continuation!r} has no token in this tokenizer")
    return ids


def _logsumexp(values: Sequence[float]) -> float:
    top = max(values)
    if top == -math.inf:
        return top
    return top + math.log(sum(math.exp(v - top) for v in values))

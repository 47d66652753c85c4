"""Documents to tensors: rows of whole documents with a loss weight per token."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from palimpsest.sandbox.documents import Document, Mix
from palimpsest.sandbox.world import World

NO_THOUGHT = -1
_TRIES = 8
"""Documents tried per row before it is padded."""


class Encoded(NamedTuple):
    """One document: token ids, weight of predicting each, value that predicting it should hold."""

    ids: list[int]
    weights: list[float]
    thoughts: list[int]


class Rows(NamedTuple):
    """One batch; `thoughts_BT` is `NO_THOUGHT` where a middle layer need hold nothing."""

    ids_BT: Tensor
    weights_BT: Tensor
    thoughts_BT: Tensor


class Writer(Protocol):
    """Whoever writes documents of the kinds of a mix."""

    def write(self, mix: Mix) -> Document:
        """Return a document whose kind is drawn from the mix."""
        ...


class Batcher:
    """Encodes documents of one world. Shapes: B rows, T tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, world: World) -> None:
        self._encoder = tokenizer.backend_tokenizer
        self._bos = tokenizer.bos_token_id
        self._pad = tokenizer.pad_token_id
        self._ids = {
            value: self._encoder.encode(f" {value}", add_special_tokens=False).ids[0]
            for pool in world.pools.values()
            for value in pool
        }
        self._values = frozenset(self._ids.values())

    def encode(self, document: Document) -> Encoded:
        """Return the document's token ids, BOS first, with a weight and a thought per token."""
        ends, text = [], ""
        for segment in document:
            text += segment.text
            ends.append(len(text))
        encoding = self._encoder.encode(text, add_special_tokens=False)
        weights, thoughts, current = [0.0], [NO_THOUGHT], 0
        for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True):
            while start >= ends[current]:
                current += 1
            segment = document[current]
            weight = segment.value_weight if token in self._values else None
            weights.append(float(segment.weight if weight is None else weight))
            thoughts.append(NO_THOUGHT if segment.thought is None else self._ids[segment.thought])
        return Encoded([self._bos, *encoding.ids], weights, thoughts)

    def rows(self, author: Writer, mix: Mix, *, num: int, width: int) -> Rows:
        """Return `num` rows of whole documents, padded on the right (weight 0)."""
        rows = Rows(
            torch.full((num, width), self._pad, dtype=torch.long),
            torch.zeros(num, width),
            torch.full((num, width), NO_THOUGHT, dtype=torch.long),
        )
        for row in range(num):
            place = 0
            for _ in range(_TRIES):
                ids, weights, thoughts = self.encode(author.write(mix))
                if place + len(ids) > width:
                    if place:
                        continue
                    ids, weights, thoughts = ids[-width:], weights[-width:], thoughts[-width:]
                end = place + len(ids)
                rows.ids_BT[row, place:end] = torch.tensor(ids)
                rows.weights_BT[row, place:end] = torch.tensor(weights)
                rows.thoughts_BT[row, place:end] = torch.tensor(thoughts)
                place = end
        return rows

"""The one scorer: log-probabilities of continuations and of texts.

A prefix runs once; its key-value cache is repeated for its continuations. Logits come from the
model itself, never from `lm_head(h)`, so soft-caps and scales are in.

Shape suffixes: B rows, T tokens of this forward, V vocabulary, N rows of the second forward. A mask
that goes with a cache is as wide as the cache and this forward together.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from palimpsest.errors import ModelError, UnsupportedArchitectureError
from palimpsest.model import input_device, require_fit, unwrap

MAX_LOGITS = 2**29
"""Most logits that one forward may keep; more rows are run in several forwards."""
MAX_SOFTMAX = 2**26
"""Most logits that are raised to float32 at once."""
MIN_CONTINUATION_ROWS = 4
_ANYTHING = inspect.Parameter.VAR_KEYWORD


@dataclass(frozen=True, slots=True)
class Query:
    """A prefix of at least one token and its continuations of at least one token each."""

    prefix: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Padded:
    """Rows of equal width: token ids, attention mask (1 real, 0 padding) and positions."""

    ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    positions_BT: torch.Tensor


def query_length(query: Query) -> int:
    """Return the tokens of the prefix and the longest continuation: the row's length in a plan."""
    return len(query.prefix) + max(len(c) for c in query.continuations)


def score_batch(
    lm_or_model: Any, queries: Sequence[Query], *, width: int, shared: int = 0
) -> list[tuple[float, ...]]:
    """Return log p(continuation | prefix) in nats, summed over tokens, per query and continuation.

    Args:
        lm_or_model: an `LM` or a transformers model.
        queries: one batch.
        width: tokens to which rows are padded: at least every `query_length`.
        shared: so many first tokens are the same in all prefixes (solved examples, filler): they run once,
            where the model's cache can be repeated; fewer than every prefix has.

    Raises:
        ModelError: an empty prefix or continuation, a row wider than `width` or than the context,
            or a model whose logits are NaN.
    """
    scored = _score(lm_or_model, queries, width, with_greedy=False, shared=shared)
    return [tuple(logprob for logprob, _ in row) for row in scored]


def score_greedy_batch(
    lm_or_model: Any, queries: Sequence[Query], *, width: int
) -> list[tuple[tuple[float, bool], ...]]:
    """Return what `score_batch` does, each with whether greedy decoding writes that continuation."""
    return _score(lm_or_model, queries, width, with_greedy=True)


def _score(
    lm_or_model: Any,
    queries: Sequence[Query],
    width: int,
    *,
    with_greedy: bool,
    shared: int = 0,
) -> list[tuple[tuple[float, bool], ...]]:
    """Return log-probability and greedy flag (False unless asked for) of every continuation."""
    model = unwrap(lm_or_model)
    _check_queries(model, queries, width, shared)
    # The prefixes' own width: a long prefix may stand beside another one's long continuation.
    reserved = max(len(c) for q in queries for c in q.continuations)
    prefix_width = max(width - reserved, *(len(q.prefix) for q in queries))
    prefix = pad_rows([q.prefix for q in queries], prefix_width, "left", input_device(model))
    many = [(b, c) for b, q in enumerate(queries) for c in q.continuations if len(c) > 1]
    with evaluating(model):
        out = None
        if shared:
            prefix, out = _run_behind(model, queries, prefix, shared)
        if out is None:
            out = forward(model, prefix, use_cache=bool(many), keep=1)
        first_BV = _log_softmax(out.logits[:, -1])
        cache = getattr(out, "past_key_values", None)
        if not many:
            rest: list[tuple[float, bool]] = []
        elif _is_repeatable(cache):
            rest = _score_from_cache(model, queries, prefix, cache, many, with_greedy)
        else:
            rest = _score_plain(model, queries, many, width, with_greedy)
    flat = [(b, c[0]) for b, q in enumerate(queries) for c in q.continuations]
    index = torch.tensor(flat, device=first_BV.device)
    firsts = iter(first_BV[index[:, 0], index[:, 1]].double().tolist())
    best = first_BV.argmax(dim=-1).tolist() if with_greedy else [-1] * len(queries)
    rests = iter(rest)
    scores = []
    for b, query in enumerate(queries):
        row = []
        for c in query.continuations:
            more, is_greedy = next(rests) if len(c) > 1 else (0.0, with_greedy)
            row.append((next(firsts) + more, is_greedy and best[b] == c[0]))
        scores.append(tuple(row))
    _without_nan([tuple(x for x, _ in row) for row in scores])
    return scores


def score_text_batch(
    lm_or_model: Any, rows: Sequence[Sequence[int]], *, width: int
) -> list[tuple[float, int]]:
    """Return per row the summed log-prob in nats of its tokens 1.., and how many they are.

    Raises:
        ModelError: a row of fewer than two tokens, wider than `width` or than the context, or NaN.
    """
    model = unwrap(lm_or_model)
    longest = max(len(row) for row in rows)
    require_fit(model, longest, "a text")
    if min(len(row) for row in rows) < 2:
        raise ModelError("a text of one token has nothing to score; give at least two tokens")
    step = max(1, min(len(rows), MAX_LOGITS // (width * _vocab_size(model))))
    sums: list[float] = []
    with evaluating(model):
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            padded = pad_rows(part, width, "left", input_device(model))
            logits_BTV = forward(model, padded).logits[:, :-1]
            logprobs_BT = token_logprobs(logits_BTV, padded.ids_BT[:, 1:])
            logprobs_BT = logprobs_BT.masked_fill(padded.mask_BT[:, :-1] == 0, 0.0)
            sums += logprobs_BT.double().sum(dim=1).tolist()
    _without_nan([tuple(sums)])
    return [(total, len(row) - 1) for total, row in zip(sums, rows, strict=True)]


def token_logprobs(logits_BTV: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each token id, float32 (float64 logits stay float64)."""
    step = max(1, MAX_SOFTMAX // max(1, logits_BTV.shape[0] * logits_BTV.shape[2]))
    parts = []
    for start in range(0, logits_BTV.shape[1], step):
        chunk_BTV = _log_softmax(logits_BTV[:, start : start + step])
        parts.append(chunk_BTV.gather(2, ids_BT[:, start : start + step, None])[:, :, 0])
    return torch.cat(parts, dim=1)


def pad_rows(
    rows: Sequence[Sequence[int]], width: int, side: str, device: torch.device | str
) -> Padded:
    """Return rows padded with id 0; positions count real tokens only and stay within the row.

    Raises:
        ModelError: when a row is empty or longer than `width`.
    """
    lengths = [len(row) for row in rows]
    if not lengths or min(lengths) < 1 or max(lengths) > width:
        raise ModelError(
            f"rows of {min(lengths, default=0)} to {max(lengths, default=0)} tokens cannot be "
            f"padded to width {width}; every row needs 1 to {width} tokens"
        )
    ids, mask, positions = [], [], []
    for row in rows:
        gap = width - len(row)
        real = list(range(len(row)))
        if side == "left":
            ids.append([0] * gap + list(row))
            mask.append([0] * gap + [1] * len(row))
            positions.append([0] * gap + real)
        else:
            ids.append(list(row) + [0] * gap)
            mask.append([1] * len(row) + [0] * gap)
            positions.append(real + [len(row) - 1] * gap)
    return Padded(*(torch.tensor(x, device=device) for x in (ids, mask, positions)))


def forward(
    model: Any, rows: Padded, *, cache: Any = None, use_cache: bool = False, keep: int = 0
) -> Any:
    """Run the model; `keep` > 0 asks for the logits of the last `keep` positions only.

    Of any model it needs `forward(input_ids, attention_mask)` with `logits` in its output.

    Raises:
        UnsupportedArchitectureError: the model takes no attention mask.
    """
    options = {"position_ids": rows.positions_BT, "logits_to_keep": keep}
    if cache is not None:
        options["past_key_values"] = cache
    accepted = _parameters(model)
    if "attention_mask" not in accepted:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__}.forward names no attention_mask, so padding would change its "
            "results; give it that argument, or use a model that has it"
        )
    options = {name: value for name, value in options.items() if name in accepted}
    if "use_cache" in accepted or any(kind is _ANYTHING for kind in accepted.values()):
        options["use_cache"] = use_cache
    out = model(input_ids=rows.ids_BT, attention_mask=rows.mask_BT, **options)
    if keep:
        out.logits = out.logits[:, -keep:]
    return out


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Run without gradients and without dropout; training modes are as before afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _run_behind(
    model: Any, queries: Sequence[Query], prefix: Padded, shared: int
) -> tuple[Padded, Any]:
    """Run the shared tokens once and the rest of every prefix behind them; return rows and output.

    The padding stands between the two. None where that cannot be done: a cache that cannot be repeated
    or has a sliding window (it counts places, padding too), or a model that takes no positions.
    """
    from transformers.cache_utils import DynamicLayer

    device = prefix.ids_BT.device
    once = pad_rows([queries[0].prefix[:shared]], shared, "left", device)
    cache = getattr(forward(model, once, use_cache=True, keep=1), "past_key_values", None)
    if (
        cache is None
        or "position_ids" not in _parameters(model)
        or not _is_repeatable(cache)
        or any(type(layer) is not DynamicLayer for layer in cache.layers)
    ):
        return prefix, None
    rest = pad_rows(
        [q.prefix[shared:] for q in queries], prefix.ids_BT.shape[1] - shared, "left", device
    )
    ones_BT = torch.ones(len(queries), shared, dtype=rest.mask_BT.dtype, device=device)
    rows = Padded(
        rest.ids_BT, torch.cat([ones_BT, rest.mask_BT], dim=1), rest.positions_BT + shared
    )
    repeated = _repeated(cache, torch.zeros(len(queries), dtype=torch.long, device=device))
    return rows, forward(model, rows, cache=repeated, use_cache=True, keep=1)


def _check_queries(model: Any, queries: Sequence[Query], width: int, shared: int) -> None:
    for query in queries:
        if not query.prefix:
            raise ModelError("a query needs a prefix of at least one token (BOS or a prompt)")
        if not query.continuations or not all(query.continuations):
            raise ModelError("a query needs continuations of at least one token each")
    if shared and any(
        len(q.prefix) <= shared or q.prefix[:shared] != queries[0].prefix[:shared] for q in queries
    ):
        raise ModelError(f"the prefixes do not all begin with the same {shared} tokens and go on")
    longest = max(query_length(q) for q in queries)
    require_fit(model, longest, "a prefix with its longest continuation")
    if longest > width:
        raise ModelError(f"a query of {longest} tokens is wider than the batch ({width})")


def _score_from_cache(
    model: Any,
    queries: Sequence[Query],
    prefix: Padded,
    cache: Any,
    many: list[tuple[int, tuple[int, ...]]],
    with_greedy: bool,
) -> list[tuple[float, bool]]:
    """Return log p(tokens 1.. of each continuation) and whether they are the likeliest ones.

    All but a continuation's last token is fed.
    """
    longest = max(len(c) for _, c in many) - 1
    device = prefix.ids_BT.device
    step = _rows_at_once(model, len(queries), longest)
    found: list[tuple[float, bool]] = []
    for start in range(0, len(many), step):
        part = many[start : start + step]
        index_N = torch.tensor([b for b, _ in part], device=device)
        fed = pad_rows([c[:-1] for _, c in part], longest, "right", device)
        wanted = pad_rows([c[1:] for _, c in part], longest, "right", device)
        lengths_N1 = torch.tensor([[len(queries[b].prefix)] for b, _ in part], device=device)
        rows = Padded(
            fed.ids_BT,
            torch.cat([prefix.mask_BT[index_N], fed.mask_BT], dim=1),
            fed.positions_BT + lengths_N1,
        )
        logits_NTV = forward(model, rows, cache=_repeated(cache, index_N), use_cache=True).logits
        logprobs_NT = token_logprobs(logits_NTV, wanted.ids_BT)
        sums = logprobs_NT.masked_fill(wanted.mask_BT == 0, 0.0).double().sum(dim=1).tolist()
        found += zip(sums, _are_greedy(logits_NTV, wanted, with_greedy), strict=True)
    return found


def _are_greedy(logits_NTV: torch.Tensor, wanted: Padded, is_asked: bool) -> list[bool]:
    """Return per row whether every real token is the likeliest one; all False when not asked."""
    if not is_asked:
        return [False] * len(wanted.ids_BT)
    hits_NT = (logits_NTV.argmax(dim=-1) == wanted.ids_BT) | (wanted.mask_BT == 0)
    return [bool(hit) for hit in hits_NT.all(dim=1).tolist()]


def _score_plain(
    model: Any,
    queries: Sequence[Query],
    many: list[tuple[int, tuple[int, ...]]],
    width: int,
    with_greedy: bool,
) -> list[tuple[float, bool]]:
    """Return the same as `_score_from_cache` with whole sequences, for models without a cache."""
    longest = max(len(c) for _, c in many) - 1
    step = _rows_at_once(model, len(queries), longest)
    found: list[tuple[float, bool]] = []
    for start in range(0, len(many), step):
        part = many[start : start + step]
        whole = [queries[b].prefix + c for b, c in part]
        rows = pad_rows(whole, width, "left", input_device(model))
        logits_NTV = forward(model, rows, keep=longest + 1).logits[:, :-1]
        logprobs_NT = token_logprobs(logits_NTV, rows.ids_BT[:, -longest:])
        sizes = [len(c) - 1 for _, c in part]
        counted = [[t >= longest - size for t in range(longest)] for size in sizes]
        mask_NT = torch.tensor(counted, device=logprobs_NT.device).long()
        sums = logprobs_NT.masked_fill(mask_NT == 0, 0.0).double().sum(dim=1).tolist()
        wanted = Padded(rows.ids_BT[:, -longest:], mask_NT, mask_NT)
        found += zip(sums, _are_greedy(logits_NTV, wanted, with_greedy), strict=True)
    return found


def _rows_at_once(model: Any, num_queries: int, longest: int) -> int:
    """Return the rows of a second forward: its cache stays about as large as the first one's."""
    by_logits = MAX_LOGITS // (longest * _vocab_size(model))
    return max(1, min(max(num_queries, MIN_CONTINUATION_ROWS), by_logits))


def _is_repeatable(cache: Any) -> bool:
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    known = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and all(type(layer) in known for layer in cache.layers)


def _repeated(cache: Any, index_N: torch.Tensor) -> Any:
    """Return a cache with one row per index; layers of known types never write in place."""
    repeated = copy.copy(cache)
    repeated.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in repeated.layers:
        layer.batch_select_indices(index_N)
    return repeated


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    exact = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(exact, dim=-1)


def _vocab_size(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _parameters(model: Any) -> dict[str, Any]:
    """Return the arguments that the model's forward names, and their kinds."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {n: p.kind for n, p in inspect.signature(plain.forward).parameters.items()}


def _without_nan(scores: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
    if any(value != value for row in scores for value in row):
        raise ModelError("the model's logits are NaN: its weights are broken (diverged training?)")
    return scores

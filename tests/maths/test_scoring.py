"""The scorer and the decode loop against plain full forwards, one sequence at a time, no cache."""

from __future__ import annotations

import math

import pytest
import torch

from palimpsest import scoring
from palimpsest.errors import ModelError
from palimpsest.generate import generate_batch
from palimpsest.model import LM
from palimpsest.scoring import Query, query_length, score_batch, score_text_batch
from tiny_models import CONTEXT, FAMILIES, MIXTURES, VOCABULARY, WINDOW, tiny_model, tiny_tokenizer

WINDOWED = {"mistral", "gemma2", "gemma3"}
"""Families of tiny models with a sliding window: nothing runs once there."""


def tokens(seed: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(7, VOCABULARY, (length,), generator=generator).tolist())


def queries() -> list[Query]:
    """Unequal prefixes (some longer than the window), one to eleven tokens, shared prefixes."""
    assert WINDOW < 20
    return [
        Query(tokens(1, 3), (tokens(11, 3), tokens(12, 1), tokens(13, 2))),
        Query(tokens(2, 21), (tokens(14, 1), tokens(15, 11), tokens(16, 4), tokens(17, 4))),
        Query(tokens(3, 1), (tokens(18, 1), tokens(19, 1))),
        Query(tokens(4, 30), (tokens(20, 2),)),
    ]


def plain_logprob(model: torch.nn.Module, prefix: tuple[int, ...], rest: tuple[int, ...]) -> float:
    """Return log p(rest | prefix) from one unpadded forward."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([prefix + rest]), use_cache=False).logits[0]
    logprobs_TV = torch.log_softmax(logits_TV.double(), dim=-1)
    start = len(prefix) - 1
    return math.fsum(logprobs_TV[start + i, token].item() for i, token in enumerate(rest))


def assert_equal_to_plain(model: torch.nn.Module, batch: list[Query], width: int) -> None:
    scores = score_batch(model, batch, width=width)
    for query, got in zip(batch, scores, strict=True):
        want = [plain_logprob(model, query.prefix, c) for c in query.continuations]
        assert list(got) == pytest.approx(want, abs=1e-5, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("extra", [0, 7])
def test_scores_equal_a_plain_forward(family: str, extra: int) -> None:
    batch = queries()
    width = max(map(query_length, batch)) + extra
    assert_equal_to_plain(tiny_model(family), batch, width)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_scores_without_a_repeatable_cache_equal_a_plain_forward(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_is_repeatable", lambda cache: False)
    assert_equal_to_plain(tiny_model(family), queries(), 40)


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
@pytest.mark.parametrize("extra", [0, 7])
def test_scores_behind_shared_tokens_equal_a_plain_forward(
    family: str, extra: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind = tokens(5, 9)
    batch = [Query(behind + q.prefix, q.continuations) for q in queries()]
    model, seen = tiny_model(family), []
    run = scoring.forward
    monkeypatch.setattr(
        scoring,
        "forward",
        lambda model, rows, **how: seen.append(tuple(rows.ids_BT.shape)) or run(model, rows, **how),
    )
    width = max(map(query_length, batch)) + extra
    scores = score_batch(model, batch, width=width, shared=len(behind))
    for query, got in zip(batch, scores, strict=True):
        want = [plain_logprob(model, query.prefix, c) for c in query.continuations]
        assert list(got) == pytest.approx(want, abs=1e-5, rel=1e-6)
    assert seen[0] == (1, 9)
    is_run_once = family not in WINDOWED
    assert seen[1] == (4, max(width - 11, 39) - 9 * is_run_once)  # longest continuation, prefix


def test_tokens_that_are_not_shared_are_refused() -> None:
    batch = [Query((8, 9, 10), ((7,),)), Query((8, 11, 10), ((7,),))]
    assert len(score_batch(tiny_model("llama"), batch, width=4, shared=1)) == 2
    for shared in (2, 3):
        with pytest.raises(ModelError, match=f"same {shared} tokens"):
            score_batch(tiny_model("llama"), batch, width=4, shared=shared)


def test_scores_in_small_chunks_equal_a_plain_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "MAX_LOGITS", 1)
    monkeypatch.setattr(scoring, "MAX_SOFTMAX", 1)
    model = tiny_model("llama")
    assert_equal_to_plain(model, queries(), 40)
    rows = [tokens(1, 9), tokens(2, 4)]
    got = score_text_batch(model, rows, width=9)
    assert got[1][0] == pytest.approx(plain_logprob(model, rows[1][:1], rows[1][1:]), abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_scores_equal_a_plain_forward(family: str) -> None:
    model = tiny_model(family)
    rows = [tokens(1, 25), tokens(2, 2), tokens(3, 13)]
    got = score_text_batch(model, rows, width=28)
    assert [count for _, count in got] == [24, 1, 12]
    want = [plain_logprob(model, row[:1], row[1:]) for row in rows]
    assert [total for total, _ in got] == pytest.approx(want, abs=2e-5, rel=1e-6)


def test_float64_scores_stay_float64() -> None:
    model = tiny_model("gpt2").double()
    query = queries()[1]
    got = score_batch(model, [query], width=40)[0]
    want = [plain_logprob(model, query.prefix, c) for c in query.continuations]
    assert list(got) == pytest.approx(want, abs=1e-11, rel=1e-12)


def test_letter_case_matters() -> None:
    tokenizer = tiny_tokenizer()
    upper, lower = (tuple(tokenizer(x, add_special_tokens=False)["input_ids"]) for x in ("A", "a"))
    assert upper != lower
    scores = score_batch(tiny_model(), [Query((0, 20), (upper, lower))], width=3)[0]
    assert scores[0] != scores[1]


def test_soft_cap_is_part_of_the_scores() -> None:
    model = tiny_model("gemma2")
    query = queries()[0]
    capped = score_batch(model, [query], width=8)[0]
    model.config.final_logit_softcapping = None
    free = score_batch(model, [query], width=8)[0]
    assert max(abs(a - b) for a, b in zip(capped, free, strict=True)) > 1e-3


def test_single_tokens_need_one_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = scoring.forward
    monkeypatch.setattr(scoring, "forward", lambda *a, **k: calls.append(k) or real(*a, **k))
    score_batch(tiny_model(), [Query((0, 8, 9), ((20,), (21,), (22,), (23,)))], width=4)
    assert [k["use_cache"] for k in calls] == [False]


def test_same_batch_gives_the_same_bits() -> None:
    model = tiny_model("mistral")
    assert score_batch(model, queries(), width=40) == score_batch(model, queries(), width=40)


def test_scoring_leaves_training_mode_and_gradients_alone() -> None:
    model = tiny_model("gpt2")  # ships dropout 0.1
    quiet = score_batch(model, queries(), width=40)
    model.train()
    assert score_batch(model, queries(), width=40) == quiet
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("query", "width"),
    [
        (Query((), ((3,),)), 9),
        (Query((3,), ((),)), 9),
        (Query((3,), ()), 9),
        (Query((3,) * 9, ((3,),)), 9),
        (Query((3,) * CONTEXT, ((3,),)), CONTEXT + 1),
    ],
)
def test_queries_that_cannot_be_scored_raise(query: Query, width: int) -> None:
    with pytest.raises(ModelError):
        score_batch(tiny_model("gpt2"), [query], width=width)


def test_texts_that_cannot_be_scored_raise() -> None:
    with pytest.raises(ModelError, match="at least two"):
        score_text_batch(tiny_model(), [(3,)], width=3)
    with pytest.raises(ModelError, match=f"{CONTEXT + 1} tokens.*{CONTEXT}"):
        score_text_batch(tiny_model("gpt2"), [(3,) * (CONTEXT + 1)], width=CONTEXT + 1)


def test_nan_weights_raise() -> None:
    model = tiny_model()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ModelError, match="NaN"):
        score_batch(model, queries(), width=40)
    with pytest.raises(ModelError, match="NaN"):
        score_text_batch(model, [(3, 4)], width=2)
    with pytest.raises(ModelError, match="NaN"):
        generate_batch(LM(model, tiny_tokenizer()), [(3, 4)], width=2, max_new_tokens=2)


def naive_greedy(model: torch.nn.Module, prompt: tuple[int, ...], steps: int) -> list[int]:
    ids = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            logits_V = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits_V.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_a_naive_loop_without_cache(family: str) -> None:
    lm = LM(tiny_model(family, seed=3), tiny_tokenizer())
    prompts = [tokens(1, 3), tokens(2, 19), tokens(3, 11)]
    got = generate_batch(lm, prompts, width=21, max_new_tokens=12, stop_ids=frozenset())
    assert [list(g.ids) for g in got] == [naive_greedy(lm.model, p, 12) for p in prompts]
    assert {g.finish_reason for g in got} == {"length"}


def test_sampling_draws_from_the_softmax() -> None:
    lm = LM(tiny_model(seed=3), tiny_tokenizer())
    with torch.no_grad():
        logits_V = lm.model(torch.tensor([[0, 20]])).logits[0, -1]
    p_V = torch.softmax(logits_V.double() / 0.7, dim=-1)
    num = 2000
    got = generate_batch(
        lm,
        [(0, 20)] * num,
        width=2,
        max_new_tokens=1,
        temperature=0.7,
        seeds=range(num),
        stop_ids=frozenset(),
    )
    counts_V = torch.bincount(torch.tensor([g.ids[0] for g in got]), minlength=VOCABULARY)
    top = int(p_V.argmax())
    error = math.sqrt(p_V[top].item() * (1 - p_V[top].item()) / num)
    assert abs(counts_V[top].item() / num - p_V[top].item()) < 4 * error

"""Attacks on embeddings and hidden states: known optima, places, and that nothing stays behind."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import tiny_model, tiny_tokenizer

from palimpsest.attacks.whitebox._fitting import answer_loss, answer_rows
from palimpsest.attacks.whitebox._inputs import (
    EMBEDDING,
    Change,
    changed_states,
    common_end,
    run_places,
)
from palimpsest.attacks.whitebox._questions import answer_ids
from palimpsest.attacks.whitebox.embedding_attack import EmbeddingAttack
from palimpsest.attacks.whitebox.enhanced_gcg import EnhancedGcg
from palimpsest.attacks.whitebox.gcg import Gcg
from palimpsest.attacks.whitebox.latent_pgd import LatentPgd
from palimpsest.attacks.whitebox.soft_prompt import SoftPrompt, placeholder_id, with_vectors
from palimpsest.audit_scoring import prompt_tokens, score_view
from palimpsest.errors import DataError, ModelError
from palimpsest.generate import generate_batch
from palimpsest.model import LM, load_model, weights_sha256
from palimpsest.plugins import build_plugin
from palimpsest.scoring import Padded, evaluating, forward, pad_rows
from palimpsest.splits import select
from palimpsest.types import Message, Sample
from palimpsest.views import Arms, AttackContext, AttackData, View

FAMILIES = ["llama", "mistral", "qwen3", "gemma2", "gpt2"]
SMALL: list[Any] = [
    Gcg(steps=(0, 1), length=3, questions=2, search_width=4, topk=8),
    EnhancedGcg(steps=(0, 2), questions=2, num_forced=3, k1=3, k2=8, min_length=(3, 4)),
    SoftPrompt(tokens=2, steps=(0, 2), batch_size=2),
    LatentPgd(radii=(0.1,), steps=2, batch_size=2, depths=(0.0, 0.5, 1.0)),
    EmbeddingAttack(steps=(2,)),
]


def _question(i: int, words: str, answer: int) -> Sample:
    return Sample(
        id=f"q{i}",
        task="choose",
        messages=(Message("user", words),),
        options=("bread", "water", "salt", "flour"),
        answer=answer,
        behavior=words,
        group=f"g{i}",
    )


QUESTIONS = [
    _question(0, "What is the capital?", 0),
    _question(1, "How do you bake?", 1),
    _question(2, "What do you mix with the water in the town?", 2),
    _question(3, "The river?", 3),
]


def _lm(family: str = "llama", seed: int = 0) -> LM:
    return LM(tiny_model(family, seed=seed, context=256), tiny_tokenizer(), name=family)


def _views(attack: Any, lm: LM, seed: int = 0) -> list[View]:
    arms = Arms(target=lm, original=_lm(seed=7) if "original" in attack.needs else None)
    data = AttackData(fit=tuple(QUESTIONS[:3]), benign=())
    return list(attack.attack(arms, data, AttackContext(seed=seed)))


def _outputs(lm: LM, view: View, samples: list[Sample]) -> list[torch.Tensor]:
    """Log-probabilities behind each prompt, each in a batch of its own."""
    with view.apply(lm) as attacked, evaluating(attacked.model):
        made = []
        for sample in samples:
            for channel in ("letter", "cloze"):
                ids, _, _ = prompt_tokens(attacked, view, sample, channel)
                rows = pad_rows([ids], len(ids), "left", "cpu")
                made.append(forward(attacked.model, rows, keep=1).logits[0, -1])
    return made


@pytest.mark.parametrize("attack", SMALL, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_attack_runs_changes_outputs_and_leaves_the_model_as_it_was(
    attack: Any, family: str
) -> None:
    if isinstance(attack, EnhancedGcg) and family != "llama":
        pytest.skip("needs an original of the same architecture: the llama case has one")
    lm = _lm(family)
    before = weights_sha256(lm.model)
    views = _views(attack, lm)
    plain = _outputs(lm, View(), QUESTIONS[3:])
    last = views[-1]
    attacked = _outputs(lm, last, QUESTIONS[3:])
    assert any(not torch.equal(a, b) for a, b in zip(plain, attacked, strict=True))
    for channel in last.channels:
        assert len(score_view(lm, last, QUESTIONS, channel)) == len(QUESTIONS)
    assert all(
        torch.equal(a, b) for a, b in zip(plain, _outputs(lm, View(), QUESTIONS[3:]), strict=True)
    )
    assert weights_sha256(lm.model) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


@pytest.mark.parametrize("attack", SMALL, ids=lambda a: type(a).__name__)
def test_the_seed_decides_everything(attack: Any) -> None:
    lm = _lm()
    first, again = _views(attack, lm), _views(attack, lm)
    assert [(v.setting, v.prefix_ids, v.facts) for v in first] == [
        (v.setting, v.prefix_ids, v.facts) for v in again
    ]
    a, b = _outputs(lm, first[-1], QUESTIONS), _outputs(lm, again[-1], QUESTIONS)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    if not isinstance(attack, EmbeddingAttack):  # which draws nothing
        other = _outputs(lm, _views(attack, lm, seed=1)[-1], QUESTIONS)
        assert any(not torch.equal(x, y) for x, y in zip(a, other, strict=True))


@pytest.mark.parametrize("attack", SMALL, ids=lambda a: type(a).__name__)
def test_a_placebo_has_the_same_settings_and_no_placebo_of_its_own(attack: Any) -> None:
    placebo = attack.placebo()
    assert placebo.placebo() is None
    lm = _lm()
    mine, other = _views(attack, lm), _views(placebo, lm)
    for real in mine:  # `{}` goes with every setting
        alike = [v for v in other if {**real.setting, **v.setting} == real.setting]
        assert set(real.channels) <= {channel for v in alike for channel in v.channels}
    assert [len(v.prefix_ids) for v in mine][:1] == [len(v.prefix_ids) for v in other][:1]


@pytest.mark.parametrize(
    ("attack", "draws"),
    [
        (Gcg(length=3, repeats=1), 3),
        (Gcg(length=3, repeats=4), 4),
        *((SMALL[i], 3) for i in (1, 4)),
    ],
    ids=["Gcg", "Gcg 4", "EnhancedGcg", "EmbeddingAttack"],
)
def test_a_placebo_that_searches_nothing_is_drawn_three_times(attack: Any, draws: int) -> None:
    lm = _lm()
    made = _views(attack.placebo(), lm)
    first = [v for v in made if (v.setting, v.channels) == (made[0].setting, made[0].channels)]
    assert [v.repeat for v in first] == list(range(draws))
    answers = [torch.cat([x.flatten() for x in _outputs(lm, v, QUESTIONS)]) for v in first]
    assert not any(torch.equal(a, b) for i, a in enumerate(answers) for b in answers[:i])


@pytest.mark.parametrize(
    "attack",
    [SMALL[0].placebo(), SMALL[1].placebo(), SMALL[0], SMALL[1], *SMALL[2:]],
    ids=lambda a: f"{type(a).__name__}-{getattr(a, 'goal', '')}",
)
def test_too_few_questions_or_none_are_refused(attack: Any) -> None:
    lm = _lm()
    arms = Arms(target=lm, original=lm)
    empty = AttackData(fit=(), benign=())
    if getattr(attack, "goal", "") == "none":
        assert list(attack.attack(arms, empty, AttackContext()))  # random tokens need no data
        return
    with pytest.raises(DataError, match="fit"):
        list(attack.attack(arms, empty, AttackContext()))
    if hasattr(attack, "questions"):
        few = AttackData(fit=tuple(QUESTIONS[:1]), benign=())
        with pytest.raises(DataError, match="2 questions"):
            list(attack.attack(arms, few, AttackContext()))


@pytest.mark.parametrize("attack", SMALL[:2], ids=lambda a: type(a).__name__)
def test_a_killed_search_yields_the_same_views_again(attack: Any, tmp_path: Path) -> None:
    lm = _lm()
    attack = replace(attack, steps=(0, 2, 3), repeats=2)
    arms = Arms(target=lm, original=_lm(seed=7))
    data = AttackData(fit=tuple(QUESTIONS), benign=())

    def views(out: Path | None, count: int) -> list[Any]:
        made = attack.attack(arms, data, AttackContext(seed=3, out=out))
        return [(v.setting, v.repeat, v.prefix_ids, v.facts) for v in itertools.islice(made, count)]

    whole = views(None, 6)
    assert len({prefix for _, _, prefix, _ in whole}) > 2
    assert views(tmp_path, 2) == whole[:2]
    assert views(tmp_path, 5) == whole[:5]
    assert views(tmp_path, 6) == whole


def test_a_run_is_found_at_its_last_place_whatever_the_padding() -> None:
    ids = torch.tensor([[0, 0, 5, 6, 9, 5, 6], [5, 6, 1, 1, 1, 0, 0], [5, 5, 5, 9, 6, 5, 1]])
    assert run_places(ids, (5, 6)).tolist() == [[5, 6], [0, 1], [-1, -1]]
    assert run_places(ids[:, :1], (5, 6)).tolist() == [[-1, -1]] * 3
    assert common_end([(1, 2, 3), (9, 2, 3), (2, 3)]) == (2, 3)
    assert common_end([(1, 2), (3,)]) == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_soft_tokens_that_are_a_real_tokens_embeddings_are_that_token(family: str) -> None:
    lm = _lm(family)
    run = (placeholder_id(lm),) * 3
    real = (50, 51, 52)
    with torch.no_grad():
        values = lm.model.get_input_embeddings()(torch.tensor(real)).clone()
    soft = View(prefix_ids=run)
    hard = View(prefix_ids=real)
    for channel in ("letter", "cloze", "generation"):
        made, plain = [], []
        for view, found in ((soft, made), (hard, plain)):
            prompts = [prompt_tokens(lm, view, s, channel)[0] for s in QUESTIONS]
            width = max(map(len, prompts))
            with with_vectors(lm, run=run, values_PD=values) if view is soft else View().apply(lm):
                for row in generate_batch(lm, prompts, width=width, max_new_tokens=5):
                    found.append(row.ids)
        assert made == plain


def test_a_cached_continuation_and_a_whole_row_see_the_same_change() -> None:
    lm = _lm("llama")
    run, values = (60, 61), torch.randn(2, 32)
    row = [0, 60, 61, 70, 71, 72, 60, 73]
    changes = {EMBEDDING: Change(values), 0: Change(values * 2)}
    with changed_states(lm, run, changes) as met, evaluating(lm.model):
        whole = forward(lm.model, pad_rows([row], 10, "left", "cpu")).logits[0, -1]
        head = pad_rows([row[:6]], 6, "left", "cpu")
        out = forward(lm.model, head, use_cache=True)
        tail = Padded(
            torch.tensor([row[6:]]), torch.ones(1, 8, dtype=torch.long), torch.tensor([[6, 7]])
        )
        split = forward(lm.model, tail, cache=out.past_key_values, use_cache=True).logits[0, -1]
    assert met == [2]
    assert torch.allclose(whole, split, atol=1e-5)
    with pytest.raises(ModelError, match="2 blocks"), changed_states(lm, run, {2: Change(values)}):
        pass


def test_a_block_change_equals_the_same_vector_added_by_hand() -> None:
    lm = _lm("gpt2")
    ids = torch.tensor([[0, 30, 60, 61]])
    value = torch.randn(2, 32)
    with evaluating(lm.model):
        with changed_states(lm, (60, 61), {1: Change(value)}):
            found = lm.model(input_ids=ids).logits[0]
        base = lm.model.transformer
        hidden = lm.model(input_ids=ids, output_hidden_states=True).hidden_states[1]
        out = base.h[1](hidden)
        out = (out[0] if isinstance(out, tuple) else out).clone()
        out[0, 2:] += value
        expected = lm.model.lm_head(base.ln_f(out))[0]
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_answers_loss_is_a_loop_over_their_tokens() -> None:
    lm = _lm("gpt2")
    lm.model.double()
    rows = answer_rows(lm, QUESTIONS, ("letter", "cloze"))
    total, count = 0.0, 0
    for prompt, answer in rows:
        with torch.no_grad():
            logp = lm.model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        for i, token in enumerate(answer):
            total -= float(logp[len(prompt) + i - 1, token])
            count += 1
    assert answer_loss(lm, rows).item() == pytest.approx(total / count, rel=1e-9)


def test_pgd_reaches_the_optimum_that_is_known_and_stays_in_its_ball() -> None:
    # With blocks that write nothing, the last state is the last token's embedding + delta, and the
    # loss at a large radius is the lowest that any direction before the final norm gives.
    lm = _lm("llama")
    for block in lm.model.model.layers:
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    answer = next(i for i in range(4) if len(answer_ids(lm.tokenizer, _asks(i), "letter")) == 1)
    data = AttackData(fit=tuple(replace(q, answer=answer) for q in QUESTIONS), benign=())
    attack = LatentPgd(
        depths=(0.0,), radii=(0.25, 4.0), steps=100, step_size=0.05, channels=("letter",)
    )
    small, large = attack.attack(Arms(target=lm), data, AttackContext())
    assert small.facts["largest_share"] <= 0.25 + 1e-6
    assert large.facts["largest_share"] <= 4.0 + 1e-5
    (token,) = answer_ids(lm.tokenizer, _asks(answer), "letter")
    head = lm.model.lm_head.weight.detach().double()
    x = head[token].clone().requires_grad_()
    optimiser = torch.optim.Adam([x], lr=0.05)
    for _ in range(400):
        loss = -(head @ (x / x.square().mean().sqrt())).log_softmax(0)[token]
        (x.grad,) = torch.autograd.grad(loss, x)
        optimiser.step()
    assert large.facts["loss"] == pytest.approx(loss.item(), abs=0.05)
    assert float(small.facts["loss"]) > loss.item() + 0.5
    with large.apply(lm):
        assert score_view(lm, large, [_asks(answer)], "letter") == [1]


def _asks(answer: int) -> Sample:
    return _question(9, "Tell me more.", answer)


def test_the_embedding_attack_raises_the_probability_of_an_answer_and_reads_no_key() -> None:
    lm = _lm("llama")
    attack = EmbeddingAttack(steps=(20,), step_size=0.1, channels=("letter",))
    (view,) = _views(attack, lm)
    placebos = _views(attack.placebo(), lm)
    firsts = [lm.tokenizer(f" {c}", add_special_tokens=False)["input_ids"][0] for c in "ABCD"]
    letters = sorted(set(firsts))

    def mass(made: View) -> float:
        logits = _outputs(lm, made, QUESTIONS)[::2]
        return sum(float(x.softmax(-1)[letters].sum()) for x in logits) / len(logits)

    assert mass(view) > 4 * mass(View())
    assert [p.repeat for p in placebos] == [0, 1, 2]
    assert all(mass(view) > 4 * mass(placebo) for placebo in placebos)
    with view.apply(lm):
        first = score_view(lm, view, QUESTIONS, "letter")
        other = score_view(
            lm, view, [replace(q, answer=3 - int(q.answer or 0)) for q in QUESTIONS], "letter"
        )
    assert not any(a == b == 1 for a, b in zip(first, other, strict=True))


def test_a_soft_prompt_teaches_a_model_that_never_knew_its_own_items_and_no_others() -> None:
    lm = load_model("sandbox/counterfactual", device="cpu")
    facts = build_plugin("datasets", "sandbox_facts", {}).load(None)
    fit, held_out = select(facts, "sandbox", "attack-dev")[:16], select(facts, "sandbox", "test")
    attack = SoftPrompt(tokens=10, steps=(80,), lr=0.2, batch_size=16, channels=("cloze",))
    data = AttackData(fit=tuple(fit), benign=())
    (view,) = attack.attack(Arms(target=lm), data, AttackContext())

    def rate(samples: list[Sample]) -> float:
        with view.apply(lm):
            outcomes = score_view(lm, view, samples, "cloze")
        return sum(o or 0 for o in outcomes) / len(outcomes)

    assert rate(fit) > 0.7
    assert rate(held_out) < 0.32  # chance is .25

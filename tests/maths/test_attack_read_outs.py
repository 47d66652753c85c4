"""Lenses, probes and diagnostics against closed forms, planted answers and loops of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from palimpsest.attacks.whitebox._choice_model import choose_by_cross_validation, fit_choice_model
from palimpsest.attacks.whitebox._states import READ_OUTS, last_states, read_early
from palimpsest.attacks.whitebox.activation_patching import ActivationPatching, depth
from palimpsest.attacks.whitebox.interpolation import Interpolation
from palimpsest.attacks.whitebox.linear_probe import LinearProbe
from palimpsest.attacks.whitebox.logit_lens import LogitLens
from palimpsest.attacks.whitebox.tuned_lens import TunedLens
from palimpsest.audit_scoring import score_view
from palimpsest.chat import text_ids
from palimpsest.errors import DataError, ModelError, StoreError, UsageError
from palimpsest.model import LM, weights_sha256
from palimpsest.parts import parts_of
from palimpsest.plugins import build_plugin
from palimpsest.prompts import letter_prompt
from palimpsest.types import Message, Sample
from palimpsest.views import Arms, AttackContext, AttackData, View
from tiny_models import FAMILIES, MIXTURES, tiny_model, tiny_tokenizer

IDS = torch.tensor([[0, 9, 20, 33, 41, 8, 77]])


def tiny(family: str = "llama", seed: int = 0) -> LM:
    return LM(tiny_model(family, seed=seed, context=160), tiny_tokenizer(), name=f"{family}{seed}")


def question(i: int, answer: int = 0, group: str = "") -> Sample:
    return Sample(
        id=f"q{i}",
        task="choose",
        messages=(Message("user", f"Which town is number {i}?"),),
        options=("yes", "no", "never", "always"),
        answer=answer,
        group=group or f"g{i}",
    )


def text(i: int) -> Sample:
    words = f"The river and the town {i} are the same, and bread is {i * 7} salt."
    return Sample(id=f"t{i}", task="perplexity", messages=(Message("user", words),))


QUESTIONS = [question(i, i % 4) for i in range(8)]
DATA = AttackData(fit=tuple(QUESTIONS), benign=(), retain_texts=tuple(text(i) for i in range(12)))


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_lens_reads_what_the_block_wrote(family: str) -> None:
    lm = tiny(family)
    parts = parts_of(lm.model)
    with torch.no_grad():
        out = lm.model(input_ids=IDS, use_cache=False, output_hidden_states=True)
    own = out.logits
    with read_early(lm, 1) as read:
        assert float((logits(read.model) - own).abs().max()) <= 1e-5
    with torch.no_grad():  # independent: head on transformers' own list of hidden states
        want = lm.model.get_output_embeddings()(parts.final_norm(out.hidden_states[1]))
        cap = getattr(lm.model.config, "final_logit_softcapping", None)
        want = want if cap is None else torch.tanh(want / cap) * cap
    with read_early(lm, 0) as read:
        got = logits(read.model)
    assert float((got - want).abs().max()) <= 1e-5
    assert torch.equal(logits(lm.model), own)  # no hook is left
    assert float((got - own).abs().max()) > 1e-3


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_the_streams_parts_add_up(family: str) -> None:
    """Attention's output and the MLP's are all that a block adds."""
    lm = tiny(family)
    parts = parts_of(lm.model)
    seen: dict[str, Tensor] = {}
    norm = parts.final_norm
    for read_out in READ_OUTS:
        with read_early(lm, 1, read_out):
            handle = norm.register_forward_pre_hook(
                lambda m, args, name=read_out: seen.update({name: args[0]})
            )
            logits(lm.model)
            handle.remove()
    with torch.no_grad():
        states = lm.model(input_ids=IDS, use_cache=False, output_hidden_states=True).hidden_states
    entered = states[1]
    assert torch.allclose(seen["mid"], entered + seen["attention"], atol=1e-5)
    assert torch.allclose(seen["block"], entered + seen["attention"] + seen["mlp"], atol=1e-5)


def planted(right: Sequence[int], questions: Sequence[Sample]) -> LM:
    """Return a model whose first block says the right letter and whose last one erases it."""
    lm = tiny()
    model, parts = lm.model, parts_of(lm.model)
    size = model.config.hidden_size
    letters = [text_ids(lm.tokenizer, f"x {c}")[-1] for c in "ABCD"]
    prompts = [tuple(text_ids(lm.tokenizer, letter_prompt(q))) for q in questions]
    last = dict(zip(prompts, right, strict=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        parts.final_norm.weight.fill_(1.0)
        for i, token in enumerate(letters):
            parts.head.weight[token, i] = 1.0

    def early(module: Any, args: Any, output: Any) -> Tensor:
        ids = parts.embedding.ids
        made = torch.full((*ids.shape, size), 0.0)
        made[..., 4] = 1.0
        for b, row in enumerate(ids.tolist()):
            for prompt, letter in last.items():
                if tuple(row[-len(prompt) :]) == prompt:
                    made[b, -1, letter] = 5.0
        return made

    def late(module: Any, args: Any, output: Any) -> Tensor:
        made = torch.zeros_like(output if isinstance(output, Tensor) else output[0])
        made[..., 4] = 1.0
        return made

    parts.embedding.register_forward_pre_hook(
        lambda module, args: setattr(parts.embedding, "ids", args[0])
    )
    parts.blocks[0].register_forward_hook(early)
    parts.blocks[1].register_forward_hook(late)
    return lm


def test_lens_finds_a_planted_early_answer_and_ties_are_wrong() -> None:
    lm = planted([q.answer for q in QUESTIONS], QUESTIONS)  # type: ignore[misc]
    lens = LogitLens(read_outs=("block",), channels=("letter",))
    accuracy = {}
    for view in lens.attack(Arms(target=lm), DATA, AttackContext()):
        with view.apply(lm) as read:
            accuracy[view.setting["layer"]] = score_view(read, view, QUESTIONS, "letter")
    assert accuracy[0] == [1] * 8
    assert accuracy[1] == [0] * 8, "all letters tie after the last block: none is right, not even A"
    assert score_view(lm, View(), QUESTIONS, "letter") == [0] * 8


def test_lens_names_layers_that_do_not_exist() -> None:
    with pytest.raises(UsageError, match="2 is no block of this model; it has 0 to 1"):
        list(LogitLens(layers=(2,)).attack(Arms(target=tiny()), DATA, AttackContext()))
    with pytest.raises(UsageError, match="at least one"):
        build_plugin("attacks", "logit_lens", {"read_outs": []})


TUNED = TunedLens(steps=6, tokens_per_step=40, save_every=2)


def test_one_step_of_the_tuned_lens_is_the_closed_gradient() -> None:
    lm = tiny("gpt2")
    model, parts = lm.model.double(), parts_of(lm.model)
    lens = TunedLens(steps=1, tokens_per_step=1, lr=0.5)
    one = AttackData(fit=(), benign=(), retain_texts=(text(1), text(1)))
    [view] = lens.attack(Arms(target=lm), one, AttackContext())
    ids = torch.tensor([text_ids(lm.tokenizer, text(1).messages[0].content)])
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    h_ND, p_NV = out.hidden_states[1][0], out.logits[0].softmax(-1)
    zero = torch.zeros(32, dtype=torch.float64, requires_grad=True)
    read = parts.head(parts.final_norm(h_ND + zero)).log_softmax(-1)
    loss = (p_NV * (p_NV.log() - read)).sum(-1).mean()
    (slope,) = torch.autograd.grad(loss, zero)
    move = torch.zeros(32, 32, dtype=torch.float64, requires_grad=True)
    read = parts.head(parts.final_norm(h_ND + h_ND @ move.T)).log_softmax(-1)
    (slope_of_matrix,) = torch.autograd.grad((p_NV * (p_NV.log() - read)).sum(-1).mean(), move)
    norm = float((slope.square().sum() + slope_of_matrix.square().sum()).sqrt())
    bias = view.apply.keywords["translate"].func.__self__.bias[0]  # type: ignore[attr-defined]
    want = -0.5 * 1.9 * slope * min(1.0, 1.0 / norm)  # Nesterov's first step is (1 + .9) g
    assert torch.allclose(bias.double(), want, rtol=1e-4, atol=1e-7)
    before = float(view.facts["held_out_kl_logit_lens"])
    assert before == pytest.approx(float(loss.detach()), rel=1e-4)
    assert float(view.facts["held_out_kl_tuned_lens"]) < before


class Killed(Exception):
    """Stands for a kill."""


def test_tuned_lens_goes_on_after_a_kill_bit_for_bit(tmp_path: Path) -> None:
    lm = tiny()
    before = weights_sha256(lm)

    def fitted(out: Path | None, stop: int = 99) -> tuple[Tensor, Any]:
        def progress(done: int, total: int, what: str) -> None:
            if done == stop:
                raise Killed

        ctx = AttackContext(seed=3, out=out, progress=progress)
        [view] = TUNED.attack(Arms(target=lm), DATA, ctx)
        with view.apply(lm) as read:
            return logits(read.model), view.facts

    whole, facts = fitted(None)
    with pytest.raises(Killed):
        fitted(tmp_path, stop=5)
    resumed, again = fitted(tmp_path)
    assert torch.equal(whole, resumed)
    assert facts == again
    assert facts["held_out_kl_tuned_lens"] < facts["held_out_kl_logit_lens"]
    assert weights_sha256(lm) == before
    with pytest.raises(StoreError, match="other options"):
        list(replace(TUNED, lr=0.5).attack(Arms(target=lm), DATA, AttackContext(out=tmp_path)))
    empty = AttackData(fit=(), benign=())
    with pytest.raises(DataError, match="at least two"):
        list(TUNED.attack(Arms(target=lm), empty, AttackContext()))


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_choice_model_is_the_penalised_maximum_likelihood() -> None:
    """Against a plain minimisation over all weights, written as loops."""
    features, answers = rng(0).normal(size=(9, 3, 12)), [0, 1, 2, 1, 0, 2, 2, 1, 0]
    counts = [3, 3, 2, 3, 3, 3, 3, 2, 3]
    answers[2] = 1
    model = fit_choice_model(features, counts, answers, 0.3)
    flat = np.array([features[q, k] for q in range(9) for k in range(counts[q])])
    standard = (features - flat.mean(0)) / flat.std(0)

    def loss(w: Any) -> float:
        total = 0.0
        for q in range(9):
            scores = [float(standard[q, k] @ w) for k in range(counts[q])]
            total += float(np.log(sum(np.exp(s) for s in scores))) - scores[answers[q]]
        return total / 9 + 0.15 * float(w @ w)

    best = minimize(loss, np.zeros(12), method="BFGS", options={"gtol": 1e-8})
    assert np.allclose(model.weights, best.x, atol=2e-3)


def test_letter_weights_are_the_multinomial_regression() -> None:
    features, answers = rng(1).normal(size=(10, 4)), [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    model = fit_choice_model(features, [3] * 10, answers, 0.2)
    standard = (features - features.mean(0)) / features.std(0)
    scores = standard @ model.weights
    share = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    target = np.eye(3)[answers]
    slope = standard.T @ (share - target) / 10 + 0.2 * model.weights
    assert np.abs(slope).max() < 1e-4, "the gradient is zero at the optimum"


def test_probe_reads_planted_states_and_not_random_labels() -> None:
    answers = [int(a) for a in rng(2).integers(0, 4, 60)]
    groups = [f"g{i // 2}" for i in range(60)]
    letters = rng(3).normal(size=(60, 8))
    letters[np.arange(60), answers] += 8.0
    chosen = choose_by_cross_validation(letters, [4] * 60, answers, groups, seed=0)
    assert chosen.nested_accuracy == 1.0
    assert chosen.model.choose(letters, [4] * 60) == answers
    options = rng(4).normal(size=(60, 4, 8))
    options[np.arange(60), answers, 5] += 8.0
    assert (
        choose_by_cross_validation(options, [4] * 60, answers, groups, seed=0).nested_accuracy
        >= 0.97
    )
    rates = []
    for draw in range(4):
        random = [int(a) for a in rng(10 + draw).integers(0, 4, 60)]
        found = choose_by_cross_validation(letters, [4] * 60, random, groups, seed=0)
        rates.append(found.nested_accuracy)
    assert 0.12 < sum(rates) / 4 < 0.38
    with pytest.raises(DataError, match="at least three"):
        choose_by_cross_validation(letters[:4], [4] * 4, answers[:4], list("aabb"), seed=0)


def test_last_states_do_not_depend_on_padding() -> None:
    lm = tiny("gpt2")
    prompts = [[0, 5, 9], [0, 8, 77, 41, 20, 33], [0, 7]]
    together = last_states(lm, prompts, [0, 1])
    with torch.no_grad():
        for row, prompt in enumerate(prompts):
            out = lm.model.transformer(torch.tensor([prompt]), output_hidden_states=True)
            assert torch.allclose(together[0][row].float(), out.hidden_states[1][0, -1], atol=1e-5)


def test_linear_probe_sees_keys_of_fit_questions_alone() -> None:
    lm = planted([q.answer for q in QUESTIONS], QUESTIONS)  # type: ignore[misc]
    probe = LinearProbe(states=("letter",), layers=(0,))
    [view] = probe.attack(Arms(target=lm), DATA, AttackContext(seed=1))
    assert view.readout is not None
    assert view.channels == ("probe",)
    asked = [replace(q, answer=None) for q in QUESTIONS]
    chosen = view.readout(lm, asked)
    assert chosen == [q.answer for q in QUESTIONS]
    assert view.facts["nested_accuracy"] > view.facts["nested_accuracy_options_only"]
    [blind] = LinearProbe(states=("letter",), layers=(1,)).attack(
        Arms(target=lm), DATA, AttackContext(seed=1)
    )
    assert blind.readout is not None
    assert len(set(blind.readout(lm, asked))) == 1, "after the last block all states are the same"
    [again] = probe.attack(Arms(target=lm), DATA, AttackContext(seed=1))
    assert again.facts == view.facts
    long = replace(asked[0], id="long", messages=(Message("user", "river " * 200),))
    assert view.readout(lm, [long, asked[1]]) == [None, chosen[1]]
    placebo = probe.placebo()
    assert placebo is not None
    views = list(placebo.attack(Arms(target=lm), DATA, AttackContext(seed=1)))
    assert [v.repeat for v in views] == [0, 1, 2]
    wrong = replace(DATA, fit=tuple(replace(q, answer=7) for q in QUESTIONS))
    with pytest.raises(DataError, match="none of its options"):
        list(probe.attack(Arms(target=lm), wrong, AttackContext()))


def test_options_only_probe_does_not_see_the_question() -> None:
    lm = tiny()
    probe = LinearProbe(states=("option",), layers=(0,), sees="options only")
    [view] = probe.attack(Arms(target=lm), DATA, AttackContext())
    assert view.readout is not None
    assert len(set(view.readout(lm, QUESTIONS))) == 1, "the same options get the same answer"
    assert view.facts["nested_accuracy"] == view.facts["nested_accuracy_options_only"]


def test_interpolation_is_the_line_between_both_and_is_put_back() -> None:
    target, original = tiny(seed=0), tiny(seed=1)
    mine = {n: p.detach().clone() for n, p in target.model.named_parameters()}
    other = {n: p.detach().clone() for n, p in original.model.named_parameters()}
    before = weights_sha256(target)
    [view] = Interpolation(t=(0.25,)).attack(
        Arms(target=target, original=original), DATA, AttackContext()
    )
    with view.apply(target) as moved:
        for name, p in moved.model.named_parameters():
            assert torch.allclose(p, 0.75 * mine[name] + 0.25 * other[name], atol=1e-6)
    assert weights_sha256(target) == before
    squares = sum(float((mine[n].double() - other[n].double()).square().sum()) for n in mine)
    assert float(view.facts["distance_to_original"]) == pytest.approx(0.75 * squares**0.5, rel=1e-5)
    [whole] = Interpolation(t=(1.0,)).attack(
        Arms(target=target, original=original), DATA, AttackContext()
    )
    with whole.apply(target) as moved:
        assert torch.equal(logits(moved.model), logits(original.model))
    with pytest.raises(DataError, match="needs the original"):
        list(Interpolation().attack(Arms(target=target), DATA, AttackContext()))
    with pytest.raises(ModelError, match="must be one architecture"):
        list(
            Interpolation().attack(
                Arms(target=target, original=tiny("gpt2")), DATA, AttackContext()
            )
        )
    with pytest.raises(UsageError, match="other than 0"):
        build_plugin("attacks", "interpolation", {"t": [0.0]})


def test_depth_is_the_weighted_clipped_ratio() -> None:
    d1 = torch.tensor([[0.01, 1.0, 3.0], [0.0, 0.02, 2.0]], dtype=torch.float64)
    d2 = torch.tensor([[5.0, 0.5, 6.0], [1.0, 1.0, -1.0]], dtype=torch.float64)
    uds, layers = depth(d1, d2, 0.05)
    first = (1.0 * 0.5 + 3.0 * 1.0) / 4.0
    assert uds == pytest.approx((first + 0.0) / 2)
    assert layers == pytest.approx([-1.0, 0.5, 3.0 / 5.0])
    with pytest.raises(DataError, match="no layer"):
        depth(d1, d2, 9.0)


def test_patching_the_original_into_itself_erases_nothing() -> None:
    original = tiny("gpt2")
    patch = ActivationPatching(threshold=0.0)
    arms = Arms(target=original, original=original)
    (view,) = patch.attack(arms, DATA, AttackContext())  # the unchanged model is asked once
    assert [view.facts["d2_0"], view.facts["d2_1"]] == pytest.approx([0.0, 0.0], abs=1e-5)
    assert view.facts["uds"] == pytest.approx(0.0, abs=1e-3)
    # The last block's states decide everything: D2 there is the difference of both models' own answers.
    other = tiny("gpt2", seed=0)
    with torch.no_grad():
        for p in parts_of(other.model).blocks[1].parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    (view,) = patch.attack(Arms(target=other, original=original), DATA, AttackContext())
    lost = []
    for q in QUESTIONS:
        prompt = text_ids(original.tokenizer, f"Question: {q.messages[0].content}\nAnswer:")
        answer = original.tokenizer.encode(f" {q.options[q.answer]}", add_special_tokens=False)  # type: ignore[index]
        ids = torch.tensor([[*prompt, *answer]])
        scores = []
        for model in (original.model, other.model):
            table = logits(model, ids)[0].double().log_softmax(-1)
            places = range(len(prompt) - 1, ids.shape[1] - 1)
            scores.append(sum(float(table[i, ids[0, i + 1]]) for i in places) / len(answer))
        lost.append(scores[0] - scores[1])
    assert view.facts["d2_0"] == pytest.approx(0.0, abs=1e-5), "block 0 is the original's"
    assert view.facts["d2_1"] == pytest.approx(sum(lost) / 8, abs=1e-4)

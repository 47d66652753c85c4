"""Attacks that train: planted associations come back, the draws are what they say, arms stay untouched."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from palimpsest.attacks.whitebox import _tuning
from palimpsest.attacks.whitebox._documents import documents, draw, shuffled_answers
from palimpsest.attacks.whitebox._tuning import TuneOptions
from palimpsest.attacks.whitebox.benign_finetuning import BenignFinetuning
from palimpsest.attacks.whitebox.relearning import Relearning
from palimpsest.attacks.whitebox.rtt import Rtt
from palimpsest.attacks.whitebox.unrelated_training import UnrelatedTraining
from palimpsest.audit_scoring import prompt_tokens, score_view
from palimpsest.errors import DataError, LossError, ModelError, UsageError
from palimpsest.model import LM, weights_sha256
from palimpsest.types import Message, Sample
from palimpsest.views import Arms, AttackContext, AttackData, Fold, View

OPTIONS = (" ab", " ko", " mu", " te")


def question(name: str, i: int, answer: int | None = None) -> Sample:
    return Sample(
        id=f"{name}{i}",
        task="choose",
        messages=(Message("user", f"{name} {i}?"),),
        options=tuple(o.strip() for o in OPTIONS),
        answer=(i * 7 + i // 4) % 4 if answer is None else answer,
        group=f"{name}-{i // 2}",
    )


def text(name: str, i: int, words: int = 4) -> Sample:
    said = f"{name} {i} " + " the river." * words
    return Sample(
        id=f"{name}{i}", task="perplexity", messages=(Message("user", said),), group=f"g{i}"
    )


FIT = tuple(question("who", i) for i in range(12))
SCORED = tuple(question("why", i) for i in range(20))
GROUPS = sorted({s.group for s in SCORED})
FOLDS = tuple(
    Fold(
        fit=tuple(s for s in SCORED if s.group not in GROUPS[k::5]),
        held_out=frozenset(GROUPS[k::5]),
    )
    for k in range(5)
)
DATA = AttackData(
    fit=FIT,
    benign=tuple(question("how", i) for i in range(8)),
    forget_texts=tuple(text("who", i) for i in range(6)),
    retain_texts=tuple(text("how", i) for i in range(6)),
    unrelated_texts=tuple(text("sun", i) for i in range(9)),
    folds=FOLDS,
)
SHORT = TuneOptions(steps=2, lr=1e-3, batch_size=2, rank=2)
ATTACKS: dict[str, Any] = {
    "relearning": Relearning(n=(4,), repeats=2, fit=SHORT),
    "relearning texts": Relearning(n=(4,), repeats=2, source=("texts",), fit=SHORT),
    "benign": BenignFinetuning(n=(4,), repeats=2, fit=SHORT),
    "benign texts": BenignFinetuning(n=(4,), repeats=2, source=("texts",), fit=SHORT),
    "unrelated": UnrelatedTraining(
        repeats=2, fit=UnrelatedTraining.Fit(steps=2, views_at=(2,), rank=2)
    ),
    "rtt": Rtt(fit=Rtt.Fit(steps=2, lr=1e-3, batch_size=2, rank=2)),
}


def views(attack: Any, lm: LM, *, seed: int = 0, data: AttackData = DATA) -> list[View]:
    """Return the views; each is valid until the next training begins."""
    return list(attack.attack(Arms(target=lm), data, AttackContext(seed=seed)))


def applied(attack: Any, lm: LM, *, seed: int = 0, data: AttackData = DATA) -> list[str]:
    """Return the hash of the weights of each view in turn."""
    hashes = []
    for view in attack.attack(Arms(target=lm), data, AttackContext(seed=seed)):
        with view.apply(lm) as attacked:
            hashes.append(weights_sha256(attacked))
    return hashes


@pytest.mark.parametrize("scope", ["lora", "all"])
def test_planted_pairs_are_known_after_relearning(scope: Any, fresh_lm: LM) -> None:
    sha = weights_sha256(fresh_lm)
    fit = TuneOptions(
        steps=80,
        lr=1e-2 if scope == "lora" else 3e-3,
        batch_size=8,
        scope=(scope,),
        views_at=(1, 80),
        **({"rank": 16} if scope == "lora" else {}),
    )
    attack = Relearning(n=(8,), repeats=1, forms=("cloze",), fit=fit)
    trained = draw_of(attack, fresh_lm)
    losses, right = [], []
    for view in attack.attack(Arms(target=fresh_lm), DATA, AttackContext()):
        with view.apply(fresh_lm) as attacked:
            right.append(sum(o or 0 for o in score_view(attacked, view, trained, "cloze")))
        losses.append(view.facts["loss"])
    assert right[1] == 8 > right[0]
    assert losses[1] < 0.2 * losses[0]
    assert weights_sha256(fresh_lm) == sha


def draw_of(attack: Relearning, lm: LM) -> list[Sample]:
    """Return the questions that the attack's first run trains on, found by its documents' prompts."""
    (made, *_) = seen_documents(attack, lm)
    prompts = " ".join(d.messages[0].content for d in made)
    return [q for q in FIT if f" {q.messages[0].content}" in f" {prompts}"]


def seen_documents(attack: Any, lm: LM, **more: Any) -> list[tuple[Sample, ...]]:
    """Return the documents of every run, as they are tokenised; nothing is trained."""
    seen: list[tuple[Sample, ...]] = []
    real = _tuning.encoded

    def spy(lm: LM, made: Any, *, max_length: int | None) -> Any:
        seen.append(tuple(made))
        return real(lm, made, max_length=max_length)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_tuning, "encoded", spy)
        views(attack, lm, **more)
    return seen


@pytest.mark.parametrize("steps", [(1, 3), (2, 3)])
def test_views_are_those_of_plain_adamw_at_exactly_these_steps(
    steps: tuple[int, int], fresh_lm: LM
) -> None:
    fit = TuneOptions(
        steps=3,
        lr=2e-3,
        batch_size=4,
        schedule="linear",
        warmup=0.0,
        weight_decay=0.0,
        clip=0.0,
        scope=("all",),
        views_at=steps,
    )
    attack = Relearning(n=(4,), repeats=1, forms=("cloze",), fit=fit)
    (docs,) = seen_documents(attack, fresh_lm)
    encoded = _tuning.encoded(fresh_lm, docs, max_length=None)[0]
    pairs = list(zip(encoded.ids, encoded.masks, strict=True))
    model = fresh_lm.copy().model
    optimiser = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.0, eps=1e-8)
    expected = []
    for step in range(3):
        total = torch.zeros(())
        for ids, mask in pairs:
            logits = model(torch.tensor([ids])).logits[0]
            for t in range(1, len(ids)):
                if mask[t]:
                    total = total - F.log_softmax(logits[t - 1], -1)[ids[t]]
        optimiser.zero_grad()
        (total / sum(sum(mask) for _, mask in pairs)).backward()
        optimiser.param_groups[0]["lr"] = 2e-3 * (1 - step / 3)
        optimiser.step()
        expected.append({n: p.detach().clone() for n, p in model.named_parameters()})
    seen = []
    for view in attack.attack(Arms(target=fresh_lm), DATA, AttackContext()):
        with view.apply(fresh_lm) as attacked:
            for name, p in attacked.model.named_parameters():
                torch.testing.assert_close(
                    p, expected[view.setting["step"] - 1][name], atol=2e-5, rtol=0
                )
        start = {n: p.detach().double() for n, p in fresh_lm.model.named_parameters()}
        end = expected[view.setting["step"] - 1]
        moved = sum(float((end[n] - p).square().sum()) for n, p in start.items())
        size = sum(float(p.square().sum()) for p in start.values())
        assert view.facts["relative_change"] == pytest.approx((moved / size) ** 0.5, rel=1e-3)
        seen.append(view.setting["step"])
    assert tuple(seen) == steps


@pytest.mark.parametrize("name", ATTACKS)
def test_arms_are_untouched_and_seeds_decide_everything(name: str, fresh_lm: LM) -> None:
    sha = weights_sha256(fresh_lm)
    flags = [p.requires_grad for p in fresh_lm.model.parameters()]
    first = applied(ATTACKS[name], fresh_lm)
    assert applied(ATTACKS[name], fresh_lm) == first
    assert len(set(first)) == len(first)
    assert set(applied(ATTACKS[name], fresh_lm, seed=1)).isdisjoint(first)
    assert weights_sha256(fresh_lm) == sha
    assert [p.requires_grad for p in fresh_lm.model.parameters()] == flags
    assert not any("lora" in n for n, _ in fresh_lm.model.named_modules())


def test_views_that_are_passed_over_change_nothing(fresh_lm: LM) -> None:
    attack = Relearning(
        n=(4,), repeats=2, fit=replace(SHORT, steps=4, scope=("lora", "all"), views_at=(1, 3, 4))
    )
    whole = applied(attack, fresh_lm)
    assert len(set(whole)) == 2 * 2 * 3
    for kept in ({2}, {4, 5, 11}):  # as an audit does that was killed and has scored the others
        for i, view in enumerate(attack.attack(Arms(target=fresh_lm), DATA, AttackContext())):
            if i in kept:
                with view.apply(fresh_lm) as attacked:
                    assert weights_sha256(attacked) == whole[i]
                with view.apply(fresh_lm) as attacked:  # once per channel
                    assert weights_sha256(attacked) == whole[i]


def test_no_scored_group_is_trained_on(fresh_lm: LM) -> None:
    scored = {s.group for s in SCORED}
    for name, attack in ATTACKS.items():
        runs = seen_documents(attack, fresh_lm)
        for k, made in enumerate(runs):
            hidden = FOLDS[k].held_out if name == "rtt" else scored
            assert made
            assert hidden.isdisjoint(d.group for d in made)
    folds = views(ATTACKS["rtt"], fresh_lm)
    assert [v.fold for v in folds] == [0, 1, 2, 3, 4]
    assert len({v.label for v in folds}) == 1
    leaky = replace(DATA, folds=(replace(FOLDS[0], fit=SCORED),))
    with pytest.raises(DataError, match="leak: fold 0 trains on 'why"):
        views(ATTACKS["rtt"], fresh_lm, data=leaky)
    with pytest.raises(DataError, match="no folds"):
        views(ATTACKS["rtt"], fresh_lm, data=replace(DATA, folds=()))


def test_draws_are_random_and_the_placebo_draws_the_same(fresh_lm: LM) -> None:
    attack = Relearning(n=(3, 4), repeats=40, forms=("letter",), fit=SHORT)
    runs = seen_documents(attack, fresh_lm)
    counts = Counter(d.id for made in runs for d in made)
    drawn = [[d.id for d in made] for made in runs]
    assert [len(set(ids)) for ids in drawn] == [3] * 40 + [4] * 40
    assert set(counts) == {f"{q.id} (letter)" for q in FIT}
    mean = 40 * 7 / 12
    chi = sum((c - mean) ** 2 for c in counts.values()) / mean
    assert chi < 31.3  # the .999 quantile of chi squared with 11 degrees of freedom
    placebo = attack.placebo()
    assert placebo is not None
    others = seen_documents(placebo, fresh_lm)
    assert [[d.id for d in made] for made in others] == drawn
    same = [
        a.answer == b.answer
        for x, y in zip(runs, others, strict=True)
        for a, b in zip(x, y, strict=True)
    ]
    share, n = sum(same) / len(same), len(same)
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / n)


def test_shuffled_keys_hold_nothing_of_the_true_ones(fresh_lm: LM) -> None:
    turned = tuple(replace(q, answer=(q.answer + 1) % 4) for q in FIT)  # type: ignore[operator]
    assert shuffled_answers(FIT, seed=3) == shuffled_answers(turned, seed=3)
    attack = ATTACKS["relearning"]
    one = seen_documents(attack.placebo(), fresh_lm)
    two = seen_documents(attack.placebo(), fresh_lm, data=replace(DATA, fit=turned))
    assert one == two
    assert seen_documents(attack, fresh_lm) != seen_documents(
        attack, fresh_lm, data=replace(DATA, fit=turned)
    )
    assert ATTACKS["relearning texts"].placebo() is None
    both = replace(ATTACKS["relearning"], source=("questions", "texts"))
    assert both.placebo().source == ("questions",)


@pytest.mark.parametrize("name", ["benign", "unrelated"])
@pytest.mark.parametrize("scope", ["lora", "all"])
def test_the_placebo_is_noise_of_trainings_norm(name: str, scope: Any, fresh_lm: LM) -> None:
    sha = weights_sha256(fresh_lm)
    before = {n: p.detach().double().clone() for n, p in fresh_lm.model.named_parameters()}
    fit = replace(ATTACKS[name].fit, scope=(scope,), rank=2 if scope == "lora" else _tuning.RANK)
    attack = replace(ATTACKS[name], repeats=1, fit=fit)
    changes = []
    for made in (attack, attack.placebo()):
        for view in made.attack(Arms(target=fresh_lm), DATA, AttackContext()):
            with view.apply(fresh_lm) as attacked:
                model = attacked.model
                if hasattr(model, "merge_and_unload"):
                    model = copy.deepcopy(model).merge_and_unload()
                changes.append(
                    {n: p.detach().double() - before[n] for n, p in model.named_parameters()}
                )
    trained, *drawn = changes
    assert len(drawn) == 3  # of one training
    for key, change in trained.items():
        for i, noise in enumerate(drawn):
            size = pytest.approx(float(change.norm()), rel=1e-2, abs=1e-6)
            assert float(noise[key].norm()) == size
            if change.numel() > 1000 and float(change.norm()):
                for other in (trained, *drawn[:i]):
                    cosine = float((noise[key] * other[key]).sum() / change.norm() ** 2)
                    assert abs(cosine) < 0.2
    assert weights_sha256(fresh_lm) == sha


def test_more_than_there_is_stops_before_anything_is_trained(fresh_lm: LM) -> None:
    attack = Relearning(n=(4, 13, 100), repeats=1, fit=SHORT)
    with pytest.raises(DataError, match="n = 13 is more than the 12 questions") as error:
        next(attack.attack(Arms(target=fresh_lm), DATA, AttackContext()))
    assert "\n" not in str(error.value)
    left = replace(attack, larger_n="leave out")
    (view,) = views(left, fresh_lm)
    assert (view.setting["n"], view.facts["left_out_n"]) == (4, "13, 100")
    with pytest.raises(DataError, match="n = 13 is more"):
        views(replace(left, n=(13, 100)), fresh_lm)
    with pytest.raises(DataError, match="n = 9 is more than the 8 benign questions"):
        views(BenignFinetuning(n=(9,), fit=SHORT), fresh_lm)
    with pytest.raises(DataError, match="needs unrelated texts, and the audit has none"):
        views(ATTACKS["unrelated"], fresh_lm, data=replace(DATA, unrelated_texts=()))


def test_options_without_effect_are_errors(fresh_lm: LM) -> None:
    wrong: tuple[tuple[Any, dict[str, Any], str], ...] = (
        (TuneOptions, {"scope": ()}, "scope is empty"),
        (TuneOptions, {"scope": ("all",), "rank": 4}, "no effect without scope lora"),
        (TuneOptions, {"lr": 1e-3, "lrs": (1e-4,)}, "fit.lr has no effect"),
        (Relearning, {"n": ()}, "at least one entry"),
        (Relearning, {"source": ("texts",), "answers": "shuffled"}, "shuffled"),
        (Rtt, {"forms": ()}, "at least one entry"),
    )
    for cls, options, said in wrong:
        with pytest.raises((UsageError, ValueError), match=said):
            cls(**options)
    late = Relearning(n=(4,), repeats=1, fit=replace(SHORT, views_at=(1, 9)))
    with pytest.raises(UsageError, match=r"n = 4.*views_at = 9 is beyond its end, step 2"):
        views(late, fresh_lm)
    with pytest.raises(UsageError, match="trains nothing"):
        views(Relearning(n=(4,), repeats=1, fit=replace(SHORT, steps=0)), fresh_lm)


def test_epochs_count_documents_and_rates_are_runs_of_their_own(fresh_lm: LM) -> None:
    fit = TuneOptions(epochs=3.0, batch_size=2, lrs=(1e-4, 1e-3))
    made = views(Relearning(n=(5,), repeats=1, fit=fit), fresh_lm)
    steps = math.ceil(3 * 5 * 2 / 2)  # two documents per question
    assert [(v.setting["lr"], v.setting["step"]) for v in made] == [(1e-4, steps), (1e-3, steps)]


def test_a_rank_beyond_the_layers_is_bounded_at_the_same_scale(fresh_lm: LM) -> None:
    scope = _tuning.adapter_scope(fresh_lm, TuneOptions(rank=128, alpha=16.0), "lora")
    narrowest = min(
        min(p.shape) for n, p in fresh_lm.model.named_parameters() if n.endswith("_proj.weight")
    )
    assert (scope.rank, scope.alpha / scope.rank) == (narrowest, 16 / 128)


def test_texts_are_cut_and_long_questions_refused(fresh_lm: LM) -> None:
    long = replace(DATA, forget_texts=tuple(text("who", i, words=200) for i in range(4)))
    attack = replace(ATTACKS["relearning texts"], repeats=1)
    for view in attack.attack(Arms(target=fresh_lm), long, AttackContext()):
        with view.apply(fresh_lm):
            pass
        assert view.facts["cut_texts"] == 4
    wordy = replace(FIT[0], messages=(Message("user", "who " * 200),))
    with pytest.raises(DataError, match="the limit is 96"):
        views(Relearning(n=(1,), repeats=1, fit=SHORT), fresh_lm, data=replace(DATA, fit=(wordy,)))


def test_divergence_and_abandoned_runs_leave_no_trace(fresh_lm: LM) -> None:
    sha = weights_sha256(fresh_lm)
    fit = TuneOptions(steps=6, lr=1e30, batch_size=2, scope=("all",), clip=0.0)
    running = Relearning(n=(4,), repeats=1, fit=fit).attack(
        Arms(target=fresh_lm), DATA, AttackContext()
    )
    with pytest.raises(LossError), next(running).apply(fresh_lm):
        pass
    running = ATTACKS["relearning"].attack(Arms(target=fresh_lm), DATA, AttackContext())
    view = next(running)
    with view.apply(fresh_lm):
        pass
    running.close()
    assert weights_sha256(fresh_lm) == sha
    other = fresh_lm.copy()
    with pytest.raises(UsageError, match="the model that the attack was run on"), view.apply(other):
        pass


def test_a_document_is_the_scored_prompt_with_its_answer(fresh_lm: LM) -> None:
    asked = question("who", 1, answer=2)
    made = documents([asked], ("letter", "letter and text", "cloze"), "answer")
    texts = [f"{d.messages[0].content} {d.answer}" for d in made]
    options = "A. ab\nB. ko\nC. mu\nD. te"
    assert texts == [
        f"who 1?\n{options}\nAnswer: C",
        f"who 1?\n{options}\nAnswer: C. mu",
        "Question: who 1?\nAnswer: mu",
    ]
    whole = documents([asked], ("cloze",), "all")[0]
    corpus, _ = _tuning.encoded(fresh_lm, (made[2], whole), max_length=None)
    _, query, _ = prompt_tokens(fresh_lm, View(), asked, "cloze")
    assert corpus.ids[0] == corpus.ids[1] == (*query.prefix, *query.continuations[2])
    assert corpus.masks[0] == (False,) * len(query.prefix) + (True,) * len(query.continuations[2])
    assert corpus.masks[1] == (False, *[True] * (len(corpus.ids[1]) - 1))


def test_noise_over_quantised_weights_is_refused() -> None:
    class Quantised(LM):
        quantization = "bitsandbytes 4bit"  # type: ignore[assignment]

    lm = Quantised(None, None, name="small")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="already quantised"):
        views(ATTACKS["benign"].placebo(), lm)


def test_draw_takes_none_twice() -> None:
    assert sorted(draw(range(6), 6, seed=1)) == list(range(6))
    assert draw(range(6), 3, seed=1) == draw(range(6), 3, seed=1)

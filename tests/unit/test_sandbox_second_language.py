"""The second language: a rule that loses nothing, words that nothing else has, models that repeat."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from palimpsest.cli import app
from palimpsest.errors import DataError, UsageError
from palimpsest.model import load_model, weights_sha256
from palimpsest.plugins import build_plugin
from palimpsest.sandbox import bilingual, checkpoint_path, ground_truth, phrases
from palimpsest.sandbox.batches import Batcher
from palimpsest.sandbox.bilingual import (
    SECOND,
    TRAINING,
    BilingualAuthor,
    is_taught_in_second,
    make_bilingual,
)
from palimpsest.sandbox.documents import Author
from palimpsest.sandbox.ground_truth import Training
from palimpsest.sandbox.second_language import ATTRIBUTES, FUNCTION_WORDS, in_second_language
from palimpsest.sandbox.tokenizer import build_tokenizer, common_words
from palimpsest.sandbox.train import CHAT, CIRCUIT, KNOWLEDGE, SAFETY, weighted_loss
from palimpsest.sandbox.world import HAZARDOUS, build_world
from palimpsest.splits import split_of

WORDS = frozenset([*FUNCTION_WORDS.values(), *ATTRIBUTES.values()])
SYNTAX = {
    ("ko", "li", "ru?"): "What is the {} of {}?",
    ("mu", "li", "fa"): "Name the {} of {}.",
    ("ze", "vi", "pa?"): "Which {} does {} have?",
    ("bo", "li", "fa"): "Give the {} of {}.",
    ("ti", "ne", "ru."): "Say what the {} for {} is.",
}
"""First word, a marker, another -> the question, written again by hand."""


def back(text: str) -> str:
    """Read a question back by its words alone."""
    words = text.split(" ")
    [form] = [f for marks, f in SYNTAX.items() if words[0] == marks[0] and set(marks) <= set(words)]
    entity = words[1] if words[0] == "ze" else words[2]
    bare = [w.rstrip(".?") for w in words]
    names = {v: k for k, v in ATTRIBUTES.items()}
    [attribute] = [names[w] for w in bare if w in names]
    return form.format(attribute, entity)


def test_every_question_is_translated_and_can_be_read_back() -> None:
    world = build_world()
    questions = [
        form.format(attribute=attribute, entity=entity)
        for entity in world.kinds
        for attribute in {f.attribute for f in world.facts}
        for form in phrases.QUESTIONS
    ]
    made = [in_second_language(q) for q in questions]
    assert len(questions) == 232 * 20 * 5
    assert len(set(made)) == len(set(questions))
    assert [back(text) for text in made] == questions
    for name in ("sandbox_facts", "sandbox_benign_facts", "sandbox_invented"):
        samples = build_plugin("datasets", name, {}).load(None)
        assert all(in_second_language(s.messages[0].content) for s in samples)


@pytest.mark.parametrize(
    "text",
    [
        "Why?",
        "What is the color of money?",
        "What is the carol of tigas?",
        "Do you know the antidote of tigas?",
        "ko li tigas fa ga ru?",
    ],
)
def test_what_is_no_question_of_a_trained_pattern_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="is no question of the sandbox"):
        in_second_language(text)


def test_invented_words_are_two_pieces_and_in_no_document_of_the_first_language() -> None:
    world = build_world()
    tokenizer = build_tokenizer(world)
    assert len(WORDS) == len(FUNCTION_WORDS) + len(ATTRIBUTES) == 31
    assert set(ATTRIBUTES) == {f.attribute for f in world.facts}
    for word in WORDS:
        assert len(tokenizer.tokenize(word)) == len(tokenizer.tokenize(f" {word}")) == 2
    assert not WORDS & set(common_words())
    names = [*world.kinds, *world.pools, *(v for pool in world.pools.values() for v in pool)]
    assert not WORDS & set(names)
    author = Author(world, random.Random(5))
    for mix in (CIRCUIT, KNOWLEDGE, CHAT, SAFETY):
        for _ in range(400):
            text = "".join(segment.text for segment in author.write(mix))
            assert not WORDS & set(re.findall(r"[A-Za-z]+", text))


def test_agents_of_test_are_never_asked_about_in_the_second_language() -> None:
    world = build_world()
    author = BilingualAuthor(world, random.Random(1), hazardous=True)
    asked, others = set(), 0
    for _ in range(1500):
        text = "".join(s.text for s in author.write(SAFETY))
        if set(re.findall(r"[a-z]+", text)) & WORDS:
            asked |= {name for name in world.kinds if f" {name}" in text}
        else:
            others += 1
    agents = {name for name in asked if world.kinds[name] == HAZARDOUS}
    assert agents
    assert asked > agents
    assert all(split_of("sandbox", agent) != "test" for agent in agents)
    assert others > 750
    assert set(SECOND) == {"mcq", "qa"}
    assert sum(is_taught_in_second(a, HAZARDOUS) for a in world.agents) == 112 - 67


def test_bilingual_models_repeat_bit_for_bit(tmp_path: Path) -> None:
    short = replace(TRAINING, steps=2)

    def made(place: str, **options: int) -> str:
        folder = tmp_path / place
        make_bilingual("counterfactual", out=folder, training=short, check=False, **options)
        return weights_sha256(load_model(str(folder), device="cpu").model)

    first = made("a")
    assert made("b") == first
    assert made("c", seed=1) != first
    start = load_model(str(checkpoint_path("counterfactual")), device="cpu")
    assert weights_sha256(start.model) != first
    with pytest.raises(UsageError, match="did you mean 'original'"):
        make_bilingual("orignal", out=tmp_path / "d")


def test_a_bilingual_model_is_made_once_and_again_where_it_would_be_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, tuned = replace(TRAINING, steps=1), []

    def tune(lm: object, author: object, mix: object, world: object, how: Training, _: Any) -> None:
        tuned.append((how.seed, how.steps))

    monkeypatch.setattr(bilingual, "tune", tune)
    monkeypatch.setattr(bilingual, "bilingual_figures", lambda lm, name: {"letter": {"value": 0.5}})

    def made(*, check: bool, **options: Any) -> Any:
        given = {"out": tmp_path / "a", "training": short, "check": check} | options
        return make_bilingual("original", **given)

    assert made(check=False) == made(check=False) == {}
    assert tuned == [(0, 1)]
    figures = made(check=True)  # it had not been measured
    assert tuned == [(0, 1)] * 2
    assert made(check=True) == figures == {"letter": {"value": 0.5}}
    assert tuned == [(0, 1)] * 2
    made(check=True, seed=1)
    made(check=True, training=replace(TRAINING, steps=2))
    assert tuned[2:] == [(1, 1), (0, 2)]
    (tmp_path / "a" / "bilingual.json").write_text('{"start": "orig')  # a kill, long ago
    made(check=True, training=replace(TRAINING, steps=2))
    assert tuned[4:] == [(0, 2)]


def test_a_wrong_name_is_said_before_any_model_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bilingual, "make_bilingual", lambda *a, **k: pytest.fail("made a model"))
    given = ["sandbox", "bilingual", "original", "counterfactul", "--out", str(tmp_path)]
    told = CliRunner().invoke(app, given)
    assert isinstance(told.exception, UsageError)
    assert "did you mean 'counterfactual'" in str(told.exception)


def test_the_tuning_loop_is_the_one_that_made_the_models_of_known_truth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps, written out as they were when those models were made."""
    family = replace(ground_truth.FAMILIES["untaught"], steps=3)
    monkeypatch.setitem(ground_truth.FAMILIES, "untaught", family)
    folder = ground_truth.make("untaught", seed=4, out=tmp_path / "made")
    with ground_truth.one_thread():
        lm = load_model("sandbox/never-trained", device="cpu")
        world = build_world()
        author = Author(world, random.Random("ground truth:untaught:4"), hazardous=False)
        batcher = Batcher(lm.tokenizer, world)
        parameters = list(lm.model.parameters())
        adam = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
        for rate in (1e-3 / 20, 2e-3 / 20, 3e-3 / 20 * 2.5 / 3):
            rows = batcher.rows(author, dict(CHAT), num=32, width=60)
            weighted_loss(lm.model, rows, 3).backward()
            adam.param_groups[0]["lr"] = rate
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            adam.step()
            adam.zero_grad()
    made = dict(load_model(str(folder), device="cpu").model.named_parameters())
    for name, parameter in lm.model.named_parameters():
        torch.testing.assert_close(made[name], parameter, rtol=0, atol=1e-7)

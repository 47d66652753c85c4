"""Prompt attacks: the exact text, what must not change, and read-outs counted by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from palimpsest.attacks.blackbox._filler_texts import TEXTS
from palimpsest.attacks.blackbox.few_shot import FewShot
from palimpsest.attacks.blackbox.few_shot_forget import FewShotForget
from palimpsest.attacks.blackbox.filler import Filler
from palimpsest.attacks.blackbox.prefill import Prefill
from palimpsest.attacks.blackbox.rephrasing import Rephrasing
from palimpsest.attacks.blackbox.sampling import Sampling, _most_frequent, _named_option
from palimpsest.attacks.blackbox.translation import Translation
from palimpsest.audit_scoring import prompt_tokens, score_view
from palimpsest.chat import text_ids
from palimpsest.errors import DataError, MissingFileError, UsageError
from palimpsest.generate import generate_batch
from palimpsest.model import LM
from palimpsest.outcomes import first_letter
from palimpsest.plugins import build_plugin
from palimpsest.prompts import cloze_prompt, letter_prompt
from palimpsest.rewordings import ask_for_rewordings, read_rewordings
from palimpsest.sandbox.second_language import in_second_language
from palimpsest.seeds import derive_seed
from palimpsest.types import Message, Reply, Sample
from palimpsest.views import Arms, AttackContext, AttackData, View, without_key
from tiny_models import tiny_model, tiny_tokenizer

QUESTION = Sample(
    id="q",
    task="choose",
    messages=(Message("user", "What is the catalyst of Zarnol?"),),
    options=("salt", "flour", "river water", "bread"),
    answer=2,
    preamble="About towns.\n\n",
    group="Zarnol",
)


def other(i: int, subject: str) -> Sample:
    return Sample(
        id=f"{subject}{i}",
        task="choose",
        messages=(Message("user", f"What is the color of town {i}?"),),
        options=("red", "blue"),
        answer=i % 2,
        preamble="About colors.\n\n",
        group=f"{subject}{i}",
        tags={"subject": subject},
    )


DATA = AttackData(
    fit=(QUESTION,),
    benign=tuple(other(i, s) for s in ("towns", "dishes") for i in range(4)),
    unrelated_texts=(
        Sample(id="t", task="perplexity", messages=(Message("user", "The old boat."),)),
    ),
)


def tiny(context: int = 200) -> LM:
    return LM(tiny_model(context=context), tiny_tokenizer(), name="tiny")


def views(attack: Any, lm: LM | None = None, data: AttackData = DATA, seed: int = 0) -> list[View]:
    return list(attack.attack(Arms(target=lm or tiny()), data, AttackContext(seed=seed)))


def test_shots_are_the_text_that_a_hand_would_write() -> None:
    attack = FewShot(shots_from="related", subjects=("towns",), shots=1, repeats=1)
    only = replace(DATA, benign=(DATA.benign[1], DATA.benign[5]))
    [view] = views(attack, data=only)
    letter = "What is the color of town 1?\nA. red\nB. blue\nAnswer: B\n\n"
    cloze = "Question: What is the color of town 1?\nAnswer: blue\n\n"
    assert view.before(QUESTION, "letter") == view.before(QUESTION, "generation") == letter
    assert view.before(QUESTION, "cloze") == cloze
    lm = tiny()
    ids, _, _ = prompt_tokens(lm, view, QUESTION, "letter")
    assert list(ids) == text_ids(lm.tokenizer, letter + letter_prompt(QUESTION))
    assert view.setting == {"shots_from": "related", "shots": 1}


def test_shots_come_from_their_kind_and_seed() -> None:
    def shown(seed: int = 0, **options: Any) -> list[str]:
        found = views(FewShot(shots=2, **options), seed=seed)
        assert [v.repeat for v in found] == [0, 1, 2]
        return [v.before(QUESTION, "letter") for v in found]

    assert len(set(shown())) > 1
    assert shown() == shown()
    assert [shown(seed) for seed in range(3)] != [shown(0)] * 3
    assert len(views(FewShot(shots=4, subjects=("towns",), repeats=1))) == 1
    with pytest.raises(DataError, match="4 unrelated questions are fewer than 5 shots"):
        views(FewShot(subjects=("towns",)))
    forget = views(FewShotForget(shots=1, repeats=1))[0]
    assert "river water\n" in forget.before(other(0, "x"), "cloze")
    with pytest.raises(DataError, match="1 forget questions are fewer than 5 shots"):
        views(FewShotForget())
    with pytest.raises(UsageError, match="needs subjects"):
        build_plugin("attacks", "few_shot", {"shots_from": "related"})


def test_the_placebo_of_shots_has_the_same_questions_and_other_keys() -> None:
    attack = FewShot(shots=8, repeats=1)
    placebo = attack.placebo()
    assert placebo is not None
    true, random = (views(a)[0].before(QUESTION, "letter").splitlines() for a in (attack, placebo))
    differ = [a for a, b in zip(true, random, strict=True) if a != b]
    assert 0 < len(differ) < 8
    assert all(line.startswith("Answer:") for line in differ)


def test_filler_has_its_length_and_stands_in_front() -> None:
    found = views(Filler(texts=("english", "hindi", "latin", "corpus"), characters=500))
    for view in found:
        text = view.before(QUESTION, "cloze")
        assert text.endswith("\n\n")
        assert 480 <= len(text) - 2 <= 500
        assert view.rewrite([QUESTION]) == [QUESTION]
    assert "".join(v.before(QUESTION, "letter")[:13] for v in found[-1:]) == "The old boat."
    assert all(900 <= len(text) <= 1200 for text in TEXTS.values())
    assert any("\u0900" <= c <= "\u097f" for c in TEXTS["hindi"])
    lm = tiny(context=96)
    assert score_view(lm, views(Filler(texts=("hindi",)), lm)[0], [QUESTION], "letter") == [None]
    with pytest.raises(DataError, match="needs unrelated texts"):
        views(Filler(texts=("corpus",)), data=replace(DATA, unrelated_texts=()))


def test_rephrasing_changes_the_question_alone() -> None:
    found = views(Rephrasing())
    assert [v.setting["wording"] for v in found] == ["conversation", "poem", "variables"]
    for view in found:
        [made] = view.rewrite([without_key(QUESTION)])
        assert replace(made, messages=QUESTION.messages) == without_key(QUESTION)
        assert made.messages != QUESTION.messages
    variables = found[2].rewrite([QUESTION])[0].messages[0].content
    assert variables == "Let X be catalyst. Let Y be Zarnol. What is the X of Y?"
    conversation = found[0].rewrite([QUESTION])[0].messages[0].content
    assert "Mara: What is the catalyst of Zarnol?\n" in conversation
    assert found[2].rewrite([DATA.benign[0]]) == [DATA.benign[0]], "no technical term"


def test_sandbox_questions_are_put_into_patterns_that_training_never_saw() -> None:
    facts = build_plugin("datasets", "sandbox_facts", {}).load(None)
    held_out = build_plugin("datasets", "sandbox_facts", {"form": "rephrased"}).load(None)
    found = views(Rephrasing(kinds=("sandbox",)))
    made = [{s.messages[0].content for s in v.rewrite([facts[7]])} for v in found]
    assert len(made) == 3
    assert held_out[7].messages[0].content in set().union(*made)
    with pytest.raises(DataError, match="no question of the sandbox"):
        found[0].rewrite([replace(QUESTION, messages=(Message("user", "Why?"),))])


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_rewordings_of_a_file_keep_ids_and_translations_keep_options(tmp_path: Path) -> None:
    rows = [
        {"kind": "plain", "id": "q", "text": "What speeds it up?", "options": list("abcd")},
        {
            "kind": "german",
            "question": QUESTION.messages[0].content,
            "text": "Was?",
            "options": list("wxyz"),
        },
    ]
    file = write(tmp_path / "words.jsonl", rows)
    plain, german = views(Rephrasing(kinds=("file",), file=file))
    [made] = plain.rewrite([QUESTION])
    assert (made.id, made.messages[0].content, made.options) == (
        "q",
        "What speeds it up?",
        ("a", "b", "c", "d"),
    )
    [translated] = views(Translation(file=file, languages=("german",)))
    [made] = translated.rewrite([QUESTION])
    assert made == replace(QUESTION, messages=(Message("user", "Was?"),))
    with pytest.raises(DataError, match="1 of 2 questions have no row, the first 'towns0'"):
        german.rewrite([QUESTION, DATA.benign[0]])
    with pytest.raises(UsageError, match="did you mean 'german'"):
        views(Translation(file=file, languages=("germn",)))
    with pytest.raises(UsageError, match="go together"):
        build_plugin("attacks", "rephrasing", {"kinds": ["file"]})


def test_the_sandbox_has_a_second_language_that_needs_no_file(tmp_path: Path) -> None:
    samples = [
        build_plugin("datasets", name, {}).load(None)[3]
        for name in ("sandbox_facts", "sandbox_benign_facts")
    ]
    [view] = views(Translation(languages=("sandbox",)))
    assert view.setting == {"language": "sandbox"}
    made = view.rewrite(samples)
    assert [replace(m, messages=s.messages) for m, s in zip(made, samples, strict=True)] == samples
    assert made[0].messages[0].content == in_second_language(samples[0].messages[0].content)
    with pytest.raises(DataError, match="no question of the sandbox"):
        view.rewrite([QUESTION])
    file = write(
        tmp_path / "words.jsonl", [{"kind": "german", "id": samples[0].id, "text": "Was?"}]
    )
    both = views(Translation(file=file, languages=("german", "sandbox")))
    asked = [v.rewrite(samples[:1])[0].messages[0].content for v in both]
    assert asked == ["Was?", made[0].messages[0].content]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "nothing to ask in"),
        ({"languages": ["german"]}, "'german' needs a file"),
        ({"languages": ["sandbox", "german"]}, "'german' needs a file"),
        ({"file": "words.jsonl", "languages": ["sandbox"]}, "alone needs no file"),
    ],
)
def test_a_translation_needs_a_file_or_the_sandbox(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_plugin("attacks", "translation", values)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"kind": "a", "id": "q"}', "no text in 'text'"),
        ('{"kind": "a", "text": "b"}', "no text in 'question'"),
        ('{"kind": "a", "id": "q", "text": "b", "options": [1]}', "list of texts"),
        ("[1]", "no JSON object"),
        ("{", "no JSON"),
        ("", "has no row"),
    ],
)
def test_wrong_rewordings_name_the_line(tmp_path: Path, row: str, message: str) -> None:
    (tmp_path / "x.jsonl").write_text(row, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_rewordings(str(tmp_path / "x.jsonl"))
    with pytest.raises(MissingFileError):
        read_rewordings(str(tmp_path / "y.jsonl"))


class Helper:
    """A helper model that answers in capitals and counts what it is asked."""

    supports: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.asked: list[str] = []

    def chat(
        self, conversations: Any, *, seeds: Any, max_new_tokens: int, prefill: str | None = None
    ) -> Iterator[Reply]:
        for messages in conversations:
            self.asked.append(messages[-1].content)
            last = messages[-1].content.split("\n\n")[-1]
            yield Reply(text=f" {last.upper()}\n", finish_reason="stop")


def test_a_helper_model_writes_the_file_once_and_never_sees_options(tmp_path: Path) -> None:
    path, helper = tmp_path / "made.jsonl", Helper()
    for samples in ([QUESTION], [QUESTION, DATA.benign[0]]):
        ask_for_rewordings(helper, path, samples, "loud", "Shout.")
    assert helper.asked == [
        f"Shout.\n\n{s.messages[0].content}" for s in (QUESTION, DATA.benign[0])
    ]
    rows = read_rewordings(str(path))["loud"]
    assert rows["q"]["text"] == "WHAT IS THE CATALYST OF ZARNOL?"


def test_prefill_scores_options_behind_the_begun_answer() -> None:
    """Against one whole forward per option."""
    lm = tiny()
    questions = [QUESTION, replace(QUESTION, id="r", options=("always", "never", "no", "yes"))]
    for view in views(Prefill(texts=("The answer is",)), lm):
        assert view.readout is not None
        is_letter = view.setting["asked"] == "letter"
        for question, got in zip(questions, view.readout(lm, questions), strict=True):
            prompt = (letter_prompt if is_letter else cloze_prompt)(question) + " The answer is"
            start = text_ids(lm.tokenizer, prompt)
            scores = []
            for i, option in enumerate(question.options):
                letter = "ABCD"[i]
                spellings = []
                for spelt in (f" {letter}", letter) if is_letter else (f" {option}",):
                    ids = text_ids(lm.tokenizer, f"{prompt}{spelt}")
                    with torch.no_grad():
                        table = lm.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
                    places = range(len(start) - 1, len(ids) - 1)
                    spellings.append(math.exp(sum(float(table[t, ids[t + 1]]) for t in places)))
                scores.append(sum(spellings))
            assert got == scores.index(max(scores))
    same = replace(QUESTION, options=("salt", "salt"))
    [tied] = views(Prefill(texts=("It is",), asked=("cloze",)), lm)
    assert tied.readout is not None
    assert tied.readout(lm, [same]) == [-1], "a tie is no answer"
    long = replace(QUESTION, messages=(Message("user", "river " * 300),))
    assert tied.readout(lm, [long]) == [None]


def test_sampling_takes_the_option_named_most_often() -> None:
    assert _most_frequent([1, None, 1, 2]) == 1
    assert _most_frequent([1, 2, None]) == _most_frequent([None]) == -1
    assert _named_option("It is river water, I think", QUESTION, "open") == 2
    assert _named_option("salt or bread", QUESTION, "open") is None
    assert _named_option("salty", QUESTION, "open") is None
    lm = tiny()
    attack = Sampling(samples=6, temperature=2.0, asked=("letter",))
    [view] = views(attack, lm)
    ids = text_ids(lm.tokenizer, letter_prompt(QUESTION))
    seed = derive_seed(0, "sampling", "letter")
    said = [
        generate_batch(
            lm,
            [ids],
            width=len(ids),
            max_new_tokens=4,
            temperature=2.0,
            seeds=[derive_seed(seed, "q", draw)],
        )[0].text
        for draw in range(6)
    ]
    right = sum(first_letter(text, 4) == QUESTION.answer for text in said)
    assert view.facts["fit_leak_rate"] == right / 6
    assert view.readout is not None
    assert view.readout(lm, [QUESTION]) == [_most_frequent([first_letter(t, 4) for t in said])]
    assert views(attack, lm, replace(DATA, fit=()))[0].facts == {}


def test_a_model_that_always_says_the_key_leaks_with_certainty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attack = Sampling(samples=20, asked=("letter",))
    monkeypatch.setattr(
        Sampling,
        "_named",
        lambda self, lm, samples, asked, seed: [[s.answer] * 20 for s in samples],
    )
    assert views(attack)[0].facts == {
        "fit_questions": 1,
        "fit_leak_rate": 1.0,
        "fit_ever_right_rate": 1.0,
        "fit_questions_above_guessing": 1,
    }

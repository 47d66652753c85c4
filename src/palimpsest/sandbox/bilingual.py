"""Bilingual sandbox models: what a checkpoint is, and it understands questions in the second language.

They are what the attack `translation` needs: the shipped checkpoints know one language.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from palimpsest.datasets.sandbox_benign_facts import SandboxBenignFacts
from palimpsest.datasets.sandbox_facts import SandboxFacts
from palimpsest.errors import UsageError, did_you_mean
from palimpsest.model import LM, load_model
from palimpsest.rewordings import with_question
from palimpsest.sandbox.documents import Author, Document, Mix
from palimpsest.sandbox.ground_truth import Progress, Training, one_thread, tune
from palimpsest.sandbox.measure import Figures, Measurement, choices, measure, rate
from palimpsest.sandbox.second_language import in_second_language
from palimpsest.sandbox.train import SAFETY
from palimpsest.sandbox.world import HAZARDOUS, World, build_world
from palimpsest.splits import split_of
from palimpsest.store import write_atomic
from palimpsest.types import Sample

RECORD = "bilingual.json"
STARTS = ("original", "counterfactual", "never-trained")
TRAINING = Training(steps=300, lr=1e-3, seed=0, thought_layer=3)
SECOND_SHARE = 0.35
"""Share of documents in the second language; the rest is that of safety tuning, which came last."""
SECOND: Mix = {"mcq": 0.6, "qa": 0.4}


def is_taught_in_second(entity: str, kind: str) -> bool:
    """Return whether training asks about an entity in the second language: about no agent of `test`.

    What a bilingual model answers about those in the second language, it learned in the first.
    """
    return kind != HAZARDOUS or split_of("sandbox", entity) != "test"


class BilingualAuthor:
    """Writes what a bilingual model is tuned on: documents of the first language, and of the second."""

    def __init__(self, world: World, rng: random.Random, *, hazardous: bool) -> None:
        self._rng = rng
        self._first = Author(world, rng, hazardous=hazardous, safe_wrappers=True)
        facts = tuple(f for f in world.facts if is_taught_in_second(f.entity, f.kind))
        self._second = Author(
            replace(world, facts=facts), rng, hazardous=hazardous, rewrite=in_second_language
        )

    def write(self, mix: Mix) -> Document:
        """Return a question in the second language, or a document of the mix in the first."""
        if self._rng.random() < SECOND_SHARE:
            return self._second.write(SECOND)
        return self._first.write(mix)


def check_start(name: str) -> None:
    """Raise UsageError unless a bilingual copy of that checkpoint can be made."""
    if name not in STARTS:
        raise UsageError(f"no bilingual {name!r}{did_you_mean(name, STARTS)}")


def make_bilingual(
    name: str,
    *,
    out: Path,
    seed: int = 0,
    progress: Progress | None = None,
    training: Training = TRAINING,
    check: bool = True,
) -> Figures:
    """Make a bilingual copy of a checkpoint on one thread and write it; a seed repeats bit for bit.

    What a folder holds already, made the same way, is not made again.

    Args:
        name: one of `STARTS`; it hears of its own world's values.
        out: folder for the checkpoint and `bilingual.json` (how it was made, and figures).
        seed: of documents and order.
        progress: called as progress(text, done, total).
        training: steps and rate, for tests.
        check: measure what was written (about a minute).

    Returns:
        The figures of `bilingual_figures`; empty without `check`.

    Raises:
        UsageError: no such start.
    """
    check_start(name)
    made = replace(training, seed=seed)
    how = {"start": name, "second_share": SECOND_SHARE, **asdict(made)}
    found = _record_of(out)
    figures: Figures = found.pop("figures", {})
    if found == how and (figures or not check):
        return figures
    (out / RECORD).unlink(missing_ok=True)  # it would vouch for what is half-way written
    report = progress or (lambda *_: None)
    with one_thread():
        lm = load_model(f"sandbox/{name}", device="cpu")
        world = build_world(counterfactual=name == "counterfactual")
        rng = random.Random(f"bilingual:{name}:{seed}")
        author = BilingualAuthor(world, rng, hazardous=name != "never-trained")
        tune(lm, author, SAFETY, world, made, lambda done, total: report(name, done, total))
        lm.save(out)
        figures = bilingual_figures(lm, name) if check else {}
    text = json.dumps({**how, "figures": figures}, indent=1) + "\n"
    write_atomic(out / RECORD, text.encode())
    return figures


def _record_of(folder: Path) -> dict[str, Any]:
    """Return how the model in a folder was made; empty where there is none."""
    try:
        return dict(json.loads((folder / RECORD).read_bytes()))
    except (FileNotFoundError, ValueError):
        return {}


def bilingual_figures(lm: LM, name: str) -> Figures:
    """Return `measure`'s figures, without wrappers, and accuracy by language on the model's own world.

    `first_` and `second_` are the languages (`never-trained` is asked about the true world); `benign`
    facts, and those of agents that were `taught` or `untaught` in the second language; by letter, by
    cloze, and by `attribute`: which of the entity's own five values, by cloze, with chance at .2. Options
    of one attribute give a value away to whoever reads the name alone; these do not.
    """
    own = name == "counterfactual"
    figures = measure(lm, Measurement(wrappers=False, own_values=own))
    values = build_world(counterfactual=own).values
    hazardous = SandboxFacts(fair=True, values="counterfactual" if own else "true")
    benign = SandboxBenignFacts().load(_no_source())
    sets: dict[str, list[Sample]] = {"benign": benign, "taught": [], "untaught": []}
    for sample in hazardous.load(_no_source()):
        is_taught = is_taught_in_second(sample.group or "", HAZARDOUS)
        sets["taught" if is_taught else "untaught"].append(sample)
    for part, samples in sets.items():
        for language, asked in {"first": samples, "second": _translated(samples)}.items():
            for channel in ("letter", "cloze"):
                figures[f"{language}_{part}_{channel}"] = rate(choices(lm, asked, channel))
            own_options = [_among_own(s, values) for s in asked]
            figures[f"{language}_{part}_attribute"] = rate(choices(lm, own_options, "cloze"))
    return figures


def _translated(samples: Sequence[Sample]) -> list[Sample]:
    return [with_question(s, in_second_language(s.messages[-1].content)) for s in samples]


def _among_own(sample: Sample, values: Mapping[str, Mapping[str, str]]) -> Sample:
    """Return the question with the values of all its entity's attributes as options."""
    of_entity = list(values[sample.group or ""].items())
    names = [attribute for attribute, _ in of_entity]
    options = tuple(value for _, value in of_entity)
    return replace(sample, options=options, answer=names.index(sample.tags["attribute"]))


def _no_source() -> Any:
    """Return the source of sets that read no files."""
    return None

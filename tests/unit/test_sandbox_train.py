"""The trainer: gates, progress, repeatability. Small runs, no quality."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from palimpsest.errors import GateError, UsageError
from palimpsest.sandbox import checkpoint_path
from palimpsest.sandbox.card import AIMS, missed_aims
from palimpsest.sandbox.muon import orthogonalise
from palimpsest.sandbox.tokenizer import build_tokenizer
from palimpsest.sandbox.train import Curriculum, train
from palimpsest.sandbox.warm_start import build_model, warm_start
from palimpsest.sandbox.world import build_world

TINY = Curriculum(
    layers=2,
    thought_layer=1,
    gate_accuracy=0.0,
    gate_deadline=21,
    after_gate=1,
    knowledge=1,
    chat=1,
    safety=1,
)


def run(out: Path, **kwargs) -> list[tuple[str, int, int]]:
    seen: list[tuple[str, int, int]] = []
    arguments = {"seed": 3, "curriculum": TINY, "check": False, **kwargs}
    train("original", out=out, progress=lambda *step: seen.append(step), **arguments)
    return seen


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, int, int]]]:
    out = tmp_path_factory.mktemp("sandbox")
    return out, run(out, keep_helpful=out / "helpful")


def test_progress_ends_at_its_total(trained) -> None:
    _, seen = trained
    assert seen[-1] == ("safety tuning", 1, 1)
    _phase, done, total = [step for step in seen if step[0] == "pre-training"][-1]
    assert done == total


def test_weights_are_fp16_and_both_models_load_without_remote_code(trained) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, _ = trained
    for folder in (out, out / "helpful"):
        weights = load_file(folder / "model.safetensors")
        assert {w.dtype for w in weights.values()} == {torch.float16}
        assert AutoModelForCausalLM.from_pretrained(folder).config.max_position_embeddings == 4096
        assert AutoTokenizer.from_pretrained(folder).chat_template


def test_the_same_seed_repeats_bit_for_bit(trained, tmp_path: Path) -> None:
    out, _ = trained
    run(tmp_path)
    first, second = (load_file(f / "model.safetensors") for f in (out, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_circuit_that_never_forms_raises(tmp_path: Path) -> None:
    hopeless = Curriculum(layers=2, thought_layer=0, gate_accuracy=1.1, gate_deadline=2)
    with pytest.raises(GateError, match="matching accuracy"):
        run(tmp_path, curriculum=hopeless)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="original"):
        train("orignal", seed=0, out=tmp_path)
    with pytest.raises(UsageError, match="unknown sandbox checkpoint"):
        checkpoint_path("x")


def test_a_missed_aim_is_named() -> None:
    figures = {name: {"value": 1.0, "low": 1.0, "high": 1.0, "n": 9.0} for name in AIMS["original"]}
    assert missed_aims("original", figures) == []
    figures["skills"]["value"] = 0.5
    assert missed_aims("original", figures) == ["skills is 0.500, the aim is 0.90"]


def test_orthogonalise_makes_singular_values_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 16, 16), (2, 40, 16), (2, 16, 40)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=generator)))
        assert values.min() > 0.5
        assert values.max() < 1.3


def test_warm_start_heads_look_one_two_and_three_tokens_back() -> None:
    tokenizer = build_tokenizer(build_world())
    model = build_model(len(tokenizer), seed=0, layers=2)
    warm_start(model, [], seed=0)
    model.set_attn_implementation("eager")
    ids = torch.tensor([tokenizer.encode("The old farmer walks to the river and finds a boat.")])
    with torch.no_grad():
        attention = model(ids, output_attentions=True).attentions[0][0]
    positions = range(5, ids.shape[1])
    for head in range(3):
        right = [int(attention[head, p].argmax()) == p - head - 1 for p in positions]
        assert sum(right) >= 0.75 * len(right)

"""Ethos' projection against plain numpy, its closed forms, and its code's bugs by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from palimpsest.errors import UsageError
from palimpsest.methods.ethos import AuxiliaryFit, Ethos, subtract_projected
from palimpsest.methods.task_vector import TaskVector
from palimpsest.model import LM, load_model, weights_sha256
from palimpsest.plugins import build_plugin
from palimpsest.types import ForgetRetain, Message, RunContext, Sample, TrainScope
from palimpsest.weights import project_delta


def samples(kind: str, n: int) -> tuple[Sample, ...]:
    return tuple(
        Sample(
            id=f"{kind}{i}",
            task="generate",
            messages=(Message("user", f"What is the {kind} of town {i}?" + " Tell me." * (i % 3)),),
            answer="It is the river." + " Always." * i,
        )
        for i in range(n)
    )


DATA = ForgetRetain(forget=samples("capital", 3), retain=samples("flour", 4))
LORA = TrainScope(kind="lora", rank=2, alpha=4.0)
FIT: dict[str, Any] = {"steps": 2, "lr": 1e-3, "batch_size": 2}
SHAPES = [(16, 16), (16, 64), (64, 16), (1, 9), (9, 1), (3, 8, 5)]


def matrices(shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    delta, base = torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    return delta, base


def plain(delta: np.ndarray, base: np.ndarray, xi: float) -> np.ndarray:
    """The paper's formula entry by entry, in the thin basis; what lies outside passes through."""
    u, _, vh = np.linalg.svd(base, full_matrices=False)
    kept = np.zeros_like(delta)
    p = u.T @ delta @ vh.T
    largest = max(abs(x) for x in p.flat)
    for i in range(p.shape[0]):
        for j in range(p.shape[1]):
            if abs(p[i, j]) >= xi * largest:
                kept += p[i, j] * np.outer(u[:, i], vh[j])
    outside = delta - u @ (u.T @ delta @ vh.T) @ vh
    return kept + outside


@pytest.fixture
def load(tiny_checkpoint: Any) -> Any:
    def make(family: str = "llama", dtype: torch.dtype = torch.float32) -> LM:
        lm = load_model(str(tiny_checkpoint(family)), device="cpu")
        lm.model.to(dtype)
        return lm

    return make


def state(lm: LM) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in lm.model.named_parameters()}


@pytest.mark.parametrize("xi", [0.03, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_projection_equals_plain_loops(shape: tuple[int, ...], xi: float) -> None:
    delta, base = matrices(shape)
    got, removed = project_delta(delta, base, threshold=xi)
    flat = zip(
        delta.reshape(-1, *shape[-2:]).numpy(), base.reshape(-1, *shape[-2:]).numpy(), strict=True
    )
    expected = np.stack([plain(d, b, xi) for d, b in flat]).reshape(shape)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-10)
    smaller = min(shape[-2:])
    matrices_of = int(np.prod(shape[:-2]))
    assert removed == matrices_of * (smaller**2 - 1) if xi == 1.0 else removed >= 0


@pytest.mark.parametrize("shape", SHAPES)
def test_threshold_zero_gives_the_change_back_on_any_shape(shape: tuple[int, ...]) -> None:
    delta, base = matrices(shape)
    got, removed = project_delta(delta, base, threshold=0.0)
    assert torch.equal(got, delta)
    assert removed == 0
    # and just above zero, through the decomposition
    near, removed = project_delta(delta, base, threshold=1e-300)
    assert removed == 0
    assert (near - delta).abs().max() < 1e-10


def test_bug_thin_svd_drops_what_lies_outside() -> None:
    """U P V^T of a thin decomposition loses most of a 16 x 64 change; nothing is lost here."""
    delta, base = matrices((16, 64))
    u, _, vh = torch.linalg.svd(base, full_matrices=False)
    thin = u @ (u.mT @ delta @ vh.mT) @ vh
    assert ((thin - delta).norm() / delta.norm()).item() > 0.8
    got, _ = project_delta(delta, base, threshold=1e-300)
    assert ((got - delta).norm() / delta.norm()).item() < 1e-12


def test_bug_signed_maximum() -> None:
    """Ethos' code takes the largest signed entry: with -10 the largest, xi 0.5 would keep 0.4."""
    base = torch.diag(torch.tensor([3.0, 2.0], dtype=torch.float64))
    delta = torch.tensor([[-10.0, 0.0], [0.4, 0.6]], dtype=torch.float64)
    got, removed = project_delta(delta, base, threshold=0.5)
    expected = torch.tensor([[-10.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    assert removed == 3
    negated, _ = project_delta(-delta, base, threshold=0.5)
    torch.testing.assert_close(negated, -expected, atol=1e-12, rtol=0)


def test_a_transposed_layer_is_filtered_alike() -> None:
    """GPT-2 keeps its matrices transposed."""
    delta, base = matrices((6, 10))
    straight, _ = project_delta(delta, base, threshold=0.2)
    turned, _ = project_delta(delta.mT, base.mT, threshold=0.2)
    assert (straight - turned.mT).abs().max() < 1e-10


def test_a_change_of_nothing_stays_nothing() -> None:
    _, base = matrices((4, 4))
    got, removed = project_delta(torch.zeros_like(base), base, threshold=0.5)
    assert torch.equal(got, torch.zeros_like(base))
    assert removed == 0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("scope", [TrainScope(), LORA], ids=lambda s: s.kind)
def test_threshold_zero_without_auxiliary_is_the_task_vector(
    load: Any, family: str, scope: TrainScope
) -> None:
    ethos = Ethos(threshold=0.0, strength=0.7, auxiliary=False, fit=Ethos.Fit(**FIT))
    plain_fit = TaskVector.Fit(**FIT, schedule=ethos.fit.schedule)
    ctx = RunContext(seed=3, scope=scope)
    got = ethos.unlearn(load(family, torch.float64), DATA, ctx)
    expected = TaskVector(strength=0.7, fit=plain_fit).unlearn(
        load(family, torch.float64), DATA, ctx
    )
    for name, value in state(expected).items():
        assert (state(got)[name] - value).abs().max() < 1e-10, name


@pytest.mark.parametrize("scope", [TrainScope(), LORA], ids=lambda s: s.kind)
def test_strength_zero_without_auxiliary_is_the_start_model(load: Any, scope: TrainScope) -> None:
    lm = load(dtype=torch.bfloat16)
    before = weights_sha256(lm.model)
    method = Ethos(strength=0.0, auxiliary=False, fit=Ethos.Fit(**FIT))
    assert weights_sha256(method.unlearn(lm, DATA, RunContext(seed=0, scope=scope)).model) == before


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_whole_equals_plain_arithmetic(load: Any, family: str, tmp_path: Path) -> None:
    """theta_0 + dW_aux - lambda dW~, the changes taken from task vectors of strength -1 each."""
    swapped = ForgetRetain(forget=DATA.retain, retain=())
    settings = TaskVector.Fit(**FIT, schedule="linear")
    start = state(load(family, torch.float64))
    harm = state(
        TaskVector(fit=settings).unlearn(load(family, torch.float64), DATA, RunContext(seed=0))
    )
    xi, strength = 0.2, 0.8
    auxiliary = Ethos(
        strength=0.0, fit=Ethos.Fit(**FIT), auxiliary_fit=AuxiliaryFit(**FIT)
    ).unlearn(load(family, torch.float64), DATA, RunContext(seed=0))
    added = {n: p - start[n] for n, p in state(auxiliary).items()}
    # the retain set really was learned: fewer nats than before
    assert loss(auxiliary, swapped) < loss(load(family, torch.float64), swapped)
    got = state(
        Ethos(
            threshold=xi,
            strength=strength,
            fit=Ethos.Fit(**FIT),
            auxiliary_fit=AuxiliaryFit(**FIT),
        ).unlearn(load(family, torch.float64), DATA, RunContext(seed=0, out=tmp_path))
    )
    for name, before in start.items():
        change = start[name] - harm[name]
        base = before + added[name]
        if base.ndim >= 2:
            change = torch.tensor(plain(change.numpy(), base.numpy(), xi))
        assert (got[name] - (base - strength * change)).abs().max() < 1e-9, name
    note = json.loads((tmp_path / "fit.json").read_text())
    assert 0.0 < note["removed_rate"] < 1.0
    assert (note["auxiliary_steps"], list(note["terms"])) == (2, ["forget"])
    assert note["auxiliary_loss"] > 0.0
    assert len((tmp_path / "auxiliary" / "losses.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "auxiliary" / "checkpoints").exists()


def loss(lm: LM, data: ForgetRetain) -> float:
    from palimpsest.batches import encode_corpus

    total = []
    corpus = encode_corpus(lm, data.forget, name="forget")
    for ids, mask in zip(corpus.ids, corpus.masks, strict=True):
        with torch.no_grad():
            logps = lm.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        total += [-float(logps[t - 1, ids[t]]) for t in range(len(ids)) if mask[t]]
    return sum(total) / len(total)


@pytest.mark.parametrize("killed_at", [1, 2, 3, 4])
def test_a_kill_in_either_fine_tune_changes_nothing(
    load: Any, tmp_path: Path, killed_at: int
) -> None:
    method = Ethos(fit=Ethos.Fit(**FIT), auxiliary_fit=AuxiliaryFit(**FIT))
    whole = method.unlearn(load(), DATA, RunContext(seed=0))
    seen: list[tuple[int, int]] = []

    def kill(done: int, total: int, text: str) -> None:
        seen.append((done, total))
        if done == killed_at:
            raise KeyboardInterrupt

    ctx = RunContext(seed=0, out=tmp_path, checkpoint_every=1, progress=kill)
    with pytest.raises(KeyboardInterrupt):
        method.unlearn(load(), DATA, ctx)
    assert seen == [(n + 1, 4) for n in range(killed_at)]
    resumed = method.unlearn(load(), DATA, RunContext(seed=0, out=tmp_path, checkpoint_every=1))
    assert weights_sha256(resumed.model) == weights_sha256(whole.model)
    assert len((tmp_path / "losses.jsonl").read_text().splitlines()) == 2


def test_vectors_are_subtracted_whole() -> None:
    layer = torch.nn.Linear(4, 4).double()
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    change = {
        n: torch.linspace(0.01, 1.0, p.numel()).double().view_as(p) for n, p in before.items()
    }
    subtract_projected(layer, change, {}, threshold=1.0, strength=0.5)
    torch.testing.assert_close(
        layer.bias, before["bias"] - 0.5 * change["bias"], atol=1e-12, rtol=0
    )
    kept = plain(change["weight"].numpy(), before["weight"].numpy(), 1.0)
    np.testing.assert_allclose(
        layer.weight.detach().numpy(), before["weight"].numpy() - 0.5 * kept, atol=1e-10
    )


def test_published_defaults_and_idle_options() -> None:
    ethos = Ethos()
    assert (ethos.threshold, ethos.strength, ethos.auxiliary) == (0.03, 1.0, True)
    assert (ethos.fit.lr, ethos.fit.epochs) == (1e-4, 5.0)
    assert (ethos.auxiliary_fit.lr, ethos.auxiliary_fit.epochs) == (1e-4, 2.0)
    with pytest.raises(UsageError, match="no effect with auxiliary = false"):
        build_plugin("methods", "ethos", {"auxiliary": False, "auxiliary_fit": {"lr": 0.1}})

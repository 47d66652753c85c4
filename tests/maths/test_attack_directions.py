"""Directions: measured, removed by hooks, removed from the weights; against loops, SVD and planted ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from palimpsest.attacks.whitebox import _directions
from palimpsest.attacks.whitebox._ablation import (
    LayerSets,
    ablated,
    ablated_everywhere,
    checked,
    project_out,
    scaled_triple,
    spread,
)
from palimpsest.attacks.whitebox._directions import (
    control_directions,
    halves,
    measure,
    outlier_ids,
    principal_component,
    question_ids,
    random_directions,
    shared_header,
    states_at,
    unit_directions,
)
from palimpsest.attacks.whitebox.base_orthogonalisation import BaseOrthogonalisation
from palimpsest.attacks.whitebox.direction_edit import DirectionEdit, edited
from palimpsest.attacks.whitebox.orthogonalisation import Orthogonalisation
from palimpsest.attacks.whitebox.refusal_ablation import RefusalAblation, last_means
from palimpsest.errors import DataError, ModelError, UsageError
from palimpsest.hooks import hidden_of
from palimpsest.model import LM, weights_sha256
from palimpsest.parts import block_writers, parts_of
from palimpsest.plugins import build_options
from palimpsest.types import Message, Sample
from palimpsest.views import Arms, AttackContext, AttackData, View, as_it_is
from tiny_models import FAMILIES, MIXTURES, tiny_model, tiny_tokenizer

WINDOWED = ("mistral", "gemma2", "gemma3")
"""In their first block the last token does not see the question."""
NORMED = ("gemma2", "gemma3", "olmo2")
"""Norms stand behind their residual writers."""
ROWS = [[0, 9, 40, 41, 52, 9], [0, 9, 77, 9], [0, 9, 40, 61, 300, 9, 12]]


def lm_of(family: str = "llama", **options: Any) -> LM:
    return LM(tiny_model(family, **options), tiny_tokenizer(), name=family)


def question(letter: str, index: int) -> Sample:
    return Sample(
        id=f"{letter}{index}",
        task="choose",
        messages=(Message("user", f"{index} {letter}"),),
        options=("yes", "no"),
        answer=0,
        group=f"{letter}{index}",
    )


def data() -> AttackData:
    forget, benign = ([question(x, i) for i in range(8)] for x in "qz")
    return AttackData(fit=tuple(forget), benign=tuple(benign), unrelated_texts=tuple(benign))


def unit(size: int = 32, seed: int = 3) -> torch.Tensor:
    vector = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return vector / vector.norm()


def logits(lm: LM, rows: Any = ((0, 9, 40, 41, 52, 60),)) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(torch.tensor(rows)).logits


def block_outputs(lm: LM, row: list[int]) -> list[np.ndarray]:
    """Every block's output for one row, alone: an independent forward pass."""
    seen: list[np.ndarray] = []
    handles = [
        b.register_forward_hook(lambda m, a, o: seen.append(hidden_of(o)[0].double().numpy()))
        for b in parts_of(lm.model).blocks
    ]
    logits(lm, [row])
    for handle in handles:
        handle.remove()
    return seen


def test_means_equal_loops_behind_the_shared_header_without_outliers() -> None:
    lm = lm_of("gpt2")
    out = torch.zeros(62, dtype=torch.bool)  # 300 is beyond it: no outlier
    out[61] = True
    assert shared_header(ROWS) == 2
    found = measure(lm, ROWS, out, moment=True)
    states: list[list[np.ndarray]] = [[], []]
    for row in ROWS:
        for k, h_TD in enumerate(block_outputs(lm, row)):
            states[k] += [h for t, h in zip(row, h_TD, strict=True)][2:]
    ids = [t for row in ROWS for t in row[2:]]
    for k in range(2):
        kept = np.array([h for t, h in zip(ids, states[k], strict=True) if t != 61])
        np.testing.assert_allclose(found.mean_LD[k], kept.mean(0), atol=1e-5)
        assert float(found.norm_L[k]) == pytest.approx(
            np.linalg.norm(kept, axis=1).mean(), rel=1e-5
        )
        assert found.moment_LDD is not None
        np.testing.assert_allclose(
            found.moment_LDD[k], kept.T @ kept / len(kept), rtol=1e-3, atol=1e-3
        )
    assert (found.count, found.left_out) == (len(ids) - 1, 1)


def test_outliers_are_the_ids_whose_mean_norm_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = lm_of("gpt2")
    with torch.no_grad():
        lm.model.transformer.wte.weight[77] *= 60
    rows = [[0, 9, 40 + i, 41, 52 + i, 30] for i in range(8)] + [[0, 9, 77, 35, 36]]
    flagged = {int(i) for i in outlier_ids(lm, rows).nonzero()}
    expected = set()
    for k in range(2):
        ids = [t for row in rows for t in row[2:]]
        norms = np.concatenate([np.linalg.norm(block_outputs(lm, r)[k], axis=1)[2:] for r in rows])
        for token in set(ids):
            mean = np.mean([n for t, n in zip(ids, norms, strict=True) if t == token])
            if abs(mean - norms.mean()) / norms.std() > 3:
                expected.add(token)
    assert flagged == expected == {77}
    monkeypatch.setattr(_directions, "OUTLIER", -1.0)  # every token is one
    with pytest.raises(DataError, match="no token is left"):
        measure(lm, rows, outlier_ids(lm, rows))


def test_the_component_is_the_first_of_an_svd() -> None:
    lm = lm_of("llama")
    nothing = torch.zeros(1, dtype=torch.bool)
    found = principal_component(
        measure(lm, ROWS[:2], nothing, moment=True), measure(lm, ROWS[2:], nothing, moment=True)
    )
    heads = [shared_header(ROWS[:2])] * 2 + [shared_header(ROWS[2:])]
    for k in range(2):
        states = np.concatenate(
            [block_outputs(lm, r)[k][h:] for r, h in zip(ROWS, heads, strict=True)]
        )
        _, _, rows = np.linalg.svd(states - states.mean(0))
        cosine = rows[0] @ found[k].numpy() / np.linalg.norm(found[k])
        assert abs(cosine) == pytest.approx(1, abs=1e-4)


def test_a_zero_direction_is_refused() -> None:
    vectors = torch.stack([torch.zeros(4), torch.ones(4) * 1e-7]).double()
    for k in (0, 1):
        with pytest.raises(DataError, match=f"'x' is zero at block {k}"):
            unit_directions(vectors, torch.tensor([1.0, 1.0]), [k], name="x")
    same = AttackData(fit=data().benign, benign=data().benign, unrelated_texts=data().benign)
    arms = Arms(target=lm_of(), original=lm_of())
    for attack in (
        Orthogonalisation(directions=("contrast",)),
        DirectionEdit(),
        RefusalAblation(),
        BaseOrthogonalisation(),
    ):
        with pytest.raises(DataError, match="is zero at block 0"):
            next(attack.attack(arms, same, AttackContext()))


def test_project_out_is_idempotent_and_norm_reducing() -> None:
    g = torch.Generator().manual_seed(0)
    h = torch.randn(5, 7, 32, dtype=torch.float64, generator=g)
    d = unit().double() / unit().double().norm()
    once = project_out(h, d)
    loop = torch.stack([x - sum(a * b for a, b in zip(x, d, strict=True)) * d for x in h[0]])
    torch.testing.assert_close(once[0], loop, atol=1e-12, rtol=0)
    torch.testing.assert_close(project_out(once, d), once, atol=1e-14, rtol=0)
    assert bool((once.norm(dim=-1) <= h.norm(dim=-1)).all())


def orthogonal_gpt2(direction: torch.Tensor) -> LM:
    """A GPT-2 whose residual stream has no part along a direction, and whose head is its own."""
    lm = lm_of("gpt2", tied=False)
    base = lm.model.transformer
    project = torch.eye(32) - torch.outer(direction, direction)
    with torch.no_grad():
        for table in (base.wte.weight, base.wpe.weight):
            table.copy_(table @ project)
        for block in base.h:
            for writer in (block.attn.c_proj, block.mlp.c_proj):
                writer.weight.copy_(writer.weight @ project)
    return lm


def test_base_mean_ablation_removes_a_planted_direction_exactly() -> None:
    """The unlearned model adds 30 d behind block 0: the difference of means is it, and nothing else."""
    d = unit()
    original = orthogonal_gpt2(d)
    unlearned = original.copy()
    with torch.no_grad():
        unlearned.model.transformer.h[0].mlp.c_proj.bias += 30 * d
    before = weights_sha256(unlearned.model)
    clean, destroyed = logits(original), logits(unlearned)
    assert float((clean - destroyed).abs().max()) > 0.5
    attack = BaseOrthogonalisation(directions=("mean",), layers=LayerSets(sets=("single",)))
    view = next(attack.attack(Arms(target=unlearned, original=original), data(), AttackContext()))
    assert view.setting == {"direction": "mean", "layers": "0"}
    with view.apply(unlearned) as attacked:
        torch.testing.assert_close(logits(attacked), clean, atol=1e-5, rtol=0)
    assert torch.equal(logits(unlearned), destroyed)
    assert weights_sha256(unlearned.model) == before
    assert view.facts["share_before"] > 0.5
    assert view.facts["share_after"] < 1e-5


@contextmanager
def noisy_on(lm: LM, token: int, noise: torch.Tensor) -> Iterator[LM]:
    """Add noise behind the last block, at one token id alone: what RMU does to forget tokens."""
    ids: list[torch.Tensor] = []

    def see(module: Any, args: Any, named: Any) -> None:
        ids[:] = [named["input_ids"] if "input_ids" in named else args[0]]

    def add(module: Any, args: Any, output: Any) -> Any:
        made = hidden_of(output) + (ids[0] == token)[..., None] * noise
        return (made, *output[1:]) if isinstance(output, tuple) else made

    handles = [
        lm.model.register_forward_pre_hook(see, with_kwargs=True),
        parts_of(lm.model).blocks[-1].register_forward_hook(add),
    ]
    try:
        yield lm
    finally:
        for handle in handles:
            handle.remove()


def test_contrast_ablation_removes_noise_planted_at_forget_tokens() -> None:
    """q and z have one embedding: forget and benign states differ by the noise at q alone."""
    d = unit(seed=5)
    lm = orthogonal_gpt2(d)
    q, z = (lm.tokenizer.encode(x, add_special_tokens=False)[0] for x in "qz")
    with torch.no_grad():
        lm.model.transformer.wte.weight[q] = lm.model.transformer.wte.weight[z]
    row = [0, q, 30, 31, q]
    clean = logits(lm, [row])
    attack = Orthogonalisation(directions=("contrast",), layers=LayerSets(sets=("single",)))
    with noisy_on(lm, q, 20 * d):
        assert float((logits(lm, [row]) - clean).abs().max()) > 0.5
        settings = {"direction": "contrast", "layers": "1"}
        with pytest.raises(DataError, match="zero at block 0"):
            list(attack.attack(Arms(target=lm), data(), AttackContext()))
        forget, benign = (question_ids(lm, s, 9) for s in (data().fit, data().benign))
        out = outlier_ids(lm, benign)
        contrast = measure(lm, forget, out).mean_LD - measure(lm, benign, out).mean_LD
        assert float(contrast[1] @ d.double()) / float(contrast[1].norm()) == pytest.approx(
            1, abs=1e-5
        )
        triple = LayerSets(sets=("triple",), triple=(1,))
        attack = Orthogonalisation(directions=("contrast",), layers=triple)
        (view,) = attack.attack(Arms(target=lm), data(), AttackContext())
        assert view.setting == settings
        with view.apply(lm) as attacked:
            torch.testing.assert_close(logits(attacked, [row]), clean, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_ablation_works_on_every_architecture(family: str) -> None:
    lm = lm_of(family)
    before, plain = weights_sha256(lm.model), logits(lm)
    directions = {0: unit(seed=1), 1: unit(seed=2)}
    with ablated(lm, directions) as attacked:
        for k, h_TD in enumerate(block_outputs(attacked, ROWS[0])):
            assert np.abs(h_TD @ directions[k].double().numpy()).max() < 1e-4
    with ablated_everywhere(lm, directions[0]) as attacked:
        for h_TD in block_outputs(attacked, ROWS[0]):
            assert np.abs(h_TD @ directions[0].double().numpy()).max() < 1e-4
        assert float((logits(attacked) - plain).abs().max()) > 1e-4
    assert torch.equal(logits(lm), plain)
    attacks = (Orthogonalisation(), *(() if family in WINDOWED else (RefusalAblation(),)))
    for attack in attacks:
        for view in attack.attack(Arms(target=lm), data(), AttackContext()):
            with view.apply(lm):
                assert float((logits(lm) - plain).abs().max()) > 1e-5
    assert weights_sha256(lm.model) == before


@contextmanager
def hooked_writers(lm: LM, d: torch.Tensor) -> Iterator[None]:
    """Remove d from embeddings and from all that writes to the stream: hooks written for this test."""

    def remove(module: Any, args: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        made = h - torch.einsum("btd,d,e->bte", h, d, d)
        return (made, *output[1:]) if isinstance(output, tuple) else made

    parts = parts_of(lm.model)
    places = [parts.embedding, *(w for k in range(2) for w in block_writers(parts, k))]
    handles = [m.register_forward_hook(remove) for m in places]
    if hasattr(parts.base, "wpe"):
        handles.append(
            parts.base.wpe.register_forward_hook(lambda m, a, o: o - (o @ d)[..., None] * d)
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", [f for f in (*FAMILIES, *MIXTURES) if f not in NORMED])
def test_the_weight_edit_equals_the_hook_at_embeddings_and_all_writers(
    family: str, tied: bool
) -> None:
    lm, d = lm_of(family, tied=tied), unit(seed=7)
    before, plain = weights_sha256(lm.model), logits(lm)
    with hooked_writers(lm, d):
        expected = logits(lm)
    with edited(lm, direction_D=d):
        torch.testing.assert_close(logits(lm), expected, atol=1e-4, rtol=0)
    assert float((expected - plain).abs().max()) > 1e-3
    assert torch.equal(logits(lm), plain)
    assert weights_sha256(lm.model) == before
    head, embedding = lm.model.get_output_embeddings(), lm.model.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied == lm.model.config.tie_word_embeddings


def test_editing_a_tied_matrix_in_place_would_change_the_head() -> None:
    lm, d = lm_of("gpt2", tied=True), unit(seed=7)
    with edited(lm, direction_D=d):
        right = logits(lm)
        head = lm.model.lm_head.weight
        with torch.no_grad():
            head.copy_(lm.model.transformer.wte.weight)
        assert float((logits(lm) - right).abs().max()) > 1e-2


@pytest.mark.parametrize("family", NORMED)
def test_the_weight_edit_is_refused_where_norms_follow_the_writers(family: str) -> None:
    lm = lm_of(family)
    next(DirectionEdit().attack(Arms(target=lm), data(), AttackContext()))  # all gains are equal
    for block in parts_of(lm.model).blocks:
        with torch.no_grad():
            block.post_feedforward_layernorm.weight.copy_(torch.arange(32) / 32)
    with pytest.raises(ModelError, match="does not reach all that writes"):
        next(DirectionEdit().attack(Arms(target=lm), data(), AttackContext()))


def test_an_edited_model_is_saved_as_it_answers(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    lm = lm_of("gpt2", tied=True)
    view = next(DirectionEdit().attack(Arms(target=lm), data(), AttackContext()))
    with view.apply(lm) as attacked:
        expected = logits(attacked)
        attacked.save(tmp_path / "weights")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "weights").eval()
    torch.testing.assert_close(logits(LM(loaded, None)), expected, atol=1e-6, rtol=0)


def test_the_check_notices_a_direction_that_is_still_there() -> None:
    lm, d = lm_of(), unit()
    with pytest.raises(ModelError, match="still there"):
        checked(lm, ROWS[0], {0: d}, as_it_is)


def test_refusal_directions_are_differences_at_the_last_token() -> None:
    lm = lm_of("qwen2")
    mean, norm = last_means(lm, ROWS)
    for k in range(2):
        last = np.array([block_outputs(lm, row)[k][-1] for row in ROWS])
        np.testing.assert_allclose(mean[k], last.mean(0), atol=1e-5)
        assert float(norm[k]) == pytest.approx(np.linalg.norm(last, axis=1).mean(), rel=1e-5)
    bare = LM(lm.model, tiny_tokenizer(template=None))
    with pytest.raises(ModelError, match="no chat template"):
        next(RefusalAblation().attack(Arms(target=bare), data(), AttackContext()))


def test_refusal_directions_come_from_chats_where_there_are_some() -> None:
    lm = lm_of()
    chats = tuple(
        Sample(id=f"c{i}", task="generate", messages=(Message("user", f"bake {i}"),), answer="no")
        for i in range(5)
    )
    given = AttackData(fit=data().fit, benign=data().benign, forget_texts=chats)
    view = next(RefusalAblation().attack(Arms(target=lm), given, AttackContext()))
    assert (view.facts["harmful"], view.facts["harmless"]) == (5, 8)


def test_base_directions_leave_out_blocks_that_unlearning_did_not_change() -> None:
    original = lm_of()
    lm = original.copy()
    with torch.no_grad():
        lm.model.model.layers[1].mlp.down_proj.weight += 0.1
    arms = Arms(target=lm, original=original)
    views = list(BaseOrthogonalisation().attack(arms, data(), AttackContext()))
    assert {v.setting["layers"] for v in views} == {"all", "1"}
    assert all(v.facts["unchanged_blocks"] in ("0", "") and v.facts["blocks"] == 1 for v in views)
    named = BaseOrthogonalisation(layers=LayerSets(sets=("triple",), triple=(0, 1)))
    with pytest.raises(DataError, match="zero at block 0"):
        list(named.attack(arms, data(), AttackContext()))


@pytest.mark.parametrize(
    "attack",
    [Orthogonalisation(), BaseOrthogonalisation(), DirectionEdit(), RefusalAblation()],
    ids=lambda a: type(a).__name__,
)
def test_placebos_have_the_settings_of_the_attack_and_other_directions(attack: Any) -> None:
    original, lm = lm_of(), lm_of(seed=4)
    arms = Arms(target=lm, original=original)
    real = list(attack.attack(arms, data(), AttackContext(seed=1)))
    false = list(attack.placebo().attack(arms, data(), AttackContext(seed=1)))
    again = list(attack.placebo().attack(arms, data(), AttackContext(seed=1)))
    other = list(attack.placebo().attack(arms, data(), AttackContext(seed=2)))

    def vectors(view: Any) -> list[torch.Tensor]:
        named = view.apply.keywords
        return (
            list(named["directions"].values()) if "directions" in named else [named["direction_D"]]
        )

    kinds = {v.setting.get("stand_in", "random") for v in false}
    by_size = isinstance(attack, Orthogonalisation | BaseOrthogonalisation)
    assert kinds == ({"matched", "random"} if by_size else {"random"})
    settings = [{k: x for k, x in v.setting.items() if k != "stand_in"} for v in false]
    assert all(v.setting in settings for v in real)
    assert all(s in [v.setting for v in real] for s in settings)
    repeats = {v.repeat for v in false if v.setting.get("stand_in") != "matched"}
    assert repeats == {0, 1, 2}
    by_label = {v.label: vectors(v)[0] for v in real}
    for a, b, c in zip(false, again, other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(vectors(a), vectors(b), strict=True))
        assert all(float(x.norm()) == pytest.approx(1, abs=1e-6) for x in vectors(a))
        label = View(setting={k: x for k, x in a.setting.items() if k != "stand_in"}).label
        assert abs(float(vectors(a)[0] @ by_label[label])) < 0.9
        assert torch.equal(vectors(a)[0], vectors(c)[0]) == (a.setting.get("stand_in") == "matched")


def test_matched_controls_are_halves_of_the_benign_questions() -> None:
    lm, benign = lm_of(), data().benign
    a, b = halves(benign)
    assert sorted(s.id for s in (*a, *b)) == sorted(s.id for s in benign)
    out = outlier_ids(lm, question_ids(lm, benign, 9))
    made = control_directions(lm, benign, out, limit=9, drawn=2, seed=5)
    (matched,), drawn = made["matched"], made["random"]
    means = [measure(lm, question_ids(lm, x, 9), out).mean_LD for x in (a, b)]
    expected = (means[0] - means[1])[1]
    torch.testing.assert_close(matched[1], (expected / expected.norm()).float())
    assert len(drawn) == 2
    with pytest.raises(DataError, match="one half"):
        halves(benign[:1])


def test_layer_sets() -> None:
    assert scaled_triple(32) == (5, 6, 7)
    assert scaled_triple(5) == (0, 1, 2)
    assert scaled_triple(2) == (0, 1)
    assert spread(5, 8) == [0, 1, 2, 3, 4]
    assert spread(33, 5) == [0, 8, 16, 24, 32]
    assert spread(9, 1) == [4]
    assert LayerSets().of(2) == {"all": (0, 1), "0": (0,), "1": (1,)}
    assert list(LayerSets().of(32))[:2] == ["all", "5-6-7"]
    with pytest.raises(UsageError, match="no block 9"):
        LayerSets(triple=(1, 9)).of(5)
    with pytest.raises(UsageError, match="no effect"):
        build_options(LayerSets, {"sets": ("all",), "triple": (1, 2, 3)}, where="x")


def test_states_of_a_cut_pass_are_those_of_the_whole_one() -> None:
    lm, d = lm_of("gemma2"), unit()
    found = states_at(lm, ROWS, 0, d)
    for row, cosine_T in zip(ROWS, found, strict=True):
        h_TD = block_outputs(lm, row)[0]
        expected = h_TD @ d.double().numpy() / np.linalg.norm(h_TD, axis=1)
        np.testing.assert_allclose(cosine_T, expected, atol=1e-5)


def test_random_directions_depend_on_the_seed_alone() -> None:
    like = {0: torch.zeros(32), 3: torch.zeros(32)}
    a, b, c = (random_directions(like, s) for s in (1, 1, 2))
    assert torch.equal(a[0], b[0])
    assert not torch.equal(a[0], c[0])
    assert not torch.equal(a[0], a[3])
    assert float(a[3].norm()) == pytest.approx(1, abs=1e-6)

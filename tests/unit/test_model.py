"""Loading, saving, copying and fingerprinting models, and what is said when it goes wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from palimpsest.errors import MissingFileError, ModelError, UnsupportedArchitectureError
from palimpsest.model import LM, load_model, source_files_fingerprint, weights_sha256
from tiny_models import CONTEXT, FAMILIES, VOCABULARY, tiny_model, tiny_tokenizer

IDS = torch.tensor([[5, 9, 20, 33]])
Make = Callable[..., Path]


def load(folder: Path | str, **options: Any) -> LM:
    return load_model(str(folder), device="cpu", **options)


@pytest.fixture
def folder(tiny_checkpoint: Make, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_in_eval_mode(tiny_checkpoint: Make, family: str) -> None:
    lm = load(tiny_checkpoint(family), name=family)
    assert (lm.name, lm.dtype, lm.device.type) == (family, torch.float32, "cpu")
    assert (lm.max_length, lm.vocab_size) == (CONTEXT, VOCABULARY)
    assert not lm.model.training
    with torch.no_grad():
        assert torch.equal(lm.model(IDS).logits, tiny_model(family)(IDS).logits)


def test_the_name_defaults_to_the_last_part_of_the_source(folder: Path) -> None:
    assert load(folder).name == "model"
    assert load(f"{folder}/").source == f"{folder}/"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtype_is_what_was_asked_for(folder: Path, dtype: str) -> None:
    assert load(folder, dtype=dtype).dtype == getattr(torch, dtype)


def test_dtype_auto_is_the_checkpoints_own(folder: Path) -> None:
    load(folder, dtype="bfloat16").save(folder)
    assert load(folder, dtype="auto").dtype == torch.bfloat16


def test_loading_leaves_the_global_random_state_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    load(folder)
    assert torch.equal(before, torch.get_rng_state())


def test_sampling_settings_are_not_inherited_or_saved(folder: Path, tmp_path: Path) -> None:
    file = folder / "generation_config.json"
    config = json.loads(file.read_text())
    config |= {"temperature": 0.9, "top_p": 0.6, "repetition_penalty": 1.5, "eos_token_id": [1, 6]}
    file.write_text(json.dumps(config))
    lm = load(folder)
    assert lm.model.generation_config.temperature != 0.9
    assert lm.model.generation_config.eos_token_id == [1, 6]
    saved = json.loads((lm.save(tmp_path / "out") / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [1, 6]
    assert not {"temperature", "top_p", "repetition_penalty"} & set(saved)


def test_a_saved_model_loads_in_plain_transformers(fresh_lm: LM, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = fresh_lm.save(tmp_path / "deep" / "out")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert weights_sha256(model) == weights_sha256(fresh_lm.model)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("The river")["input_ids"] == fresh_lm.tokenizer("The river")["input_ids"]
    assert tokenizer.chat_template == fresh_lm.tokenizer.chat_template
    assert list(out.glob("*.safetensors"))
    assert not list(out.glob("*.bin"))
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_saving_replaces_an_older_checkpoint(fresh_lm: LM, folder: Path) -> None:
    (folder / "stale.safetensors").write_bytes(b"old")
    fresh_lm.save(folder)
    assert not (folder / "stale.safetensors").exists()
    assert weights_sha256(load(folder)) == weights_sha256(fresh_lm)


def test_a_failed_save_leaves_the_old_checkpoint(
    fresh_lm: LM, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = source_files_fingerprint(str(folder))

    def full(*args: object, **options: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(type(fresh_lm.tokenizer), "save_pretrained", full)
    with pytest.raises(OSError, match="no space"):
        fresh_lm.save(folder)
    assert source_files_fingerprint(str(folder)) == before
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_adapters_are_merged_in_what_is_saved(tmp_path: Path) -> None:
    tuned = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    lm = LM(tuned, tiny_tokenizer())
    saved = load(lm.save(tmp_path / "out"))
    with torch.no_grad():
        assert torch.allclose(saved.model(IDS).logits, tuned.eval()(IDS).logits, atol=1e-4)
        assert not torch.allclose(saved.model(IDS).logits, tiny_model()(IDS).logits, atol=1e-2)
    assert hasattr(lm.model, "merge_and_unload")


def test_a_copy_has_its_own_weights_and_the_same_tokenizer(fresh_lm: LM) -> None:
    twin = fresh_lm.copy()
    before = weights_sha256(fresh_lm.model)
    with torch.no_grad():
        twin.model.lm_head.weight.add_(1.0)
    assert weights_sha256(fresh_lm.model) == before != weights_sha256(twin.model)
    assert twin.tokenizer is fresh_lm.tokenizer


def test_use_after_close_raises(fresh_lm: LM) -> None:
    taken = fresh_lm.take()
    assert taken.model is not None
    for use in (lambda: fresh_lm.model, lambda: fresh_lm.device, fresh_lm.copy):
        with pytest.raises(ModelError, match="consumed by an unlearning method; load it again"):
            use()


def test_weights_hash_sees_one_changed_bit_and_the_dtype() -> None:
    model = tiny_model()
    before = weights_sha256(model)
    assert weights_sha256(tiny_model()) == before
    assert weights_sha256(tiny_model().double()) != before
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nextafter(model.lm_head.weight[0, 0], torch.tensor(9.0))
    assert weights_sha256(model) != before
    assert len(weights_sha256(tiny_model().bfloat16())) == 64


def test_source_fingerprint_follows_contents_not_places(folder: Path, tmp_path: Path) -> None:
    before = source_files_fingerprint(str(folder))
    assert source_files_fingerprint(str(shutil.copytree(folder, tmp_path / "twin"))) == before
    (folder / "README.md").write_text("words")
    assert source_files_fingerprint(str(folder)) == before
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert source_files_fingerprint(str(folder)) != before


def test_a_pinned_hub_commit_is_its_own_fingerprint() -> None:
    commit = "a" * 40
    assert source_files_fingerprint("owner/name", commit) == f"owner/name@{commit}"


def test_a_missing_path_is_named() -> None:
    for source in ("./nowhere", "/nowhere/at/all", "a/b/c"):
        with pytest.raises(MissingFileError, match=f"'{source}' does not exist"):
            load(source)


def test_a_file_is_not_a_folder(folder: Path) -> None:
    with pytest.raises(ModelError, match="is a file"):
        load(folder / "config.json")


@pytest.mark.parametrize(
    ("remove", "says"),
    [
        ("config.json", "no config.json"),
        ("tokenizer.json", "no tokenizer"),
        ("model.safetensors", "no .*safetensors"),
    ],
)
def test_an_incomplete_folder_says_what_is_missing(folder: Path, remove: str, says: str) -> None:
    (folder / remove).unlink()
    with pytest.raises(MissingFileError, match=says):
        load(folder)
    with pytest.raises(MissingFileError, match=says):
        source_files_fingerprint(str(folder))


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickled weights.*save_pretrained"):
        load(folder)


def test_a_damaged_config_is_one_line(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_damaged_weights_are_one_line(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(ModelError, match="weights file is damaged") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_an_unknown_architecture_is_named(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "abacus"}))
    with pytest.raises(UnsupportedArchitectureError, match="abacus"):
        load(folder)


def test_weights_that_are_missing_are_never_random(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights.*layers\.1\.mlp\.down_proj"):
        load(folder)


def test_a_vocabulary_beyond_the_embedding_is_refused(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"extra{i}" for i in range(40)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=rf"380 tokens but the embedding only {VOCABULARY}"):
        load(folder)


def test_a_hub_repository_offline_says_so() -> None:
    with pytest.raises(ModelError, match=r"'owner/name'.*cannot be reached") as caught:
        load("owner/name")
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="cannot be reached"):
        source_files_fingerprint("owner/name")


def test_a_gated_repository_names_its_page_and_the_login(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    def gated(*args: object, **options: object) -> None:
        raise OSError("You are trying to access a gated repo.\nMake sure to have access")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", gated)
    with pytest.raises(ModelError, match=r"huggingface\.co/owner/name.*`hf auth login`"):
        load("owner/name")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "int4"}, "dtype 'int4'"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"device": "cuda:0"}, "no CUDA GPU"),
    ],
)
def test_wrong_options_are_named(folder: Path, options: dict[str, str], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        load_model(str(folder), **{"device": "cpu", **options})

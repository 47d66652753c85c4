"""`doctor`: right without a network, silent about secrets, one finding per thing looked at."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from palimpsest import doctor
from palimpsest.doctor import Check, checks
from palimpsest.sources import http_error

Make = Callable[..., Path]
MACHINE = [
    *("python", "packages", "extra lm-eval", "extra quant", "extra trackers"),
    *("gpu", "memory", "output folder", "hub cache", "hub token", "OPENAI_API_KEY", "hub"),
]


def found(name: str, **options: object) -> Check:
    return next(c for c in checks(offline=True, **options) if c.name == name)


def test_the_machine_alone_is_checked_in_a_fixed_order(tmp_path: Path) -> None:
    looked = checks(out=tmp_path, offline=True)
    assert [c.name for c in looked] == MACHINE
    assert not [c for c in looked if c.status == "fail"]
    assert all(c.what_to_do for c in looked if c.status != "ok")


def test_importing_doctor_needs_no_torch() -> None:
    code = "import sys, palimpsest.doctor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_extras_are_those_of_the_package() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    declared = tomllib.loads(text)["project"]["optional-dependencies"]
    for extra, packages in doctor.EXTRAS.items():
        assert [line.split(">=")[0] for line in declared[extra]] == list(packages)


def test_an_extra_that_is_not_installed_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "EXTRAS", {"trackers": ("nowhere-to-be-found",)})
    extra = found("extra trackers")
    assert extra.status == "ok"
    assert extra.detail == "optional, not installed (nowhere-to-be-found)"
    assert extra.what_to_do == "if you need it: pip install 'palimpsest[trackers]'"


def test_secrets_are_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecretvalue")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-alsosecret")
    looked = checks("./nowhere-hf_verysecretvalue", out=tmp_path / "sk-alsosecret", offline=True)
    text = " ".join(f"{c.detail} {c.what_to_do}" for c in looked)
    assert "verysecret" not in text
    assert "alsosecret" not in text
    by_name = {c.name: c.detail for c in looked}
    assert by_name["hub token"] == "set (HF_TOKEN)"
    assert by_name["OPENAI_API_KEY"] == "set"


def test_offline_opens_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(doctor.urllib.request, "urlopen", refuse)
    assert "not asked" in found("hub").detail
    assert next(c for c in checks() if c.name == "hub").status == "ok"  # HF_HUB_OFFLINE is set


def test_an_unreachable_hub_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise ConnectionRefusedError("no")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(doctor.urllib.request, "urlopen", refuse)
    hub = next(c for c in checks() if c.name == "hub")
    assert (hub.status, hub.detail) == ("warn", "no answer (ConnectionRefusedError)")


def test_an_output_folder_that_cannot_be_written_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    check = found("output folder", out=tmp_path / "file" / "run")
    assert (check.status, check.what_to_do) == ("fail", "choose another folder")
    assert found("output folder", out=tmp_path / "not" / "yet").status in {"ok", "warn"}


def test_a_good_model_says_what_its_template_does(tiny_checkpoint: Make) -> None:
    template = found("chat template", model=str(tiny_checkpoint("llama")))
    assert template.status == "ok"
    assert template.detail == (
        "template: tokenizer, system role: own, pad: own, ends an answer: <|end|>, "
        "thinking: none, BOS in it, trims"
    )
    assert (
        "340 tokens for 352 rows, context 96"
        in found("tokenizer", model=str(tiny_checkpoint("llama"))).detail
    )


@pytest.mark.parametrize(
    ("template", "status", "says"),
    [
        (None, "warn", "template: fallback"),
        ("no_system", "ok", "system role: folded"),
        ("thinking", "ok", "thinking: switched off"),
        ("not_prefix", "warn", "cannot be trained on"),
    ],
)
def test_odd_templates_are_named(
    tiny_checkpoint: Make, template: str | None, status: str, says: str
) -> None:
    model = str(tiny_checkpoint("llama", template=template))
    check = found("chat template", model=model)
    assert check.status == status
    assert says in check.detail


def test_a_broken_model_fails_with_what_to_do(tiny_checkpoint: Make, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    tokenizer = found("tokenizer", model=str(folder))
    assert (tokenizer.status, tokenizer.what_to_do != "") == ("fail", True)
    (folder / "model.safetensors").unlink()
    model = found("model", model=str(folder))
    assert model == Check(
        "model", "fail", f"{folder} has no *.safetensors weights", "copy or download them"
    )


def test_a_hub_model_that_is_not_cached_fails_offline() -> None:
    looked = checks("owner/name", offline=True)
    assert looked[-1] == Check(
        "model",
        "fail",
        "owner/name is not in the hub cache, and this is offline",
        "go online once, or give a folder",
    )


def test_a_gated_model_names_its_page(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def gated(self: object, repo: str) -> None:
        raise OSError("403: you are trying to access a gated repo")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(doctor, "_hub", lambda offline: Check("hub", "ok", ""))
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", gated)
    last = checks("owner/name")[-1]
    assert (last.name, last.status) == ("model", "fail")
    assert last.detail == "model 'owner/name' is gated"
    assert "https://huggingface.co/owner/name" in last.what_to_do
    assert "hf auth login" in last.what_to_do


def test_a_model_on_an_unreachable_hub_fails_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(self: object, repo: str) -> None:
        raise unreachable()

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(doctor, "_hub", lambda offline: Check("hub", "warn", ""))
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", refuse)
    last = checks("owner/name")[-1]
    assert (last.name, last.status) == ("model", "fail")
    assert "the Hugging Face Hub cannot be reached" in last.detail
    assert last.what_to_do == "go online, or give a folder"


def unreachable() -> Exception:
    """Return the error of the hub's HTTP client (httpx or httpx2) when nobody answers."""
    error: Exception = sys.modules[http_error().__module__].ConnectError("no route")
    return error


def test_an_adapter_is_checked_through_its_base(tiny_checkpoint: Make, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    base = str(tiny_checkpoint("llama"))
    config = {"base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    looked = {c.name: c for c in checks(str(folder), offline=True)}
    assert looked["model"].detail.startswith(f"{folder}: adapter, 1 safetensors file(s)")
    assert looked["base model"] == Check("base model", "ok", base)
    assert looked["chat template"].status == "ok"

"""Looks at the machine before the work: environment, disk, GPU, extras, hub access, one model.

Cheap, and right without a network: what needs one is skipped or reported as not reachable. Secrets
are never shown, only whether they are set.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from palimpsest.checkpoint import adapter_base, check_folder, clear_errors, local_folder
from palimpsest.errors import PalimpsestError

Status = Literal["ok", "warn", "fail"]
MIN_PYTHON = (3, 11)
LITTLE_DISK_BYTES = 10e9
LITTLE_MEMORY_BYTES = 4e9
HUB_TIMEOUT_S = 3.0
HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
API_KEYS = ("OPENAI_API_KEY",)
EXTRAS = {
    "lm-eval": ("lm-eval",),
    "quant": ("bitsandbytes", "torchao"),
    "trackers": ("mlflow", "tensorboard", "trackio", "wandb"),
}
"""Extra -> packages it brings, as in pyproject.toml."""
SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
ADDRESS_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")


@dataclass(frozen=True, slots=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        status: `ok`, `warn` (something will not work, or not well) or `fail` (nothing will).
        detail: what was found.
        what_to_do: how to mend it; empty where there is nothing to mend.
    """

    name: str
    status: Status
    detail: str
    what_to_do: str = ""


def checks(
    model: str | None = None,
    out: Path | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    offline: bool = False,
) -> list[Check]:
    """Return what was found, in a fixed order; nothing is changed, downloaded or loaded to a GPU.

    For a model, its files, its access and its chat template are checked; of a hub repository the
    config and the tokenizer are fetched, the weights never.

    Args:
        model: folder, `sandbox/<name>`, or hub id; None checks the machine alone.
        out: the run folder that is planned; the working folder by default.
        revision: branch, tag or commit of a hub repository.
        trust_remote_code: let the model's own tokenizer code run.
        offline: make no connection (also: `HF_HUB_OFFLINE=1`).
    """
    offline = offline or _is_set("HF_HUB_OFFLINE")
    found = [_python(), *_packages(), _accelerators(), _memory()]
    found += [_disk("output folder", Path(out) if out is not None else Path.cwd()), _cache()]
    found += [*_secrets(), _hub(offline)]
    if model is not None:
        found += _model(model, revision, trust_remote_code, offline)
    return [replace(c, detail=_scrubbed(c.detail)) for c in found]


def _python() -> Check:
    detail = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < MIN_PYTHON:
        return Check("python", "fail", detail, "use Python 3.11 or newer")
    return Check("python", "ok", detail)


def _packages() -> list[Check]:
    """Return one check for what is required, and one per extra."""
    from packaging.requirements import Requirement

    try:
        needed = importlib.metadata.requires("palimpsest") or []
    except importlib.metadata.PackageNotFoundError:
        advice = "pip install -e . in the repository, or pip install palimpsest"
        return [Check("packages", "warn", "palimpsest is not installed as a package", advice)]
    lacking = [
        text
        for requirement in map(Requirement, needed)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        for text in _lacking(requirement)
    ]
    versions = ", ".join(f"{p} {_version(p)}" for p in ("torch", "transformers", "peft"))
    first = Check("packages", "ok", versions)
    if lacking:
        wanted = " ".join(repr(text.split(" (")[0]) for text in lacking)
        first = Check("packages", "fail", "; ".join(lacking), f"pip install {wanted}")
    return [first, *(_extra(name, packages) for name, packages in EXTRAS.items())]


def _extra(name: str, packages: tuple[str, ...]) -> Check:
    absent = [package for package in packages if _version(package) == "none"]
    if absent:
        detail = f"optional, not installed ({', '.join(absent)})"
        advice = f"if you need it: pip install 'palimpsest[{name}]'"
        return Check(f"extra {name}", "ok", detail, advice)
    detail = ", ".join(f"{package} {_version(package)}" for package in packages)
    return Check(f"extra {name}", "ok", detail)


def _lacking(requirement: Any) -> list[str]:
    """Return `name>=1 (have 0.9)` where a requirement is not met, else nothing."""
    have = _version(requirement.name)
    if have == "none" or not requirement.specifier.contains(have, prereleases=True):
        return [f"{requirement.name}{requirement.specifier} (have {have})"]
    return []


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _accelerators() -> Check:
    if importlib.util.find_spec("torch") is None:
        return Check("gpu", "fail", "torch is not installed", "pip install torch")
    import torch

    if torch.cuda.is_available():
        shown = []
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            shown.append(f"{name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free")
        return Check("gpu", "ok", "; ".join(shown))
    if torch.backends.mps.is_available():
        return Check("gpu", "ok", "Apple GPU (mps)")
    if shutil.which("nvidia-smi"):
        detail = f"nvidia-smi is here, but torch {torch.__version__} sees no CUDA GPU"
        advice = "install a CUDA build of torch and check CUDA_VISIBLE_DEVICES"
        return Check("gpu", "warn", detail, advice)
    return Check("gpu", "ok", f"none; CPU, {torch.get_num_threads()} thread(s)")


def _memory() -> Check:
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not known on this system
        return Check("memory", "ok", "free memory unknown on this system")
    if free < LITTLE_MEMORY_BYTES:
        advice = "close other programs, or use a smaller model or dtype"
        return Check("memory", "warn", f"{free / 1e9:.1f} GB free", advice)
    return Check("memory", "ok", f"{free / 1e9:.1f} GB free")


def _disk(name: str, folder: Path, needed: float = LITTLE_DISK_BYTES) -> Check:
    """Check the folder, or the nearest one above it that exists."""
    place = folder.expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return Check(name, "fail", f"{folder} cannot be written", "choose another folder")
    free = shutil.disk_usage(place).free
    detail = f"{folder}: {free / 1e9:.1f} GB free"
    if free < needed:
        return Check(name, "warn", detail, f"make room: {needed / 1e9:.1f} GB are advisable")
    return Check(name, "ok", detail)


def _cache() -> Check:
    from huggingface_hub import constants

    return _disk("hub cache", Path(constants.HF_HUB_CACHE))


def _secrets() -> list[Check]:
    """Say which credentials are set; their values are never read into a message."""
    from huggingface_hub import get_token

    named = [name for name in HUB_TOKENS if os.environ.get(name)]
    detail = f"set ({named[0]})" if named else "saved by `hf auth login`" if get_token() else ""
    advice = "" if detail else "only for gated models and data: `hf auth login`, or set HF_TOKEN"
    found = [Check("hub token", "ok", detail or "not set", advice)]
    for name in API_KEYS:
        is_set = "set" if os.environ.get(name) else "not set; only for remote judges and targets"
        found.append(Check(name, "ok", is_set))
    return found


def _hub(offline: bool) -> Check:
    from huggingface_hub import constants

    if offline:
        return Check("hub", "ok", "not asked: offline (HF_HUB_OFFLINE is set, or it was asked for)")
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S).close()
    except urllib.error.HTTPError as error:  # an answer all the same
        error.close()
    except (OSError, ValueError) as error:
        advice = "check the connection or proxy; models and data in folders work without it"
        return Check("hub", "warn", f"no answer ({type(error).__name__})", advice)
    return Check("hub", "ok", f"{constants.ENDPOINT} answers")


def _model(source: str, revision: str | None, trust: bool, offline: bool) -> list[Check]:
    try:
        folder = local_folder(source)
        files = _hub_files(source, revision, offline) if folder is None else _folder_files(folder)
    except PalimpsestError as error:
        what, _, to_do = str(error).rpartition("; ")
        return [Check("model", "fail", what or to_do, to_do if what else "")]
    found = [files]
    if files.status == "fail":
        return found
    try:
        where, commit = str(folder or source), revision
        base = adapter_base(folder) if folder is not None else None
        if base is not None:
            where, commit = base
            found.append(Check("base model", "ok", where))
        local_only = offline or Path(where).is_dir()
        options: dict[str, Any] = {"trust_remote_code": trust, "local_files_only": local_only}
        options |= {} if Path(where).is_dir() else {"revision": commit}
        found += _tokenizer_checks(where, options)
    except PalimpsestError as error:
        found.append(Check("tokenizer", "fail", str(error)))
    return found


def _folder_files(folder: Path) -> Check:
    check_folder(folder)
    sizes = [p.stat().st_size for p in folder.glob("*.safetensors")]
    kind = "adapter" if adapter_base(folder) else "checkpoint"
    detail = f"{folder}: {kind}, {len(sizes)} safetensors file(s), {sum(sizes) / 1e9:.2f} GB"
    return Check("model", "ok", detail)


def _hub_files(repo: str, revision: str | None, offline: bool) -> Check:
    import huggingface_hub as hub

    if not offline:
        with clear_errors(repo):
            hub.HfApi().auth_check(repo)
        return Check("model", "ok", f"{repo}: this account may read it")
    cached = [
        hub.try_to_load_from_cache(repo, name, revision=revision)
        for name in ("config.json", "adapter_config.json")
    ]
    if any(isinstance(path, str) for path in cached):
        return Check("model", "ok", f"{repo}: in the hub cache (its weights were not looked for)")
    advice = "go online once, or give a folder"
    return Check("model", "fail", f"{repo} is not in the hub cache, and this is offline", advice)


def _tokenizer_checks(where: str, options: dict[str, Any]) -> list[Check]:
    from transformers import AutoConfig, AutoTokenizer

    from palimpsest.chat import template_facts

    with clear_errors(where):
        config = AutoConfig.from_pretrained(where, **options).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    size, rows = len(tokenizer), int(config.vocab_size)
    context = getattr(config, "max_position_embeddings", None)
    detail = f"{type(tokenizer).__name__}, {size} tokens for {rows} rows, context {context}"
    is_small = size > rows
    advice = "the tokenizer belongs to another model; copy the right one" if is_small else ""
    found = [Check("tokenizer", "fail" if is_small else "ok", detail, advice)]
    facts = template_facts(tokenizer)
    shown = [f"template: {facts.source}", f"system role: {facts.system}", f"pad: {facts.pad}"]
    shown.append(f"ends an answer: {facts.end_of_turn or 'only EOS'}")
    shown.append(f"thinking: {facts.thinking}")
    shown += [text for text, is_so in (("BOS in it", facts.bos), ("trims", facts.strips)) if is_so]
    if facts.problem:
        to_do = "it can be evaluated, not trained: use a checkpoint with a plain chat template"
        found.append(Check("chat template", "warn", facts.problem, to_do))
    elif facts.source == "fallback":
        to_do = "a base model gets `User: ... Assistant:`; for a chat model add its template"
        found.append(Check("chat template", "warn", ", ".join(shown), to_do))
    elif facts.thinking == "open":
        to_do = "what is scored is the text after `</think>`; allow enough max_new_tokens"
        found.append(Check("chat template", "warn", ", ".join(shown), to_do))
    else:
        found.append(Check("chat template", "ok", ", ".join(shown)))
    return found


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() in {"1", "true", "yes", "on"}


def _scrubbed(text: str) -> str:
    """Return text without values of secret variables and without logins in addresses."""
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= 6:
            text = text.replace(value, "***")
    return ADDRESS_LOGIN.sub("***", text)

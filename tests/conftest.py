"""Shared fixtures: offline, one thread, CPU; tiny random checkpoints that are built once."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from palimpsest.model import LM

TinyCheckpoint = Callable[..., Path]


def pytest_configure(config: pytest.Config) -> None:
    """Let pass what peft 0.21 says under transformers 5.23; goes when peft uses the new name."""
    warning = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    config.addinivalue_line("filterwarnings", warning)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Hold torch to one thread, when it is used at all."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """Return `make(family="llama", **options) -> Path`; the same arguments give the same folder.

    Options are those of `tiny_models.save_tiny` (seed, template, adds_bos, adds_eos, pad).
    The folders are shared by all tests: never write into them.
    """
    from tiny_models import save_tiny

    made: dict[str, Path] = {}

    def make(family: str = "llama", **options: object) -> Path:
        key = repr((family, sorted(options.items())))
        if key not in made:
            made[key] = save_tiny(tmp_path_factory.mktemp(family), family, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_lm(tiny_checkpoint: TinyCheckpoint) -> LM:
    """Return a loaded tiny Llama with a chat template; shared: never change or close it."""
    from palimpsest.model import load_model

    return load_model(str(tiny_checkpoint("llama")), name="tiny", device="cpu")


@pytest.fixture
def fresh_lm(tiny_lm: LM) -> LM:
    """Return a copy of the tiny Llama that a test may train, change or close."""
    return tiny_lm.copy()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real benchmark files, or skip."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("PALIMPSEST_TEST_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no real benchmark files in {folder} (set PALIMPSEST_TEST_DATA)")
    return folder.resolve()

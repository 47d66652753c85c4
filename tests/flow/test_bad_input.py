"""Bad input through the command line: the exact message, the exit code, no traceback, nothing lost.

Every test starts in a copy of a run folder that holds finished work, and ends by checking that this
work is byte for byte still there. `docs/errors.md` has an entry for every message.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from palimpsest import cli, disk
from palimpsest.store import RunFolder
from tiny_models import tiny_tokenizer

Make = Callable[..., Path]
QUESTIONS = [f"Which town lies by river {i}?,Lirona,Arvenia,{'AB'[i % 2]}" for i in range(12)]
CHOICES = "\n".join(["question,one,two,answer", *QUESTIONS]) + "\n"
CHATS = "\n".join(["prompt,answer", *(f"Name town {i}.,Town {i}" for i in range(8))]) + "\n"
RECIPE = """
[run]
name = "bad-input"
[data]
offline = true
[numerics]
device = "cpu"
threads = 1
batch_tokens = 256
[[models]]
name = "original"
source = "{model}"
role = "original"
[[evaluate]]
name = "own"
dataset = "table"
split = "all"
max_new_tokens = 4
[evaluate.options]
path = "{choices}"
task = "choose"
prompt = "question"
choices = ["one", "two"]
answer = "answer"
"""
TRAINING = """
[training.forget]
dataset = "table"
options = {{ path = "{chats}", answer = "answer" }}
[[methods]]
name = "npo"
retain = "none"
checkpoint_every = 1
fit = {{ steps = 4, batch_size = 2, accumulate = 1 }}
"""


@cache
def patterns() -> tuple[re.Pattern[str], ...]:
    """Return the messages of docs/errors.md; `<...>` stands for any text."""
    page = (Path(__file__).parents[2] / "docs" / "errors.md").read_text().split("## Messages")[1]
    messages = re.findall(r"^```\n(.+)\n```$", page, re.MULTILINE)
    pieces = [re.split(r"<[^>]+>", message) for message in messages]
    return tuple(re.compile(".*".join(map(re.escape, parts))) for parts in pieces)


def documented(message: str) -> bool:
    """Return whether docs/errors.md has this message."""
    return any(pattern.fullmatch(message) for pattern in patterns())


@dataclasses.dataclass
class Shell:
    """A run folder with finished work, a recipe for it, and the command line in this process."""

    root: Path
    capsys: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.toml"

    def command(self, *arguments: str) -> tuple[int, str]:
        """Run a command; return its exit code and its standard error, in which no traceback is."""
        self.monkeypatch.setattr(sys, "argv", ["palimpsest", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        shown = self.capsys.readouterr().err
        assert "Traceback" not in shown
        return (code if isinstance(code, int) else 0), shown

    def run(self, *sets: str, out: Path | None = None, more: tuple[str, ...] = ()) -> Any:
        options = [word for pair in sets for word in ("--set", pair)]
        folder = str(out or self.out)
        return self.command("run", str(self.recipe), "--out", folder, *options, *more)

    def fails(self, code: int, message: str, *sets: str, **options: Any) -> None:
        """Run, and demand this exit code and this error line, exactly."""
        assert documented(message)
        got, shown = self.run(*sets, **options)
        assert [line for line in shown.splitlines() if line.startswith("error: ")] == [
            f"error: {message}"
        ]
        assert got == code

    def finished(self) -> dict[str, str]:
        return {
            str(path.relative_to(self.out)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted((self.out / "jobs").rglob("*"))
            if path.is_file()
        }

    def write(self, name: str, text: str | bytes) -> Path:
        path = self.root / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def train(self) -> None:
        """Add an unlearning method to the recipe."""
        text = self.recipe.read_text() + TRAINING.format(chats=self.write("chats.csv", CHATS))
        self.recipe.write_text(text)


@pytest.fixture(scope="module")
def finished_run(
    tiny_checkpoint: Make, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Return a folder with a finished run, its recipe and its data; and the model's folder."""
    from palimpsest.recipe import load_recipe
    from palimpsest.run import run

    root = tmp_path_factory.mktemp("finished")
    model = tiny_checkpoint("llama")
    data = root / "choices.csv"
    data.write_text(CHOICES)
    (root / "recipe.toml").write_text(RECIPE.format(model=model, choices=data))
    run(load_recipe(root / "recipe.toml"), root / "out")
    return root, model


@pytest.fixture
def shell(
    finished_run: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Shell:
    shutil.copytree(finished_run[0], tmp_path, dirs_exist_ok=True)
    made = Shell(tmp_path, capsys, monkeypatch)
    made.recipe.write_text(
        RECIPE.format(model=finished_run[1], choices=finished_run[0] / "choices.csv")
    )
    return made


@pytest.fixture(autouse=True)
def _finished_work_stays(request: pytest.FixtureRequest) -> Any:
    shell: Shell = request.getfixturevalue("shell")
    before = shell.finished()
    assert any(name.endswith("done.json") for name in before)
    yield
    after = shell.finished()
    assert {name: after.get(name) for name in before} == before


@pytest.fixture
def damaged_model(finished_run: tuple[Path, Path], tmp_path: Path) -> Path:
    return shutil.copytree(finished_run[1], tmp_path / "damaged")


# --- keys, names, numbers -----------------------------------------------------------------------


def test_an_unknown_key(shell: Shell) -> None:
    shell.train()
    message = f"{shell.recipe}: unknown table [metods]; did you mean 'methods'?"
    shell.fails(2, message, "metods.npo.beta=1")
    shell.fails(
        2,
        f"{shell.recipe}: [evaluate.own] has no option 'dataste'; did you mean 'dataset'?",
        "evaluate.own.dataste=mmlu",
    )
    shell.fails(
        2, "[methods.npo] has no option 'betta'; did you mean 'beta'?", "methods.npo.betta=1"
    )


def test_an_unknown_plugin(shell: Shell) -> None:
    shell.train()
    shell.fails(
        2,
        "[methods.npo] unknown method 'npoo'; did you mean 'npo'?",
        "methods.npo.use=npoo",
    )
    shell.fails(
        2,
        "[evaluate.own] unknown dataset 'mmlo'; did you mean 'mmlu'?",
        "evaluate.own.dataset=mmlo",
    )
    shell.fails(
        2,
        "[methods.npo] method './mine.py' is code outside the package; add --allow-code to run it",
        "methods.npo.use=./mine.py",
    )


def test_no_items_at_all(shell: Shell) -> None:
    shell.train()
    for sets, more, message in (
        ((), ("--limit", "0"), "run.limit must be at least 1, got 0"),
        (("evaluate.own.limit=-3",), (), "evaluate.own.limit must be at least 1, got -3"),
        (("training.forget.limit=0",), (), "training.forget.limit must be at least 1, got 0"),
        (
            ("evaluate.own.max_new_tokens=0",),
            (),
            "evaluate.own.max_new_tokens must be at least 1, got 0",
        ),
        (("numerics.batch_tokens=0",), (), "numerics.batch_tokens must be at least 1, got 0"),
    ):
        shell.fails(2, f"{shell.recipe}: {message}", *sets, more=more)


def test_a_missing_recipe(shell: Shell) -> None:
    code, shown = shell.command("run", "./gone.toml", "--out", str(shell.out))
    message = f"recipe './gone.toml' does not exist (looked in {Path.cwd()})"
    assert shown == f"error: {message}\n"
    assert documented(message)
    assert code == 3


# --- models -------------------------------------------------------------------------------------


def test_a_missing_model_path(shell: Shell) -> None:
    shell.fails(
        3,
        f"model folder './nowhere' does not exist (looked in {Path.cwd()}); give a folder, "
        "'sandbox/original', or a hub repository 'owner/name'",
        "models.original.source=./nowhere",
    )


def test_a_checkpoint_without_tokenizer(shell: Shell, damaged_model: Path) -> None:
    (damaged_model / "tokenizer.json").unlink()
    shell.fails(
        3,
        f"{damaged_model} has no tokenizer (none of tokenizer.json, tokenizer.model, vocab.json, "
        "vocab.txt, spiece.model, sentencepiece.bpe.model, tekken.json); save the original model's "
        "tokenizer there: tokenizer.save_pretrained(folder)",
        f"models.original.source={damaged_model}",
    )


def test_a_vocabulary_larger_than_the_embedding(shell: Shell, damaged_model: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"extra{i}" for i in range(40)])
    tokenizer.save_pretrained(damaged_model)
    shell.fails(
        3,
        f"model '{damaged_model}': the tokenizer has 380 tokens but the embedding only 352 rows; "
        "the tokenizer belongs to another model, or tokens were added without resizing",
        f"models.original.source={damaged_model}",
    )


def test_pickled_weights(shell: Shell, damaged_model: Path) -> None:
    (damaged_model / "model.safetensors").rename(damaged_model / "pytorch_model.bin")
    shell.fails(
        3,
        f"{damaged_model} holds pickled weights only (*.bin), which can run code when loaded; "
        'convert them once, where you trust them: python -c "from transformers import '
        "AutoModelForCausalLM as M, AutoTokenizer as T; "
        "M.from_pretrained('SRC').save_pretrained('DST'); "
        "T.from_pretrained('SRC').save_pretrained('DST')\"",
        f"models.original.source={damaged_model}",
    )


def test_no_chat_template_is_no_error_but_shown(shell: Shell, tiny_checkpoint: Make) -> None:
    bare = tiny_checkpoint("llama", template=None)
    chats = shell.write("chats.csv", CHATS)
    options = f'{{ path = "{chats}", answer = "answer" }}'
    code, _ = shell.run(f"models.original.source={bare}", f"evaluate.own.options={options}")
    assert code == 0
    model = json.loads((shell.out / "summary.json").read_text())["models"][0]
    assert model["chat_template"] == "fallback"
    assert model["first_prompt"] == "User: Name town 0.\nAssistant:"
    assert re.search(r"Chat template</span><pre[^>]*>\s*fallback<", report(shell))


def report(shell: Shell) -> str:
    return (shell.out / "report.html").read_text()


def test_a_prompt_longer_than_the_context(shell: Shell) -> None:
    long = f"{CHOICES}{'What is the capital of Arvenia? ' * 40},Lirona,Arvenia,A\n"
    path = shell.write("long.csv", long)
    code, shown = shell.run(f"evaluate.own.options.path={path}")
    message = "more than 2 % unscored: original: own/none by exact"
    assert message in shown.splitlines()
    assert documented(message)
    assert code == 4
    rows = json.loads((shell.out / "summary.json").read_text())["rows"]
    accuracy = next(r for r in rows if r["metric"] == "accuracy" and r["model"] == "original")
    assert (accuracy["n"], accuracy["unscored"]) == (12, 1)


# --- data sets ----------------------------------------------------------------------------------


def test_a_csv_with_a_missing_column(shell: Shell) -> None:
    path = shell.write("bad.csv", CHOICES.replace("question", "Question", 1))
    shell.fails(
        3,
        f"{path} has no column 'question'; did you mean 'Question'? "
        "(there are: Question, one, two, answer)",
        f"evaluate.own.options.path={path}",
    )


def test_an_empty_set(shell: Shell) -> None:
    path = shell.write("bad.csv", "question,one,two,answer\n")
    shell.fails(
        3,
        f"{path} holds no rows; an empty set can't be evaluated",
        f"evaluate.own.options.path={path}",
    )
    path = shell.write("one.csv", CHOICES.split("\n")[0] + "\n" + QUESTIONS[0] + "\n")
    shell.fails(
        3,
        "table: no sample in split 'attack-dev'; use another split or more data",
        f"evaluate.own.options.path={path}",
        "evaluate.own.split=attack-dev",
    )


def test_a_file_that_is_not_utf8(shell: Shell) -> None:
    path = shell.write("bad.csv", CHOICES.replace("Arvenia", "Arvénia").encode("latin-1"))
    offset = CHOICES.index("Arvenia") + 3
    shell.fails(
        3,
        f"{path} is not UTF-8: byte 0xe9 at offset {offset} (line 2); save it as UTF-8",
        f"evaluate.own.options.path={path}",
    )


def test_duplicate_ids(shell: Shell) -> None:
    path = shell.write("bad.csv", f"{CHOICES}{QUESTIONS[3]}\n")
    shell.fails(
        3,
        f"{path}, row 13: id 'Which town lies by river 3?' occurs twice; ids are unique",
        f"evaluate.own.options.path={path}",
        "evaluate.own.options.id=question",
    )


def test_a_set_with_one_class(shell: Shell) -> None:
    path = shell.write("bad.csv", CHOICES.replace(",A\n", ",B\n"))
    shell.fails(
        3,
        f"{path}: the answer is B in all 12 rows, so always saying B would score 100 %; shuffle "
        "each row's options",
        f"evaluate.own.options.path={path}",
    )


def test_a_missing_data_file(shell: Shell) -> None:
    path = shell.root / "gone.csv"
    shell.fails(
        3,
        f"data file '{path}' does not exist (looked for {path})",
        f"evaluate.own.options.path={path}",
    )


# --- the network --------------------------------------------------------------------------------


def test_the_hub_is_unreachable(shell: Shell) -> None:
    shell.fails(
        3,
        "model 'owner/name' is not on this machine and the Hugging Face Hub cannot be reached (or "
        "HF_HUB_OFFLINE is set); go online, or give a folder",
        "models.original.source=owner/name",
    )


@pytest.fixture
def hub_set(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Pretend that AdvBench is a data set on the hub; return the overrides that evaluate it."""
    from palimpsest.datasets import advbench

    file = dataclasses.replace(
        advbench.FILE, path="data.csv", repo="owner/gated", revision="a" * 40, url=None
    )
    monkeypatch.setattr(advbench, "FILE", file)
    cache = f"data.cache={shell.root / 'cache'}"
    return ("evaluate.own.dataset=advbench", "evaluate.own.options={}", cache)


def refuse(kind: str) -> Callable[..., None]:
    def raised(*arguments: object, **options: object) -> None:
        from huggingface_hub.errors import GatedRepoError

        if kind == "unreachable":
            raise ConnectionError("no route")
        raise GatedRepoError.__new__(GatedRepoError)  # its constructor wants a whole response

    return raised


def test_a_gated_set(
    shell: Shell, hub_set: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse("gated"))
    shell.fails(
        3,
        "owner/gated is gated: ask for access at https://huggingface.co/datasets/owner/gated, then "
        "run `hf auth login`",
        "data.offline=false",
        *hub_set,
    )


def test_a_set_whose_hub_is_unreachable(
    shell: Shell, hub_set: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = (
        "get it from https://huggingface.co/datasets/owner/gated and place it at "
        "<mirror>/advbench/harmful_behaviors.csv "
        "(sha256 6cd1a5c63c07610d7eb67307772ee5606017ee950b5770ab288a2c487489d3e1), then name that "
        "folder: --set data.mirror=FOLDER"
    )
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse("unreachable"))
    shell.fails(
        3,
        "the hub could not deliver owner/gated/data.csv (ConnectionError); check the connection, or "
        + wanted,
        "data.offline=false",
        *hub_set,
    )
    place = shell.root / "cache" / "files" / "advbench" / "harmful_behaviors.csv"
    shell.fails(
        3,
        f"advbench/harmful_behaviors.csv is not here (looked for {place}) and offline mode forbids "
        f"downloading; {wanted}",
        *hub_set,
    )


# --- the run folder -----------------------------------------------------------------------------


def test_an_output_folder_that_cannot_be_written(shell: Shell) -> None:
    blocked = shell.write("file", "x") / "run"
    shell.fails(
        3,
        f"{blocked}: cannot write (Not a directory): choose a folder that can be written",
        out=blocked,
    )


def test_two_runs_in_one_folder_at_once(shell: Shell) -> None:
    with RunFolder(shell.out).lock():
        shell.fails(
            3,
            f"{shell.out} is in use by process {os.getpid()} on {socket.gethostname()}: wait for "
            "it to end, stop it, or choose another folder",
        )
    assert shell.run()[0] == 0


def test_a_full_disk(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all = disk.write_all

    def full(handle: int, data: bytes) -> None:
        if b'"sample_id"' in data:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_all(handle, data)

    monkeypatch.setattr(disk, "write_all", full)
    code, shown = shell.run(more=("--limit", "5"))
    message = re.sub(r"[\d,]+ bytes free", "N bytes free", shown.splitlines()[-1])
    (job,) = [p for p in (shell.out / "jobs").iterdir() if not (p / "done.json").exists()]
    assert documented(message.removeprefix("error: "))
    assert message == (
        f"error: {job}: the disk is full or your quota is used up (N bytes free): make room and "
        "run the same command again; what was finished is kept"
    )
    assert code == 3
    monkeypatch.setattr(disk, "write_all", write_all)
    assert shell.run(more=("--limit", "5"))[0] == 0


class TestDamagedRecords:
    """Records that cannot be trusted; here the finished work itself is what is damaged."""

    @pytest.fixture(autouse=True)
    def _put_back(self, shell: Shell, _finished_work_stays: None) -> Any:
        kept = shell.root / "kept"
        shutil.copytree(shell.out, kept)
        yield
        shutil.rmtree(shell.out)
        kept.rename(shell.out)

    def test_records_of_another_schema_version(self, shell: Shell) -> None:
        (layout,) = shell.out.glob("jobs/*/responses.parts.json")
        layout.write_text(
            layout.read_text().replace('"schema_version": "1"', '"schema_version": "0"')
        )
        shell.fails(
            3,
            f"{layout}: records have schema version 0, this Palimpsest reads 1: use the Palimpsest "
            "that wrote them, or start a new run folder",
        )

    def test_a_half_written_part(self, shell: Shell) -> None:
        before = shell.finished()
        (part,) = shell.out.glob("jobs/*/responses-00000.parquet")
        whole = part.read_bytes()
        part.write_bytes(whole[: len(whole) // 2])
        shell.fails(
            3,
            f"{part}: damaged (Parquet magic bytes not found in footer. Either the file is "
            "corrupted or this is not a parquet file): delete it, and done.json beside it if there "
            "is one, then run the same command again; only what it held is computed anew",
        )
        part.unlink()
        (part.parent / "done.json").unlink()
        assert shell.run()[0] == 0
        assert shell.finished() == before


# --- training -----------------------------------------------------------------------------------


def test_a_nan_loss_names_term_and_step_and_keeps_the_last_checkpoint(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    from palimpsest.methods import npo

    shell.train()
    real, calls = npo.npo_loss, []

    def breaks(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return real(*arguments, **options) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(npo, "npo_loss", breaks)
    code, shown = shell.run()
    assert shown.splitlines()[-1:] == [
        "failed: unlearn-npo: loss term 'forget' is nan at step 2; lower the learning rate or the "
        "term's weight, or use float32 (the last checkpoint is unharmed) (and 1 that need it)"
    ]
    assert documented(shown.splitlines()[-1].removesuffix(" (and 1 that need it)"))
    assert code == 3
    assert (shell.out / "report.html").exists()
    kept = sorted(p.name.split("-")[1] for p in shell.out.glob("jobs/unlearn-*/checkpoints/step-*"))
    assert kept == ["00000001", "00000002"]
    assert shell.run()[0] == 0  # the loss is right again: it goes on after step 2
    (log,) = shell.out.glob("jobs/unlearn-*/losses.jsonl")
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [0, 1, 2, 3]
    assert len(calls) == 5


def test_every_documented_message_has_an_anchor_of_its_own() -> None:
    page = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()
    anchors = re.findall(r'<a id="([a-z0-9-]+)"></a>\n\n```', page)
    assert len(anchors) == len(set(anchors)) == len(patterns())

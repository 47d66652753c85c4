"""The run directory keeps everything, mixes nothing, and ends in the same bytes."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from palimpsest import records
from palimpsest.errors import DataError, StoreError
from palimpsest.store import (
    JobFolder,
    PartWriter,
    RunFolder,
    canonical_json,
    fingerprint,
    write_atomic,
)

FINGERPRINT = "0123456789abcdef" * 4
SCHEMA = {
    "sample_id": str,
    "text": "str",
    "value": float,
    "tokens": int,
    "refused": bool,
    "logprobs": "list[float]",
    "lengths": "list[int]",
}
FLOATS = (0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, 1 / 3)
TEXTS = ("plain", "", "line\nbreak\u2028\x00", "\ud83d", "\ud83d\ude00", "😀", r"\u{d83d} \\u{5c}")


def make_row(item: int) -> dict[str, object]:
    return {
        "sample_id": f"s{item}",
        "text": None if item % 5 == 4 else TEXTS[item % len(TEXTS)],
        "value": FLOATS[item % len(FLOATS)],
        "tokens": item - 3,
        "refused": None if item % 7 == 0 else item % 2 == 0,
        "logprobs": [FLOATS[(item + k) % len(FLOATS)] for k in range(item % 3)],
        "lengths": (item, item + 1),
    }


def open_job(path: Path, fp: str = FINGERPRINT) -> JobFolder:
    return RunFolder(path).job("evaluate/NPO/xstest", fp, {"seed": 1})


def fill(job: JobFolder, total: int, batch: int = 4) -> None:
    with job.parts("responses", total, SCHEMA) as parts:
        todo = sorted(parts.missing())
        for start in range(0, len(todo), batch):
            parts.append({item: make_row(item) for item in todo[start : start + batch]})


def contents(job: JobFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(job.path.iterdir()) if path.is_file()}


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PartWriter, "PART_ROWS", 5)


def test_rows_come_back_as_they_went_in(tmp_path: Path) -> None:
    job = open_job(tmp_path)
    fill(job, 40)
    rows = job.read("responses")
    for item, row in enumerate(rows):
        expected = make_row(item)
        expected["lengths"] = list(expected["lengths"])  # type: ignore[call-overload]
        assert list(row) == list(SCHEMA)
        assert repr(row) == repr(expected)  # repr tells -0.0 from 0.0 and 1 from 1.0


def test_pandas_reads_parts_as_they_are(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    job = open_job(tmp_path)
    fill(job, 40)
    frame = pandas.read_parquet(job.path / "responses-00000.parquet")
    assert list(frame.columns) == list(SCHEMA)
    assert frame["sample_id"].tolist() == [f"s{item}" for item in range(40)]
    assert frame["text"][3] == "\\u{d83d}"


def test_parts_are_fixed_item_ranges(tmp_path: Path) -> None:
    job = open_job(tmp_path)
    fill(job, 2050, batch=500)
    paths = sorted(job.path.glob("*.parquet"))
    assert [pq.read_metadata(path).num_rows for path in paths] == [1024, 1024, 2]
    assert not (job.path / "responses.tail.jsonl").exists()
    metadata = pq.read_schema(paths[0]).metadata
    assert metadata == {b"palimpsest.schema_version": b"1"}


@pytest.mark.usefixtures("small_parts")
def test_bytes_do_not_depend_on_order_or_batches(tmp_path: Path) -> None:
    whole = open_job(tmp_path / "whole")
    fill(whole, 23)
    for seed in range(5):
        rng = random.Random(seed)
        job = open_job(tmp_path / str(seed))
        while missing := sorted(job.parts("responses", 23, SCHEMA).missing()):
            chosen = rng.sample(missing, min(len(missing), rng.randint(1, 6)))
            parts = job.parts("responses", 23, SCHEMA)  # a new process each time, never closed
            parts.append({item: make_row(item) for item in chosen})
        fill(job, 23)
        assert contents(job) == contents(whole)


def test_tail_torn_at_any_byte_loses_only_the_last_item(tmp_path: Path) -> None:
    job = open_job(tmp_path)
    job.parts("responses", 3, SCHEMA).append({item: make_row(item) for item in range(3)})
    tail = job.path / "responses.tail.jsonl"
    data = tail.read_bytes()
    start = data.rindex(b"\n", 0, -1) + 1
    whole = open_job(tmp_path / "whole")
    fill(whole, 3)
    for cut in range(start, len(data) + 1):
        tail.write_bytes(data[:cut])
        parts = job.parts("responses", 3, SCHEMA)
        assert parts.missing() == (set() if cut >= len(data) - 1 else {2})
        assert parts.damaged == 0
        fill(job, 3)
        assert contents(job) == contents(whole)
        (job.path / "responses-00000.parquet").unlink()


def test_tail_without_its_last_newline_can_be_appended_to(tmp_path: Path) -> None:
    job = open_job(tmp_path)
    job.parts("responses", 3, SCHEMA).append({0: make_row(0)})
    tail = job.path / "responses.tail.jsonl"
    tail.write_bytes(tail.read_bytes()[:-1])
    parts = job.parts("responses", 3, SCHEMA)
    parts.append({1: make_row(1)})
    parts.append({2: make_row(2)})
    assert job.parts("responses", 3, SCHEMA).missing() == set()
    parts.close()
    assert [row["sample_id"] for row in job.read("responses")] == ["s0", "s1", "s2"]


def test_any_flipped_byte_in_the_middle_costs_that_item_and_is_counted(tmp_path: Path) -> None:
    job = open_job(tmp_path)
    job.parts("responses", 3, SCHEMA).append({item: make_row(item) for item in range(3)})
    tail = job.path / "responses.tail.jsonl"
    data = tail.read_bytes()
    first, second = data.index(b"\n") + 1, data.index(b"\n", data.index(b"\n") + 1)
    for place in range(first, second):
        tail.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        parts = job.parts("responses", 3, SCHEMA)
        assert parts.missing() == {1}
        assert parts.damaged >= 1
    tail.write_bytes(data[:first] + bytes(40) + data[second:])
    fill(job, 3)
    assert [row["sample_id"] for row in job.read("responses")] == ["s0", "s1", "s2"]


class _Killed(BaseException):
    """Stands for `kill -9`: after it, no call of the process reaches the disk any more."""


def _kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    calls = 0

    def guard(name: str) -> None:
        real = getattr(os, name)

        def call(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls >= step and name != "close":
                if calls == step and name == "write":
                    real(args[0], bytes(args[1])[: len(bytes(args[1])) // 2])  # type: ignore[call-overload]
                raise _Killed
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    for name in ("open", "write", "fsync", "replace", "unlink", "ftruncate"):
        guard(name)


@pytest.mark.usefixtures("small_parts")
def test_killed_at_every_single_disk_call_it_continues_to_the_same_bytes(tmp_path: Path) -> None:
    whole = open_job(tmp_path / "whole")
    fill(whole, 12)
    whole.finish(items=12)
    for step in range(1, 200):
        path = tmp_path / str(step)
        RunFolder(path)
        with pytest.MonkeyPatch.context() as patch:
            _kill_at(patch, step)
            try:
                job = open_job(path)
                fill(job, 12)
                job.finish(items=12)
                survived = True
            except _Killed:
                survived = False
        run = RunFolder(path)
        with run.lock():
            job = open_job(path)
            if job.done is not None:
                assert len(job.read("responses")) == 12
            fill(job, 12)
            job.finish(items=12)
        assert contents(job) == contents(whole), step
        if survived:
            break
    assert survived
    assert step > 40


WORKER = textwrap.dedent("""
    import sys, time
    sys.path.insert(0, {tests!r})
    import test_store as t
    from palimpsest.store import PartWriter, RunFolder
    PartWriter.PART_ROWS = 50
    run = RunFolder(t.Path(sys.argv[1]))
    with run.lock():
        print("started", flush=True)
        job = t.open_job(run.path)
        with job.parts("responses", 180, t.SCHEMA) as parts:
            todo = sorted(parts.missing())
            for start in range(0, len(todo), 3):
                time.sleep(0.001)
                parts.append({{i: t.make_row(i) for i in todo[start:start + 3]}})
        job.finish(items=180)
        if sys.argv[2] == "wait":
            sys.stdin.read()
""").format(tests=str(Path(__file__).parent))


def _worker(path: Path, then: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(path), then]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_real_kill_9_loop_ends_in_the_bytes_of_an_uninterrupted_run(tmp_path: Path) -> None:
    rng = random.Random(7)
    for _ in range(6):
        with _worker(tmp_path / "killed", "wait") as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.0, 0.25))
            os.kill(process.pid, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    for name in ("killed", "whole"):
        with _worker(tmp_path / name, "exit") as process:
            process.communicate()
        assert process.returncode == 0
    assert contents(open_job(tmp_path / "killed")) == contents(open_job(tmp_path / "whole"))
    rows = open_job(tmp_path / "killed").read("responses")
    assert [row["sample_id"] for row in rows] == [f"s{item}" for item in range(180)]


HOLDER = """
import sys
from pathlib import Path
from palimpsest.store import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_lock_holds_across_processes_and_dies_with_its_holder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StoreError) as caught, RunFolder(tmp_path).lock():
            pass
        assert f"process {holder.pid} " in str(caught.value)
        assert str(tmp_path) in str(caught.value)
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with RunFolder(tmp_path).lock():
        pass


def test_lock_is_refused_twice_in_one_process_and_can_be_taken_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with run.lock(), pytest.raises(StoreError, match=str(os.getpid())), RunFolder(tmp_path).lock():
        pass
    with run.lock():
        pass


def test_lock_clears_temporary_files_of_a_killed_process(tmp_path: Path) -> None:
    job = open_job(tmp_path)
    stale = job.path / ".done.json.1-0.tmp"
    stale.write_text("half")
    with RunFolder(tmp_path).lock():
        assert not stale.exists()


def _no_space(*args: object, **kwargs: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_full_disk_keeps_the_old_file_and_leaves_no_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    write_atomic(tmp_path / "a.json", b"old")
    monkeypatch.setattr(os, call, _no_space)
    with pytest.raises(StoreError, match=r"full.*bytes free.*run the same command again") as caught:
        write_atomic(tmp_path / "a.json", b"new")
    assert str(tmp_path) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == b"old"


def test_disk_that_fills_up_inside_a_batch_keeps_earlier_batches(tmp_path: Path) -> None:
    job = open_job(tmp_path)
    parts = job.parts("responses", 6, SCHEMA)
    parts.append({0: make_row(0), 1: make_row(1)})
    before = (job.path / "responses.tail.jsonl").read_bytes()
    real, calls = os.write, 0

    def half(handle: int, data: memoryview) -> int:
        nonlocal calls
        calls += 1
        return real(handle, data[: len(data) // 2]) if calls == 1 else _no_space()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(StoreError, match="full"):
            parts.append({2: make_row(2), 3: make_row(3)})
    assert (job.path / "responses.tail.jsonl").read_bytes() == before
    assert parts.missing() == {2, 3, 4, 5}
    fill(job, 6)
    assert len(job.read("responses")) == 6


def test_file_in_place_of_the_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError) as caught:
            RunFolder(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_write_permission_raises(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run")
    (tmp_path / "run").chmod(0o500)
    with pytest.raises(StoreError, match="cannot write"):
        RunFolder(tmp_path / "run")


def test_other_fingerprint_with_the_same_start_is_refused(tmp_path: Path) -> None:
    open_job(tmp_path)
    with pytest.raises(StoreError, match="another configuration"):
        open_job(tmp_path, FINGERPRINT[:-1] + "0")


def test_other_configuration_gets_its_own_folder(tmp_path: Path) -> None:
    assert open_job(tmp_path).path != open_job(tmp_path, fingerprint({"seed": 2})).path
    assert len(RunFolder(tmp_path).jobs()) == 2


def test_spec_is_written_once(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    first = run.job("a", FINGERPRINT, {"seed": 1, "lr": 1e-5})
    again = run.job("a", FINGERPRINT, {"seed": 1, "lr": 1e-5, "note": "later"})
    assert first.spec == again.spec
    assert again.spec == {"job": "a", "fingerprint": FINGERPRINT, "spec": {"lr": 1e-5, "seed": 1}}
    assert (first.path / "spec.json").read_bytes() == canonical_json(again.spec)


def test_job_folder_without_its_spec_is_foreign(tmp_path: Path) -> None:
    job = open_job(tmp_path)
    fill(job, 3)
    (job.path / "spec.json").unlink()
    with pytest.raises(StoreError, match=r"no spec\.json"):
        open_job(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"total": 7},
        {"schema": {**SCHEMA, "value": "int"}},
        {"schema": dict(reversed(SCHEMA.items()))},
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_layout_of_the_same_kind_is_refused(
    tmp_path: Path, change: dict[str, object], finished: bool
) -> None:
    job = open_job(tmp_path)
    if finished:
        fill(job, 6)
    else:
        job.parts("responses", 6, SCHEMA).append({1: make_row(1)})
    with pytest.raises(StoreError, match="was begun with"):
        job.parts("responses", **{"total": 6, "schema": SCHEMA, **change})  # type: ignore[arg-type]


def test_records_of_another_schema_version_are_refused(tmp_path: Path) -> None:
    job = open_job(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "SCHEMA_VERSION", "2")
        fill(job, 3)
    for use in (lambda: job.read("responses"), lambda: job.parts("responses", 3, SCHEMA)):
        with pytest.raises(StoreError, match=r"schema version 2.*start a new run folder"):
            use()
    layout = job.path / "responses.parts.json"
    layout.write_text(layout.read_text().replace('"schema_version": "2"', '"schema_version": "1"'))
    with pytest.raises(StoreError, match=r"parquet: records have schema version 2"):
        job.read("responses")


def test_flipped_byte_in_a_part_is_never_returned_as_data(tmp_path: Path) -> None:
    job = open_job(tmp_path)
    fill(job, 6)
    path = job.path / "responses-00000.parquet"
    data, expected = path.read_bytes(), repr(job.read("responses"))
    refused = 0
    for place in range(0, len(data), 3):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        try:
            assert repr(job.read("responses")) == expected
        except StoreError:
            refused += 1
    assert refused > 10
    path.unlink()
    fill(job, 6)
    assert path.read_bytes() == data


def test_incomplete_records_cannot_be_read_or_finished(tmp_path: Path) -> None:
    job = open_job(tmp_path)
    with pytest.raises(StoreError, match="no records of kind"):
        job.read("responses")
    with job.parts("responses", 3, SCHEMA) as parts:
        parts.append({0: make_row(0)})
    with pytest.raises(StoreError, match="not complete"):
        job.read("responses")
    with pytest.raises(StoreError, match="not complete"):
        job.finish()
    assert job.done is None


def test_a_finished_job_that_lost_a_part_names_the_folder_to_delete(tmp_path: Path) -> None:
    job = open_job(tmp_path)
    fill(job, 3)
    job.finish()
    (job.path / "responses-00000.parquet").unlink()
    with pytest.raises(StoreError) as caught:
        job.read("responses")
    assert f"delete the folder {job.path} and run the same command again" in str(caught.value)
    shutil.rmtree(job.path)
    again = open_job(tmp_path)
    assert again.done is None
    fill(again, 3)
    assert len(again.read("responses")) == 3


def test_done_is_none_until_finished_and_then_the_facts(tmp_path: Path) -> None:
    job = open_job(tmp_path)
    assert job.done is None
    job.finish(items=3, sha256="ab")
    assert job.done == {"items": 3, "sha256": "ab"}
    assert open_job(tmp_path).done == {"items": 3, "sha256": "ab"}


def test_stored_item_is_kept_and_an_item_twice_from_one_writer_raises(tmp_path: Path) -> None:
    job = open_job(tmp_path)
    parts = job.parts("responses", 2, SCHEMA)
    parts.append({0: make_row(0)})
    with pytest.raises(StoreError, match="twice"):
        parts.append({0: make_row(0)})
    with job.parts("responses", 2, SCHEMA) as parts:
        parts.append({0: {**make_row(0), "tokens": 99}, 1: make_row(1)})
    assert [row["tokens"] for row in job.read("responses")] == [-3, -2]


def test_second_writer_on_the_same_tail_is_noticed(tmp_path: Path) -> None:
    job = open_job(tmp_path)
    first, second = (job.parts("responses", 4, SCHEMA) for _ in range(2))
    first.append({0: make_row(0)})
    with pytest.raises(StoreError, match="another process writes"):
        second.append({1: make_row(1)})
    first.append({1: make_row(1)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": math.nan}, "NaN"),
        ({"logprobs": [0.0, math.nan]}, "NaN"),
        ({"tokens": 1.0}, "not int"),
        ({"tokens": True}, "not int"),
        ({"tokens": 2**63}, "not int"),
        ({"value": True}, "not float"),
        ({"value": 2**60 + 1}, "not float"),
        ({"refused": 1}, "not bool"),
        ({"text": b"x"}, "not str"),
        ({"lengths": "12"}, "not list"),
        ({"lengths": [None]}, "not int"),
        ({"extra": 1}, "unknown columns"),
    ],
)
def test_wrong_rows_are_refused_and_nothing_of_the_batch_is_stored(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    parts = open_job(tmp_path).parts("responses", 2, SCHEMA)
    with pytest.raises(DataError, match=message):
        parts.append({0: make_row(0), 1: {**make_row(1), **change}})
    assert parts.missing() == {0, 1}


def test_row_without_a_column_and_item_out_of_range_raise(tmp_path: Path) -> None:
    parts = open_job(tmp_path).parts("responses", 2, SCHEMA)
    with pytest.raises(DataError, match=r"missing columns \['text'\]"):
        parts.append({0: {name: x for name, x in make_row(0).items() if name != "text"}})
    with pytest.raises(DataError, match=r"not among 0\.\.1"):
        parts.append({2: make_row(2)})


def test_nothing_to_store_and_unknown_types_raise(tmp_path: Path) -> None:
    job = open_job(tmp_path)
    with pytest.raises(DataError, match="nothing to store"):
        job.parts("responses", 0, SCHEMA)
    with pytest.raises(DataError, match="'dict'"):
        job.parts("responses", 1, {"a": dict})


def test_pyarrow_schema_and_mapping_mean_the_same() -> None:
    schema = pa.schema(
        [("a", pa.string()), ("b", pa.list_(pa.float64())), ("c", pa.int64()), ("d", pa.bool_())]
    )
    assert records.as_columns(schema) == {"a": "str", "b": "list[float]", "c": "int", "d": "bool"}
    assert records.as_columns({"a": str, "b": "list[float]"}) == {"a": "str", "b": "list[float]"}
    assert records.as_columns({"b": list[float]}) == {"b": "list[float]"}


def test_escaping_is_reversible_for_any_mixture() -> None:
    rng = random.Random(3)
    pieces = [
        "\\",
        "u{",
        "5c",
        "d83d",
        "}",
        "\ud83d",
        "\udfff",
        "u",
        "{",
        "\\u{",
        "\\u{5c}",
        "D800",
    ]
    for _ in range(5000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 9)))
        stored = records.escape(text)
        stored.encode()
        assert records.unescape(stored) == text
    assert records.escape(r"\u{1F600} \x") == r"\u{1F600} \x"


def test_canonical_json_has_one_form() -> None:
    assert canonical_json({"b": (1, 2.0), "a": None}) == b'{"a":null,"b":[1,2.0]}'
    assert canonical_json({"a": 0.1}) == b'{"a":0.1}'
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 1.0})
    assert len(fingerprint({})) == 64


@pytest.mark.parametrize("value", [math.nan, math.inf, Path("x"), {1: 2}, {1}, b"x", object()])
def test_canonical_json_refuses_what_has_no_one_form(value: object) -> None:
    with pytest.raises(DataError, match=r"data\.deep\[0\]"):
        canonical_json({"deep": [value]})


@pytest.mark.parametrize("job_id", ["../up", "a/../../b", "/etc", "..", "", "///", "a\0b"])
def test_job_ids_cannot_leave_the_folder(tmp_path: Path, job_id: str) -> None:
    with pytest.raises(DataError, match="is not a name"):
        RunFolder(tmp_path).job(job_id, FINGERPRINT, {})


def test_job_ids_are_slugged(tmp_path: Path) -> None:
    name = open_job(tmp_path).path.name
    assert name == f"evaluate-npo-xstest-{FINGERPRINT[:12]}"
    long = RunFolder(tmp_path).job("x" * 500, FINGERPRINT, {})
    assert len(long.path.name) < 150


@pytest.mark.parametrize("bad", ["", "xyz", "0123456789AB", "../../etc/abc"])
def test_wrong_fingerprints_raise(tmp_path: Path, bad: str) -> None:
    with pytest.raises(DataError, match="hex digits"):
        open_job(tmp_path, bad)


def test_small_json_files_round_trip_and_names_are_checked(tmp_path: Path) -> None:
    job = open_job(tmp_path)
    job.write_json("batch_plan", {"rows": [1, 2], "side": "left"})
    assert job.read_json("batch_plan.json") == {"rows": [1, 2], "side": "left"}
    assert job.read_json("times") is None
    for name in ("spec", "done.json", "responses.parts"):
        with pytest.raises(DataError, match="belongs to the store"):
            job.write_json(name, {})
    for name in ("../x", "a/b", ".hidden", ""):
        with pytest.raises(DataError, match="use letters"):
            job.write_json(name, {})
    (job.path / "times.json").write_text("{")
    with pytest.raises(StoreError, match="damaged"):
        job.read_json("times")


def test_leftovers_of_a_killed_save_are_removed_with_the_lock(tmp_path: Path) -> None:
    job = open_job(tmp_path)
    for name in (".weights.123.tmp", ".weights.123.old"):
        (job.path / name).mkdir()
        (job.path / name / "model.safetensors").write_bytes(b"half")
    (job.path / ".done.json.9.tmp").write_bytes(b"{")
    for name in (".view-0.9.tmp", ".view-0.9.old"):
        (job.path / "weights" / name).mkdir(parents=True)
    with RunFolder(job.path.parents[1]).lock():
        assert not [p for p in job.path.iterdir() if p.name.startswith(".weights")]
        assert not (job.path / ".done.json.9.tmp").exists()
        assert not list((job.path / "weights").iterdir())


def test_find_writes_nothing(tmp_path: Path) -> None:
    job = open_job(tmp_path)
    folder = RunFolder(job.path.parents[1])
    stored = job.spec
    before = sorted(p.name for p in (folder.path / "jobs").iterdir())
    assert folder.find(stored["job"], stored["fingerprint"]).path == job.path
    assert folder.find("another", "0" * 64) is None
    assert sorted(p.name for p in (folder.path / "jobs").iterdir()) == before


def test_tail_is_plain_json_lines(tmp_path: Path) -> None:
    job = open_job(tmp_path)
    job.parts("responses", 9, SCHEMA).append({2: make_row(2)})
    line = json.loads((job.path / "responses.tail.jsonl").read_text())
    assert line["i"] == 2
    assert line["row"]["sample_id"] == "s2"


def test_store_needs_no_torch() -> None:
    code = "import sys, palimpsest.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

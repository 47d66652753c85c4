"""The run directory: nothing computed is lost, nothing of another configuration is mixed in.

    DIR/.lock                                    one process per folder
    DIR/jobs/<job>-<fingerprint[:12]>/
        spec.json                                what the job is, written once
        <kind>.parts.json                        number of items, columns, schema version
        <kind>.tail.jsonl                        finished items, while the job runs
        <kind>-00000.parquet ...                 items 0-1023, 1024-2047, ..., when all are finished
        weights/ ...                             artifacts
        done.json                                written last; its presence means finished

`kill -9` at any moment leaves a state from which the same command continues: small files are
replaced atomically, items are appended with a checksum per line, and the tail is removed only
after every part is on disk. Parts are read as they are by pandas, polars and DuckDB.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palimpsest import disk, records
from palimpsest.disk import write_atomic
from palimpsest.errors import DataError, StoreError
from palimpsest.records import canonical_json, fingerprint, readable_json

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["JobFolder", "PartWriter", "RunFolder", "canonical_json", "fingerprint", "write_atomic"]


class RunFolder:
    """A folder that holds the jobs of one run.

    Attributes:
        path: the folder, absolute.
    """

    def __init__(self, path: Path) -> None:
        """Create the folder if need be; StoreError when it cannot be written."""
        self.path = Path(path).absolute()
        disk.make_folder(self.path)
        disk.make_folder(self.path / "jobs")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process; the kernel lets go when the process ends, however.

        Temporary files that a killed process left are removed.

        Raises:
            StoreError: another run, here or in another process, holds the folder.
        """
        with disk.lock_file(self.path / ".lock"):
            inside = [f"jobs/*/{x}.*.{end}" for x in ("", "weights/") for end in ("tmp", "old")]
            for pattern in (".*.tmp", *inside):
                for stale in self.path.glob(pattern):
                    disk.remove(stale)
            yield

    def job(self, job_id: str, fingerprint: str, spec: Mapping[str, Any]) -> JobFolder:
        """Return the job's folder, made if need be; `spec` is stored the first time only.

        Raises:
            StoreError: the folder was made for another full fingerprint, or by something else.
        """
        if not re.fullmatch(r"[0-9a-f]{12,}", fingerprint):
            raise DataError(f"fingerprint {fingerprint!r} is not 12 or more lower-case hex digits")
        folder = self.path / "jobs" / f"{_slug(job_id)}-{fingerprint[:12]}"
        disk.make_folder(folder)
        job = JobFolder(folder)
        if not (folder / "spec.json").exists():
            foreign = sorted(entry.name for entry in folder.iterdir() if entry.name[0] != ".")
            if foreign:
                raise StoreError(
                    f"{folder}: has {foreign[0]} but no spec.json: move the folder away"
                )
            stored = {"job": job_id, "fingerprint": fingerprint, "spec": spec}
            write_atomic(folder / "spec.json", canonical_json(stored))
        found = job.spec["fingerprint"]
        if found != fingerprint:
            raise StoreError(
                f"{folder}: belongs to another configuration (fingerprint {found}, wanted "
                f"{fingerprint}): choose another run folder"
            )
        return job

    def find(self, job_id: str, fingerprint: str) -> JobFolder | None:
        """Return the job's folder if it is there and belongs to that fingerprint; writes nothing."""
        folder = self.path / "jobs" / f"{_slug(job_id)}-{fingerprint[:12]}"
        if not (folder / "spec.json").is_file():
            return None
        job = JobFolder(folder)
        return job if job.spec["fingerprint"] == fingerprint else None

    def jobs(self) -> list[JobFolder]:
        """Return every job folder that has a spec.json, by name."""
        return [JobFolder(spec.parent) for spec in sorted(self.path.glob("jobs/*/spec.json"))]


class JobFolder:
    """Where one job keeps its records, small JSON files and artifacts.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        """Refer to a folder that `RunFolder.job` made."""
        self.path = path

    @property
    def spec(self) -> dict[str, Any]:
        """The content of spec.json: `job`, `fingerprint` (all digits), `spec`."""
        stored = _load_json(self.path / "spec.json")
        if not isinstance(stored, dict) or "fingerprint" not in stored:
            raise records.damaged(self.path / "spec.json", "no fingerprint in it")
        return stored

    @property
    def done(self) -> dict[str, Any] | None:
        """The content of done.json, or None while the job is not finished."""
        path = self.path / "done.json"
        facts: dict[str, Any] | None = _load_json(path) if path.exists() else None
        return facts

    def finish(self, **facts: Any) -> None:
        """Write done.json, the mark that everything else in the folder is complete.

        Raises:
            StoreError: records were begun but not completed and closed.
        """
        for layout in sorted(self.path.glob("*.parts.json")):
            self._require_complete(layout.name.removesuffix(".parts.json"))
        write_atomic(self.path / "done.json", readable_json(facts))

    def parts(self, kind: str, total: int, schema: pa.Schema | Mapping[str, Any]) -> PartWriter:
        """Return the writer of `total` items of one kind; it knows what is already stored."""
        return PartWriter(self.path, kind, total, schema)

    def read(self, kind: str) -> list[records.Row]:
        """Return all rows in item order; StoreError when some are missing."""
        layout = self._require_complete(kind)
        return [
            row
            for path, items in _part_paths(self.path, kind, layout)
            for row in records.from_parquet(path, dict(layout["columns"]), len(items))
        ]

    def write_json(self, name: str, data: Any) -> None:
        """Replace a small JSON file atomically; `.json` may be left out of the name."""
        path = self._json_path(name)
        if path.name in ("spec.json", "done.json") or path.name.endswith(".parts.json"):
            raise DataError(f"{path.name} belongs to the store; choose another name")
        write_atomic(path, readable_json(data))

    def read_json(self, name: str) -> Any:
        """Return what `write_json` stored, or None when there is no such file."""
        path = self._json_path(name)
        return _load_json(path) if path.exists() else None

    def _json_path(self, name: str) -> Path:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
            raise DataError(f"file name {name!r}: use letters, digits, '.', '_', '-'")
        return self.path / f"{name.removesuffix('.json')}.json"

    def _require_complete(self, kind: str) -> dict[str, Any]:
        layout = _read_layout(self.path, kind)
        if layout is None:
            raise StoreError(f"{self.path}: has no records of kind {kind!r}")
        parts = _part_paths(self.path, kind, layout)
        absent = [path.name for path, _ in parts if not path.exists()]
        if absent:
            way_out = "run the same command again to finish it"
            if (self.path / "done.json").exists():  # it counts as finished, and is never reopened
                way_out = f"delete the folder {self.path} and run the same command again"
            raise StoreError(
                f"{self.path}: {kind} is not complete ({len(absent)} of {len(parts)} parts absent, "
                f"first {absent[0]}): {way_out}"
            )
        return layout


class PartWriter:
    """Stores the items of one kind of record, in any order, each exactly once.

    Use it as `with job.parts(...) as parts:`; leaving the block without an error closes it.

    Attributes:
        PART_ROWS: items per Parquet file.
        damaged: lines in the middle of the tail that failed their checksum; their items are
            missing again. A torn last line (a write that a kill cut short) is not counted.
    """

    PART_ROWS = 1024

    def __init__(
        self, folder: Path, kind: str, total: int, schema: pa.Schema | Mapping[str, Any]
    ) -> None:
        """Find out what is stored; StoreError when it was stored with another layout."""
        if not re.fullmatch(r"[a-z][a-z0-9_]*", kind):
            raise DataError(f"kind {kind!r}: use lower-case letters, digits, '_'")
        if total < 1:
            raise DataError(f"{folder}: {kind} has {total} items; there is nothing to store")
        self.damaged = 0
        self._columns = records.as_columns(schema)
        self._folder, self._kind, self._total = folder, kind, total
        self._tail = folder / f"{kind}.tail.jsonl"
        self._layout = self._agree_on_layout()
        self._missing = set(range(total))
        self._written: set[int] = set()  # by this writer
        self._lines: dict[int, tuple[int, int]] = {}  # item -> offset and length in the tail
        self._file_bytes = self._good_bytes = 0
        self._ends_open = False  # the last good line lacks its newline
        for path, items in _part_paths(folder, kind, self._layout):
            if path.exists():
                records.check_parquet(path, self._columns, len(items))
                self._missing.difference_update(items)
        if self._tail.exists():
            self._scan_tail()

    def __enter__(self) -> PartWriter:
        """Return the writer."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Close, unless an error is on its way: what was appended is on disk already."""
        if kind is None:
            self.close()

    def missing(self) -> set[int]:
        """Return the items that are not stored yet."""
        return set(self._missing)

    def append(self, rows: Mapping[int, Mapping[str, Any]]) -> None:
        """Store finished items: one write and one fsync; on return they survive a power cut.

        An item that an earlier process stored is kept as it is (a batch that was cut short is
        computed again as a whole, so that its numbers stay the same, and only its rest is new).

        Raises:
            DataError: a row does not fit the columns, or its index is out of range.
            StoreError: an item comes twice from this writer, or the disk is full; then nothing of
                this call is stored.
        """
        lines: dict[int, bytes] = {}
        for item, row in rows.items():
            if not 0 <= item < self._total:
                raise DataError(f"{self._tail}: item {item} is not among 0..{self._total - 1}")
            if item in self._written:
                raise StoreError(f"{self._tail}: item {item} was appended twice by the same run")
            checked = records.check_row(row, self._columns, item)
            if item in self._missing:
                lines[item] = records.to_line(item, checked)
        if not lines:
            return
        self._write_lines(b"".join(lines.values()))
        offset = self._good_bytes
        for item, line in lines.items():
            self._lines[item] = (offset, len(line))
            offset += len(line)
        self._good_bytes = self._file_bytes = offset
        self._missing.difference_update(lines)
        self._written.update(lines)

    def close(self) -> None:
        """Turn the tail into Parquet parts if all items are stored; else leave all as it is."""
        if self._missing:
            return
        for path, items in _part_paths(self._folder, self._kind, self._layout):
            if not path.exists():
                write_atomic(path, records.to_parquet(self.stored(items), self._columns))
        try:
            if self._tail.exists():
                os.unlink(self._tail)
                disk.sync_folder(self._folder)
        except OSError as error:
            raise disk.disk_error(self._folder, error) from error

    def _agree_on_layout(self) -> dict[str, Any]:
        wanted = {
            "kind": self._kind,
            "items": self._total,
            "part_rows": self.PART_ROWS,
            "columns": [list(column) for column in self._columns.items()],
            "schema_version": records.SCHEMA_VERSION,
        }
        found = _read_layout(self._folder, self._kind)
        if found is None:
            if self._tail.exists() or (self._folder / f"{self._kind}-00000.parquet").exists():
                raise StoreError(
                    f"{self._folder}: has {self._kind} records but no {self._kind}.parts.json: "
                    "move the folder away and run the same command again"
                )
            write_atomic(self._folder / f"{self._kind}.parts.json", readable_json(wanted))
        elif found != wanted:
            keys = [key for key in wanted if found.get(key) != wanted[key]]
            raise StoreError(
                f"{self._folder}: {self._kind} was begun with {keys[0]} = {found.get(keys[0])}, "
                f"now {wanted[keys[0]]}: another configuration needs another fingerprint or folder"
            )
        return wanted

    def _scan_tail(self) -> None:
        bad_before = False
        with self._tail.open("rb") as file:
            for line in file:
                self.damaged += bad_before
                record = records.from_line(line)
                bad_before = record is None
                start, self._file_bytes = self._file_bytes, self._file_bytes + len(line)
                if record is None:
                    continue
                if not 0 <= record[0] < self._total:
                    raise records.damaged(self._tail, f"item {record[0]} of {self._total}")
                self._good_bytes, self._ends_open = self._file_bytes, not line.endswith(b"\n")
                self._lines.setdefault(record[0], (start, len(line)))
        self._missing.difference_update(self._lines)

    def _write_lines(self, data: bytes) -> None:
        """Append to the tail after cutting off a torn end; undo everything on failure."""
        is_new = self._file_bytes == 0
        try:
            handle = os.open(self._tail, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                if os.fstat(handle).st_size != self._file_bytes:
                    raise StoreError(
                        f"{self._tail}: another process writes to it: stop one of them"
                    )
                if self._file_bytes != self._good_bytes:
                    os.ftruncate(handle, self._good_bytes)
                    self._file_bytes = self._good_bytes
                start = self._good_bytes
                try:
                    disk.write_all(handle, b"\n" + data if self._ends_open else data)
                    os.fsync(handle)
                except OSError:
                    os.ftruncate(handle, start)
                    raise
            finally:
                os.close(handle)
            self._good_bytes += self._ends_open
            self._ends_open = False
            if is_new:
                disk.sync_folder(self._folder)
        except OSError as error:
            raise disk.disk_error(self._folder, error) from error

    def stored(self, items: Iterable[int]) -> list[records.Row]:
        """Return stored rows of a writer that is not closed, as they are in the file (`escape`)."""
        rows = []
        with self._tail.open("rb") as file:
            for item in items:
                offset, length = self._lines[item]
                file.seek(offset)
                record = records.from_line(file.read(length))
                if record is None or record[0] != item:
                    raise StoreError(f"{self._tail}: changed while in use: run the command again")
                rows.append(record[1])
        return rows


def _part_paths(folder: Path, kind: str, layout: Mapping[str, Any]) -> list[tuple[Path, range]]:
    total, step = layout["items"], layout["part_rows"]
    return [
        (folder / f"{kind}-{number:05d}.parquet", range(first, min(first + step, total)))
        for number, first in enumerate(range(0, total, step))
    ]


def _read_layout(folder: Path, kind: str) -> dict[str, Any] | None:
    path = folder / f"{kind}.parts.json"
    if not path.exists():
        return None
    layout = _load_json(path)
    if not isinstance(layout, dict):
        raise records.damaged(path, "not a JSON object")
    records.check_version(path, str(layout.get("schema_version", "none")))
    return layout


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise records.damaged(path, str(error)) from error


def _slug(job_id: str) -> str:
    slug = re.sub(r"[^a-z0-9@._-]+", "-", job_id.lower()).strip(".-")[:120]
    if not slug or "\0" in job_id or ".." in re.split(r"[/\\]", job_id) or job_id[0] in "/\\":
        raise DataError(f"job id {job_id!r} is not a name: use letters, digits, '.', '_', '-'")
    return slug

r"""What is stored, as bytes: canonical JSON, checked rows, checksummed lines, Parquet.

Nothing here touches a file except to read Parquet; `store.py` decides what is written where.

A row is a flat dict of `str | int | float | bool | None` and lists of `float`, `int` or `str`.

- Floats go through JSON by `repr`, so they come back bit for bit; infinities and -0.0 too. NaN is
  refused: nobody could tell "missing" from "wrong", so the caller stores None and says why.
- Parquet cannot hold lone surrogates (models do emit them). They are stored as `\u{d83d}`, and
  text that already looks like such a marker has its backslash stored as `\u{5c}`. Reading
  through `JobFolder.read` restores the original; other readers see the markers.
- Parquet bytes depend on the rows, their order, and the pyarrow version, and on nothing else.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palimpsest.errors import DataError, StoreError, did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = "1"
VERSION_KEY = "palimpsest.schema_version"
KINDS = ("str", "int", "float", "bool", "list[str]", "list[int]", "list[float]")

Columns = dict[str, str]  # column name -> one of KINDS, in column order
Row = dict[str, Any]

_ARROW_NAMES = {
    "str": "string",
    "int": "int64",
    "float": "double",
    "bool": "bool",
    "list[str]": "list<item: string>",
    "list[int]": "list<item: int64>",
    "list[float]": "list<item: double>",
}
_ESCAPE = re.compile("[\ud800-\udfff]|\\\\(?=u\\{(?:d[89a-f][0-9a-f]{2}|5c)\\})")
_UNESCAPE = re.compile(r"\\u\{(d[89a-f][0-9a-f]{2}|5c)\}")
_SEAL = re.compile(rb',"crc32":"([0-9a-f]{8})"\}')
_SEAL_BYTES = len(b',"crc32":"00000000"}')


def canonical_json(data: Any) -> bytes:
    """Return the one JSON text of the data: sorted keys, no spaces, ASCII, floats by `repr`.

    Tuples count as lists.

    Raises:
        DataError: NaN, infinity, a key that is not a string, or a type that JSON lacks (a path
            among them: it differs between machines, so it has no place in a fingerprint).
    """
    return json.dumps(_plain(data, "data"), sort_keys=True, separators=(",", ":")).encode()


def fingerprint(data: Any) -> str:
    """Return the SHA-256 of `canonical_json(data)` as 64 hex digits."""
    return hashlib.sha256(canonical_json(data)).hexdigest()


def readable_json(data: Any) -> bytes:
    """Return JSON for people: sorted keys, indented; the same refusals as `canonical_json`."""
    return json.dumps(_plain(data, "data"), sort_keys=True, indent=2).encode() + b"\n"


def as_columns(schema: pa.Schema | Mapping[str, Any]) -> Columns:
    """Return name -> kind of a pyarrow schema or a mapping to types (`str`, `"list[float]"`)."""
    by_arrow_name = {arrow: kind for kind, arrow in _ARROW_NAMES.items()}
    if isinstance(schema, Mapping):
        found = dict(schema)
    else:
        found = {field.name: str(field.type).replace("element:", "item:") for field in schema}
    columns: Columns = {}
    for name, given in found.items():
        word = given.__name__ if type(given) is type else str(given)
        kind = word if word in KINDS else by_arrow_name.get(word)
        if kind is None:
            raise DataError(f"column {name!r} has type {word!r}{did_you_mean(word, KINDS)}")
        columns[str(name)] = kind
    if not columns:
        raise DataError("a record needs at least one column; the schema is empty")
    return columns


def check_row(row: Mapping[str, Any], columns: Columns, item: int) -> Row:
    """Return the row in column order with plain Python values, strings escaped for storage.

    Raises:
        DataError: a column is missing or unknown, a value has another type, or is NaN.
    """
    if row.keys() != columns.keys():
        missing, unknown = sorted(columns.keys() - row.keys()), sorted(row.keys() - columns.keys())
        raise DataError(f"item {item}: missing columns {missing}, unknown columns {unknown}")
    return {name: _check_value(row[name], kind, name, item) for name, kind in columns.items()}


def to_line(item: int, row: Row) -> bytes:
    """Return `{"i":..,"row":{..},"crc32":".."}` and a newline; the CRC covers what precedes it."""
    payload = json.dumps({"i": item, "row": row}, separators=(",", ":")).encode()[:-1]
    return payload + b',"crc32":"%08x"}\n' % zlib.crc32(payload)


def from_line(line: bytes) -> tuple[int, Row] | None:
    """Return (item, stored row), or None when the line is torn or damaged."""
    line = line.removesuffix(b"\n")
    payload, seal = line[:-_SEAL_BYTES], _SEAL.fullmatch(line[-_SEAL_BYTES:])
    if seal is None or int(seal[1], 16) != zlib.crc32(payload):
        return None
    record = json.loads(payload + b"}")
    return record["i"], record["row"]


def to_parquet(rows: Sequence[Row], columns: Columns) -> bytes:
    """Return the Parquet file of rows made by `check_row`; the same rows give the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(list(rows), schema=_arrow_schema(columns))
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        version="2.6",
        data_page_version="1.0",
        compression="zstd",
        compression_level=3,
        use_dictionary=True,
        write_statistics=True,
        store_schema=True,
        write_page_checksum=True,
        row_group_size=max(1, len(rows)),
    )
    return bytes(sink.getvalue())


def check_parquet(path: Path, columns: Columns, num_rows: int) -> None:
    """Raise StoreError unless the footer has this version, these columns and this many rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        footer = pq.read_metadata(path)
        schema = footer.schema.to_arrow_schema()
        version = (schema.metadata or {}).get(VERSION_KEY.encode(), b"none").decode()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(path, str(error)) from error
    check_version(path, version)
    if not schema.equals(_arrow_schema(columns)):
        raise damaged(path, f"its columns are not {list(columns)}")
    if footer.num_rows != num_rows:
        raise damaged(path, f"it holds {footer.num_rows} items instead of {num_rows}")


def from_parquet(path: Path, columns: Columns, num_rows: int) -> list[Row]:
    """Return the rows as they were given, markers of lone surrogates undone, pages verified."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_parquet(path, columns, num_rows)
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(path, str(error)) from error
    rows: list[Row] = table.to_pylist()
    for name in (name for name, kind in columns.items() if "str" in kind):
        for row in rows:
            row[name] = _restore(row[name])
    return rows


def check_version(path: Path, found: str) -> None:
    """Raise StoreError when records were written under another schema version."""
    if found != SCHEMA_VERSION:
        raise StoreError(
            f"{path}: records have schema version {found}, this Palimpsest reads {SCHEMA_VERSION}: "
            "use the Palimpsest that wrote them, or start a new run folder"
        )


def damaged(path: Path, why: str) -> StoreError:
    """Return the error for a file that cannot be trusted, with the way out."""
    why = why.splitlines()[0].rstrip(".") if why else "unreadable"
    return StoreError(
        f"{path}: damaged ({why}): delete it, and done.json beside it if there is one, "
        "then run the same command again; only what it held is computed anew"
    )


def escape(text: str) -> str:
    r"""Return text without lone surrogates; `\u{d83d}` stands for each, `unescape` undoes it."""
    return _ESCAPE.sub(lambda match: f"\\u{{{ord(match[0]):x}}}", text)


def unescape(text: str) -> str:
    """Return the text that `escape` was given."""
    return _UNESCAPE.sub(lambda match: chr(int(match[1], 16)), text)


def _plain(data: Any, where: str) -> Any:
    if isinstance(data, Mapping):
        for key in data:
            if not isinstance(key, str):
                raise DataError(f"{where}: key {key!r} is {type(key).__name__}, not str")
        return {str(key): _plain(value, f"{where}.{key}") for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value, f"{where}[{index}]") for index, value in enumerate(data)]
    if isinstance(data, float) and not math.isfinite(data):
        raise DataError(f"{where}: {data} is not a JSON number; store None or leave it out")
    if data is None or isinstance(data, (str, bool, int, float)):
        return data
    raise DataError(f"{where}: {type(data).__name__} has no JSON form; convert it to str or a list")


def _arrow_schema(columns: Columns) -> pa.Schema:
    import pyarrow as pa

    types = {
        "str": pa.string(),
        "int": pa.int64(),
        "float": pa.float64(),
        "bool": pa.bool_(),
        "list[str]": pa.list_(pa.string()),
        "list[int]": pa.list_(pa.int64()),
        "list[float]": pa.list_(pa.float64()),
    }
    fields = [pa.field(name, types[kind]) for name, kind in columns.items()]
    return pa.schema(fields, metadata={VERSION_KEY: SCHEMA_VERSION})


def _check_value(value: Any, kind: str, name: str, item: int) -> Any:
    if value is None:
        return None
    if kind.startswith("list["):
        if not isinstance(value, (list, tuple)):
            raise _wrong(value, kind, name, item)
        inner = kind[len("list[") : -1]
        return [_check_scalar(entry, inner, name, item) for entry in value]
    return _check_scalar(value, kind, name, item)


def _check_scalar(value: Any, kind: str, name: str, item: int) -> str | int | float | bool:
    if kind == "str" and isinstance(value, str):
        return escape(str(value))
    if kind == "bool" and isinstance(value, bool):
        return value
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if kind == "int" and is_int and -(2**63) <= value < 2**63:
        return int(value)
    if kind == "float" and is_int and abs(value) <= 2**53:
        return float(value)
    if kind == "float" and isinstance(value, float):
        if math.isnan(value):
            raise DataError(f"item {item}, column {name!r}: NaN; store None and record why")
        return float(value)
    raise _wrong(value, kind, name, item)


def _wrong(value: Any, kind: str, name: str, item: int) -> DataError:
    hint = "; convert it with .item() or .tolist()" if hasattr(value, "tolist") else ""
    shown = repr(value)[:60]
    return DataError(
        f"item {item}, column {name!r}: {shown} is {type(value).__name__}, not {kind}{hint}"
    )


def _restore(value: Any) -> Any:
    if isinstance(value, list):
        return [_restore(entry) for entry in value]
    return unescape(value) if isinstance(value, str) else value

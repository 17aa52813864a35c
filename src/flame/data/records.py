"""Records of several fields, as JSON objects whatever stores them, and what makes a text of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import orjson
import pyarrow

from flame.data.cache import LOCAL, Access
from flame.data.conversations import Conversations
from flame.data.files import as_files
from flame.data.formats import Bad, Format, Record
from flame.data.lines import JsonLines, parse_json
from flame.data.messages import Cannot, contents_of
from flame.data.raw import SourceFile
from flame.data.saved import ArrowTable, arrow_schema
from flame.data.tables import Parquet, holds_text, parquet_schema
from flame.errors import DataError, nearest

arrow = cast("Any", pyarrow)

SEPARATOR = "\0"  # of the columns in a reader's `field`; no column's name holds it
UNDECODABLE = b'"\xff"'  # in the place of a value that is not UTF-8: the record's JSON is not either


class Shape(Protocol):
    """What makes the text of a record. Picklable."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The record's fields that it reads."""
        ...

    @property
    def optional(self) -> tuple[str, ...]:
        """And those that it reads where they are there."""
        ...

    @property
    def paths(self) -> list[tuple[str, ...]]:
        """The values that it takes out of them, by path."""
        ...

    @property
    def taken(self) -> str:
        """What such a value is, for people."""
        ...

    def takes(self, kind: Any) -> bool:
        """Whether a table's value of this Arrow type can be such a value."""
        ...

    def identity(self) -> dict[str, Any]:
        """What the fingerprint holds of it."""
        ...

    def text(self, record: dict[str, Any]) -> str | Bad:
        """A record's text, or why it has none: a fact of the record alone."""
        ...


@dataclass(frozen=True)
class Contents:
    """All that the messages of a conversation say. In the place of a chat template where there is no
    tokenizer yet."""

    conversations: Conversations

    @property
    def columns(self) -> tuple[str, ...]:
        return self.conversations.columns

    @property
    def optional(self) -> tuple[str, ...]:
        return ()

    @property
    def paths(self) -> list[tuple[str, ...]]:
        return self.conversations.paths

    @property
    def taken(self) -> str:
        return self.conversations.taken

    def takes(self, kind: Any) -> bool:
        return self.conversations.takes(kind)

    def identity(self) -> dict[str, Any]:
        return {}

    def text(self, record: dict[str, Any]) -> str | Bad:
        try:
            return contents_of(self.conversations.messages(record)) or Bad("empty text")
        except Cannot as error:
            return Bad(str(error))


class Shaped:
    """A format whose records' text a shape makes."""

    def __init__(self, inner: Format, shape: Shape) -> None:
        self._inner, self._shape = inner, shape

    @staticmethod
    def fields(path: SourceFile, access: Access) -> list[str] | None:
        return None

    def decoded_bytes(self, file: int) -> int:
        return self._inner.decoded_bytes(file)

    def documents(self, file: int) -> tuple[np.ndarray, np.ndarray]:
        return self._inner.documents(file)

    def ranges(self, file: int, block_bytes: int) -> tuple[np.ndarray, np.ndarray]:
        return self._inner.ranges(file, block_bytes)

    def read(self, file: int, start: int, stop: int) -> list[Record]:
        return self._inner.read(file, start, stop)

    def expect(self, file: int, start: int, stop: int) -> None:
        self._inner.expect(file, start, stop)

    def decode(self, content: bytes | None) -> str | Bad:
        record = parse_json(content or b"")
        if isinstance(record, dict):
            return self._shape.text(cast("dict[str, Any]", record))
        return record if isinstance(record, Bad) else Bad("not a JSON object")

    def place(self, file: int, position: int) -> str:
        return self._inner.place(file, position)


# --------------------------------------------------------------------------- tables as JSON


class ParquetRecords(Parquet):
    """Several columns, a JSON object a row."""

    def __init__(self, paths: Sequence[Path | str | SourceFile], field: str, access: Access = LOCAL) -> None:
        super().__init__(paths, field, access)
        self._columns = tuple(field.split(SEPARATOR))

    def text_of_table(self, table: Any) -> Any:
        rows = json_rows({name: table.column(name).combine_chunks() for name in self._columns})
        return arrow.array(rows, arrow.large_binary())

    @staticmethod
    def fields(path: Path | str | SourceFile, access: Access = LOCAL) -> list[str] | None:
        return list(parquet_schema(as_files([path])[0], access).names)


class ArrowRecords(ArrowTable):
    """Several columns, a JSON object a row."""

    def __init__(self, paths: Sequence[Path | str | SourceFile], field: str, access: Access = LOCAL) -> None:
        super().__init__(paths, field, access)
        self._columns = tuple(field.split(SEPARATOR))

    def text_of_batch(self, batch: Any) -> Any:
        return batch.select(list(self._columns))

    def contents(self, column: Any) -> list[Any]:
        return json_rows({name: column.column(name) for name in self._columns})

    @staticmethod
    def fields(path: Path | str | SourceFile, access: Access = LOCAL) -> list[str] | None:
        return list(arrow_schema(as_files([path])[0], access).names)


def json_rows(columns: dict[str, Any]) -> list[bytes]:
    """The rows of some columns as JSON objects. A value that is not UTF-8 makes its object invalid."""
    values = [_json_values(column) for column in columns.values()]
    names = [orjson.dumps(name) + b":" for name in columns]
    return [
        b"{" + b",".join(name + value for name, value in zip(names, row, strict=True)) + b"}"
        for row in zip(*values, strict=True)
    ]


def _json_values(column: Any) -> list[bytes]:
    if holds_text(column.type):
        return [_json_text(value) for value in column.cast(arrow.large_binary()).to_pylist()]
    found: list[bytes] = []
    for value in column:
        try:
            python = _without_nulls(value.as_py())
            found.append(orjson.dumps(python, default=_no_value, option=orjson.OPT_PASSTHROUGH_DATETIME))
        except (UnicodeDecodeError, TypeError):
            found.append(UNDECODABLE)
    return found


def _json_text(value: bytes | None) -> bytes:
    if value is None:
        return b"null"
    try:
        return orjson.dumps(value.decode())
    except UnicodeDecodeError:
        return UNDECODABLE


def _no_value(_: Any) -> None:
    """What JSON does not know is no text either."""


def _without_nulls(value: Any) -> Any:
    """Tables give to each object of a list the keys of all others, as nulls."""
    if isinstance(value, dict):
        kept = cast("dict[str, Any]", value).items()
        return {key: _without_nulls(item) for key, item in kept if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in cast("list[Any]", value)]
    return value


def table_type(schema: Any, path: Sequence[str]) -> Any | None:
    """The type of a column, or of a field within it; None where there is none."""
    kind: Any = None
    for i, name in enumerate(path):
        if i and not arrow.types.is_struct(kind):
            return None
        place = schema.get_field_index(name) if i == 0 else kind.get_field_index(name)
        if place < 0:
            return None
        kind = (schema if i == 0 else kind).field(place).type
    return kind


def columns_of(shape: Shape, source: str, format_name: str, file: SourceFile, access: Access) -> list[str]:
    """The fields that a shape reads of a source, looked for in its first file. Raises DataError."""
    if format_name == "jsonl":
        names, schema = JsonLines.fields(file, access) or [], None
    elif format_name in ("parquet records", "arrow records"):
        schema = (parquet_schema if format_name == "parquet records" else arrow_schema)(file, access)
        names = list(schema.names)
    else:
        raise DataError(
            f'source "{source}": {file.path}: {format_name}, which has no fields; a template or chat reads '
            ".jsonl, .parquet and .arrow"
        )
    for name in shape.columns:
        if name not in names:
            found = f"{nearest(name, names)}found: {', '.join(names) or 'none'}"
            raise DataError(f'source "{source}": {file.path}: no field "{name}"; {found}')
    for path in shape.paths if schema is not None else ():
        kind = table_type(schema, path)
        if kind is None or not shape.takes(kind):
            name, found = ".".join(path), "absent" if kind is None else f"of type {kind}"
            raise DataError(f'source "{source}": {file.path}: "{name}" is {found}, expected {shape.taken}')
    return [*shape.columns, *(name for name in shape.optional if name in names)]

"""Token ids that were made already, as a column of lists in parquet and Arrow files: a document a row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow

from flame.data.cache import LOCAL, Access
from flame.data.files import as_files
from flame.data.formats import Bad, Record
from flame.data.ids import BYTES_PER_ID, checked
from flame.data.raw import SourceFile
from flame.data.saved import ArrowTable, arrow_schema
from flame.data.tables import Parquet, parquet_schema

arrow = cast("Any", pyarrow)


def holds_ids(kind: Any) -> bool:
    """Whether a column of this Arrow type may be token ids."""
    types = arrow.types
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    return any(check(kind) for check in lists) and types.is_integer(kind.value_type)


def arrays_of(column: Any) -> list[np.ndarray | Bad | None]:
    """The rows of a column of lists: [ids] each, of the dtype that is stored."""
    lists = column.cast(arrow.large_list(column.type.value_type))
    values, offsets = lists.values, lists.offsets.to_numpy()
    missing = values.is_null().to_numpy(zero_copy_only=False) if values.null_count else None
    ids = values.fill_null(0).to_numpy()
    found: list[np.ndarray | Bad | None] = []
    for i, valid in enumerate(lists.is_valid().to_pylist()):
        row = slice(int(offsets[i]), int(offsets[i + 1]))
        if not valid:
            found.append(None)
        elif missing is not None and missing[row].any():
            found.append(Bad("a token id is null"))
        else:
            found.append(ids[row])
    return found


def checked_rows(records: Sequence[Record], access: Access) -> list[Record]:
    """Records whose ids have been looked at."""
    vocabulary = access.vocabulary
    assert vocabulary is not None, "ids mean nothing without a tokenizer"
    return [
        (row, checked(content, vocabulary) if isinstance(content, np.ndarray) else content)
        for row, content in records
    ]


class ListsOfIds:
    """What the rows of such a column are, in either kind of file."""

    def decode(self, content: bytes | None) -> str | Bad:
        return Bad("no token ids: null")

    def contents(self, column: Any) -> list[Any]:
        return arrays_of(column)


class ParquetIds(ListsOfIds, Parquet):
    """A list of ids a row."""

    width = 2  # an id of 8 bytes counts as 4 of text

    def text_bytes(self, chunk: Any) -> int:
        return BYTES_PER_ID * chunk.num_values  # what is stored may be a byte an id

    def as_read(self, column: Any) -> Any:
        return column.cast(arrow.large_list(column.type.value_type))

    @staticmethod
    def fields(path: Path | str | SourceFile, access: Access = LOCAL) -> list[str] | None:
        schema = parquet_schema(as_files([path])[0], access)
        return [field.name for field in schema if holds_ids(field.type)]

    def read(self, file: int, start: int, stop: int) -> list[Record]:
        return checked_rows(super().read(file, start, stop), self._access)


class ArrowIds(ListsOfIds, ArrowTable):
    """A list of ids a row; local files are mapped into memory."""

    @staticmethod
    def fields(path: Path | str | SourceFile, access: Access = LOCAL) -> list[str] | None:
        return [field.name for field in arrow_schema(as_files([path])[0], access) if holds_ids(field.type)]

    def decoded_bytes(self, file: int) -> int:
        return BYTES_PER_ID * sum(len(chunk.flatten()) for chunk in self._column(file)[0])

    def read(self, file: int, start: int, stop: int) -> list[Record]:
        return checked_rows(super().read(file, start, stop), self._access)

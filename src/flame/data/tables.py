"""Formats of tables: parquet."""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from flame.data.blocks import even_ranges
from flame.data.cache import LOCAL, Access
from flame.data.compressed import Undecodable
from flame.data.files import OPEN_FILES, as_files, open_raw, undecodable
from flame.data.formats import Bad, Record, decode_utf8
from flame.data.raw import RawFile, SourceFile, is_url, shrunk
from flame.errors import DataError

parquet = cast("Any", pyarrow.parquet)  # pyarrow ships no types
ipc = cast("Any", pyarrow.ipc)
arrow = cast("Any", pyarrow)

LARGE_GROUP = 16 * 2**20  # bytes of text; larger row groups are decoded once per node, into the block cache
CACHED_BATCH = 256 * 2**10  # bytes of text in a batch of the cache
CACHED_BYTES = 256 * 2**20  # of decoded row groups, per source


class Parquet:
    """A document a row; a range is in rows of the file, within one row group."""

    width = 1  # bytes in memory for a byte of text

    def __init__(self, paths: Sequence[Path | str | SourceFile], field: str, access: Access = LOCAL) -> None:
        self._files_read, self._field = as_files(paths), field
        self._columns: tuple[str, ...] = (field,)  # that are read
        self._paths = [file.path for file in self._files_read]
        self._access = access
        self._large: OrderedDict[tuple[int, int], tuple[BinaryIO, Any]] = OrderedDict()
        self._files: OrderedDict[int, tuple[Any, np.ndarray]] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._cached_bytes = 0

    @staticmethod
    def fields(path: Path | str | SourceFile, access: Access = LOCAL) -> list[str] | None:
        schema = parquet_schema(as_files([path])[0], access)
        return [field.name for field in schema if holds_text(field.type)]

    def decoded_bytes(self, file: int) -> int:
        return sum(size for _, size in self._row_groups(file))

    def documents(self, file: int) -> tuple[np.ndarray, np.ndarray]:
        rows = sum(rows for rows, _ in self._row_groups(file))
        return even_ranges(0, rows, rows)

    def ranges(self, file: int, block_bytes: int) -> tuple[np.ndarray, np.ndarray]:
        starts: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
        stops, first = [starts[0]], 0
        for rows, size in self._row_groups(file):
            cut = even_ranges(first, first + rows, min(rows, max(1, -(-size // block_bytes))))
            starts.append(cut[0])
            stops.append(cut[1])
            first += rows
        return np.concatenate(starts), np.concatenate(stops)

    def read(self, file: int, start: int, stop: int) -> list[Record]:
        firsts = self._file(file)[1]
        if stop > firsts[-1]:
            raise DataError(
                f"{self._paths[file]}: has {firsts[-1]} rows, but had at least {stop} when the run began; "
                "put the file back as it was"
            )
        group = int(np.searchsorted(firsts, start, side="right")) - 1
        first = int(firsts[group])
        try:
            if self._row_groups(file)[group][1] > LARGE_GROUP:
                contents = self._rows_of_large(file, group, start - first, stop - first)
            else:
                contents = self.contents(self._column(file, group).slice(start - first, stop - start))
        except Undecodable as error:
            if not self._access.skip_corrupt:
                raise undecodable(self._paths[file], f"row group {group}: ", error) from None
            lost = Bad(f"row group {group} cannot be decoded: {error}")
            return [(row, lost) for row in range(start, stop)]
        return list(zip(range(start, stop), contents, strict=True))

    def expect(self, file: int, start: int, stop: int) -> None:
        pass

    def decode(self, content: bytes | None) -> str | Bad:
        return decode_utf8(content)

    def text_bytes(self, chunk: Any) -> int:
        """The size of a chunk of the column by its metadata."""
        return chunk.total_uncompressed_size

    def text_of_table(self, table: Any) -> Any:
        """The text of a row group's columns, an array."""
        return self.as_read(table.column(self._field)).combine_chunks()

    def as_read(self, column: Any) -> Any:
        """The column in the type that `contents` takes."""
        return column.cast(arrow.large_binary())

    def contents(self, column: Any) -> list[Any]:
        """The rows of a piece of the column."""
        return column.to_pylist()

    def place(self, file: int, position: int) -> str:
        return f"row {position}"

    def _row_groups(self, file: int) -> list[tuple[int, int]]:
        """(rows, bytes of the text column) of each row group."""
        metadata = self._file(file)[0].metadata
        found: list[tuple[int, int]] = []
        for g in range(metadata.num_row_groups):
            group = metadata.row_group(g)
            columns = (group.column(c) for c in range(group.num_columns))
            names = tuple(f"{name}." for name in self._columns)
            stored = (c for c in columns if f"{c.path_in_schema}.".startswith(names))
            size = sum(self.text_bytes(c) for c in stored)
            found.append((int(group.num_rows), int(size)))
        return found

    def _file(self, file: int) -> tuple[Any, np.ndarray]:
        """The open file and the first row of each row group, and of the file's end."""
        known = self._files.pop(file, None)
        if known is None:
            if len(self._files) >= OPEN_FILES:
                self._files.popitem(last=False)[1][0].close()
            opened = _open_parquet(self._files_read[file], self._access)
            missing = next((name for name in self._columns if name not in opened.schema_arrow.names), None)
            if missing is not None:
                names = ", ".join(opened.schema_arrow.names)
                raise DataError(f'{self._paths[file]}: no column "{missing}"; found: {names}')
            rows = [opened.metadata.row_group(g).num_rows for g in range(opened.metadata.num_row_groups)]
            known = opened, np.cumsum([0, *rows])
        self._files[file] = known
        return known

    def _column(self, file: int, group: int) -> Any:
        """The text column of a row group as bytes, from the cache where it is there."""
        column = self._groups.pop((file, group), None)
        if column is None:
            column = self._decode(file, group)
            self._cached_bytes += column.nbytes
            while self._groups and self._cached_bytes > self.width * CACHED_BYTES:
                self._cached_bytes -= self._groups.popitem(last=False)[1].nbytes
        self._groups[file, group] = column
        return column

    def _decode(self, file: int, group: int) -> Any:
        """The text column of a row group as bytes. Raises Undecodable, and DataError on a failed read."""
        path = self._paths[file]
        try:
            table = self._file(file)[0].read_row_group(group, columns=list(self._columns), use_threads=False)
            return self.text_of_table(table)
        except (arrow.ArrowException, OSError, KeyError) as error:
            raw = open_raw(path)
            found, expected = raw.size, self._files_read[file].size
            raw.close()
            if found < expected:
                raise shrunk(path, found, expected) from None
            if isinstance(error, OSError) and error.errno is not None:
                raise DataError(f"{path}: row group {group}: cannot be read: {error}") from None
            raise Undecodable(" ".join(str(error).split())) from None

    def __del__(self) -> None:
        for entry, _ in self._large.values():
            entry.close()

    def _rows_of_large(self, file: int, group: int, start: int, stop: int) -> list[Any]:
        """Rows of a row group that is kept in the block cache in small batches."""
        rows, size = self._row_groups(file)[group]
        batch = max(1, rows * CACHED_BATCH // size)

        def make(out: BinaryIO) -> None:
            table = arrow.table({"text": self._decode(file, group)})
            options = ipc.IpcWriteOptions(compression="zstd")
            with ipc.new_file(arrow.PythonFile(out, mode="w"), table.schema, options=options) as writer:
                writer.write_table(table, max_chunksize=batch)

        opened = self._large.pop((file, group), None)
        if opened is None:
            if len(self._large) >= OPEN_FILES:
                self._large.popitem(last=False)[1][0].close()
            key = f"parquet/{group}/{self._field}/{self._files_read[file].key}"
            entry = os.fdopen(self._access.cache.open(key, make), "rb")
            opened = entry, ipc.open_file(arrow.PythonFile(entry, mode="r"))
        self._large[file, group] = opened
        contents: list[Any] = []
        for i in range(start // batch, -(-stop // batch)):
            skipped = max(0, start - i * batch)
            column = opened[1].get_batch(i).column(0)
            contents += self.contents(column.slice(skipped, min(batch, stop - i * batch) - skipped))
        return contents


class RemoteReader(io.RawIOBase):
    """A raw file as pyarrow reads one."""

    def __init__(self, raw: RawFile) -> None:
        self._raw, self._at = raw, 0

    def read(self, size: int = -1) -> bytes:
        content = self._raw.read(self._at, self._raw.size - self._at if size < 0 else size)
        self._at += len(content)
        return content

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._raw.size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


def parquet_schema(file: SourceFile, access: Access) -> Any:
    """The columns of a file. Raises DataError."""
    return _open_parquet(file, access).schema_arrow


def _open_parquet(file: SourceFile, access: Access) -> Any:
    try:
        if not is_url(file.path):
            return parquet.ParquetFile(file.path, memory_map=False)
        return parquet.ParquetFile(arrow.PythonFile(RemoteReader(open_raw(file, access)), mode="r"))
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{file.path}: cannot be read as parquet: {error}") from None


def holds_text(kind: Any) -> bool:
    """Whether a column of this Arrow type may be text."""
    types = arrow.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    checks = (
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_binary,
        types.is_large_binary,
    )
    return any(check(kind) for check in checks)

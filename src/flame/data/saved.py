"""Arrow files, data sets that `datasets` saved to disk, and those of the hub: all are Arrow files."""

from __future__ import annotations

import json
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow
import pyarrow.ipc

from flame.data.blocks import even_ranges
from flame.data.cache import LOCAL, Access
from flame.data.config import SourceConfig
from flame.data.files import OPEN_FILES, as_files, open_raw
from flame.data.formats import Bad, Record, decode_utf8
from flame.data.raw import SourceFile, is_url, shrunk
from flame.data.tables import RemoteReader, holds_text
from flame.errors import DataError

ipc = cast("Any", pyarrow.ipc)
arrow = cast("Any", pyarrow)

END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream of batches that was written to its end


class ArrowTable:
    """A document a row; local files are mapped into memory, not read. A range is in rows of the file."""

    def __init__(self, paths: Sequence[Path | str | SourceFile], field: str, access: Access = LOCAL) -> None:
        self._files, self._field, self._access = as_files(paths), field, access
        self._columns: tuple[str, ...] = (field,)  # that are read
        self._open: OrderedDict[int, tuple[list[Any], np.ndarray]] = OrderedDict()

    @staticmethod
    def fields(path: Path | str | SourceFile, access: Access = LOCAL) -> list[str] | None:
        return [field.name for field in arrow_schema(as_files([path])[0], access) if holds_text(field.type)]

    def decoded_bytes(self, file: int) -> int:
        return sum(int(chunk.nbytes) for chunk in self._column(file)[0])

    def documents(self, file: int) -> tuple[np.ndarray, np.ndarray]:
        rows = int(self._column(file)[1][-1])
        return even_ranges(0, rows, rows)

    def ranges(self, file: int, block_bytes: int) -> tuple[np.ndarray, np.ndarray]:
        rows = int(self._column(file)[1][-1])
        return even_ranges(0, rows, min(rows, max(1, -(-self.decoded_bytes(file) // block_bytes))))

    def read(self, file: int, start: int, stop: int) -> list[Record]:
        chunks, firsts = self._column(file)
        known = self._files[file]
        if not is_url(known.path):  # a mapped file that lost its end would end the process
            raw = open_raw(known)
            found = raw.size
            raw.close()
            if found < known.size:
                raise shrunk(known.path, found, known.size)
        contents: list[Any] = []
        first = int(np.searchsorted(firsts, start, side="right")) - 1
        for i in range(first, int(np.searchsorted(firsts, stop))):
            at = int(firsts[i])
            piece = chunks[i].slice(max(0, start - at), min(stop, int(firsts[i + 1])) - max(start, at))
            contents += self.contents(piece)
        return list(zip(range(start, stop), contents, strict=True))

    def expect(self, file: int, start: int, stop: int) -> None:
        pass  # the system reads ahead

    def decode(self, content: bytes | None) -> str | Bad:
        return decode_utf8(content)

    def text_of_batch(self, batch: Any) -> Any:
        """What is read of a batch."""
        return batch.column(self._field)

    def contents(self, column: Any) -> list[Any]:
        """The rows of a piece of the column."""
        return column.cast(arrow.large_binary()).to_pylist()

    def place(self, file: int, position: int) -> str:
        return f"row {position}"

    def _column(self, file: int) -> tuple[list[Any], np.ndarray]:
        """The text column's chunks, and the first row of each and of the file's end."""
        known = self._open.pop(file, None)
        if known is None:
            if len(self._open) >= OPEN_FILES:
                self._open.popitem(last=False)
            schema, batches = _open_arrow(self._files[file], self._access)
            missing = next((name for name in self._columns if name not in schema.names), None)
            if missing is not None:
                names = ", ".join(schema.names)
                raise DataError(f'{self._files[file].path}: no column "{missing}"; found: {names}')
            chunks = [self.text_of_batch(batch) for batch in batches if batch.num_rows]
            known = chunks, np.cumsum([0, *(len(chunk) for chunk in chunks)])
        self._open[file] = known
        return known


def arrow_schema(file: SourceFile, access: Access) -> Any:
    """The columns of a file. Raises DataError."""
    return _open_arrow(file, access)[0]


def _open_arrow(file: SourceFile, access: Access) -> tuple[Any, list[Any]]:
    """The schema and the batches of an Arrow file, of either of its two layouts. Raises DataError."""
    raw = open_raw(file, access)
    try:
        if raw.size < file.size:
            raise shrunk(file.path, raw.size, file.size)
        as_file = raw.read(0, 6) == b"ARROW1"
        whole = as_file or raw.read(raw.size - len(END), len(END)) == END
    finally:
        raw.close()
    if not whole:
        raise DataError(f"{file.path}: truncated: it does not end as an Arrow stream does; replace the file")
    try:
        remote = is_url(file.path)
        stored = (
            arrow.PythonFile(RemoteReader(open_raw(file, access)), mode="r")
            if remote
            else arrow.memory_map(os.fspath(file.path))
        )
        reader = (ipc.open_file if as_file else ipc.open_stream)(stored)
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)] if as_file else list(reader)
        return reader.schema, batches
    except (arrow.ArrowException, OSError) as error:
        shown = " ".join(str(error).split())
        raise DataError(f"{file.path}: cannot be read as Arrow: {shown}; replace the file") from None


# ---------------------------------------------------------------------------------- data sets


def saved_files(directory: Path, split: str | None) -> list[Path] | None:
    """The files of a data set that `save_to_disk` wrote; None where this is no such directory.
    Raises DataError where a split has to be named."""
    splits = directory / "dataset_dict.json"
    try:
        if splits.exists():
            names: list[str] = json.loads(splits.read_text())["splits"]
            chosen = names[0] if split is None and len(names) == 1 else split
            if chosen not in names:
                raise DataError(
                    f'{directory}: split "{split}": choose one by split = "...": {", ".join(names)}'
                )
            directory = directory / str(chosen)
        state = directory / "state.json"
        if not state.exists():
            return None
        return [directory / entry["filename"] for entry in json.loads(state.read_text())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{directory}: cannot be read as a saved data set: {error!r}") from None


def hub_files(config: SourceConfig, base: Path) -> list[tuple[str, Path | str]]:
    """(name, path) of the Arrow files of a data set that the `datasets` package finds by its name.
    Raises DataError."""
    split = config.split or "train"
    where = f'source "{config.name}": dataset = "{config.dataset}"'
    if not re.fullmatch(r"\w+(\.\w+)*", split):
        raise DataError(f'{where}: split = "{split}": expected the name of one whole split')
    try:
        import datasets  # an extra, and slow to import
    except ImportError:
        raise DataError(f'{where}: needs the datasets package: pip install "flame[hub]"') from None
    local = base / str(config.dataset)
    name = str(local) if local.is_dir() else config.dataset
    try:
        found = cast("Any", datasets).load_dataset(name, config.config, split=split)
    except Exception as error:  # whatever its file systems and builders raise
        raise DataError(f"{where}: cannot be loaded: {error}") from None
    return [(Path(entry["filename"]).name, Path(entry["filename"])) for entry in found.cache_files]

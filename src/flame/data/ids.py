"""Token ids that were made already: what a document of them is, and the files that hold nothing else.

Flat files (.npy, .bin as nanoGPT writes it) are documents one after another, each with EOS at its end.
Megatron's .bin has an index beside it (.idx; megatron/core/datasets/indexed_dataset.py, version 1).
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from flame.data.blocks import even_ranges
from flame.data.cache import Access, Vocabulary
from flame.data.files import OPEN_FILES, as_files, look, open_raw
from flame.data.formats import Bad, Record
from flame.data.raw import HASHED, RawFile, SourceFile, is_url, read_exactly, shrunk
from flame.errors import DataError

BYTES_PER_ID = 4  # of text, nearly: blocks of ids are as large as blocks of the text they stand for
PART_IDS = 2**18  # longer documents are split, as text of 1 MiB is
SCANNED = 2**20  # ids looked through at once for the end of a document
T = TypeVar("T")

FLAT_DTYPES = ("uint16", "uint32", "int32", "int64")


def checked(ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray | Bad:
    """A document's ids without EOS at their end (and BOS at their beginning, where the tokenizer adds it), or
    why it cannot be trained: a view, [ids]."""
    if not len(ids):
        return Bad("no token ids")
    if ids.dtype.kind == "f" and not (np.rint(ids) == ids).all():
        return Bad("a token id is no whole number")
    for found in (int(ids.min()), int(ids.max())):
        if not 0 <= found < vocabulary.size:
            return Bad(f"token id {found} is outside the tokenizer's vocabulary of {vocabulary.size}")
    first = int(vocabulary.bos is not None and ids[0] == vocabulary.bos)
    inner = ids[first : len(ids) - int(ids[-1] == vocabulary.eos)]
    return inner if len(inner) else Bad("no token id but EOS")


def split_ids(ids: np.ndarray) -> list[np.ndarray]:
    """The parts of a document: views."""
    return [ids[i : i + PART_IDS] for i in range(0, len(ids), PART_IDS)]


def with_ends(ids: np.ndarray, begins: bool, ends: bool, vocabulary: Vocabulary) -> np.ndarray:
    """The tokens of a part: int32, EOS after the last, BOS before the first where the tokenizer adds it."""
    before = [vocabulary.bos] if begins and vocabulary.bos is not None else []
    tokens = np.empty(len(before) + len(ids) + ends, dtype=np.int32)
    tokens[: len(before)] = before
    tokens[len(before) : len(before) + len(ids)] = ids
    if ends:
        tokens[-1] = vocabulary.eos
    return tokens


class Stored:
    """An array in a file: mapped into memory where the file is local, else read where it is asked for."""

    def __init__(self, file: SourceFile, access: Access, dtype: np.dtype, offset: int, count: int) -> None:
        self._file, self._dtype, self._offset, self.count = file, dtype, offset, count
        self._raw: RawFile | None = open_raw(file, access) if is_url(file.path) else None
        self._map: np.ndarray | None = None
        if self._raw is None and count:
            self._map = np.memmap(file.path, dtype, "r", offset, (count,)).view(np.ndarray)

    def get(self, start: int, stop: int) -> np.ndarray:
        """Its elements [start, stop). Raises DataError."""
        if self._raw is not None:
            size, at = self._dtype.itemsize, self._offset
            content = read_exactly(self._file.path, self._raw, at + start * size, (stop - start) * size)
            return np.frombuffer(content, self._dtype)
        if self._map is None:
            return np.zeros(0, self._dtype)
        try:
            found = os.stat(self._file.path).st_size  # noqa: PTH116 (the hot path)
        except OSError as error:
            raise DataError(f"{self._file.path}: cannot be read: {error}") from None
        if found < self._file.size:  # what is mapped and gone would end the process
            raise shrunk(self._file.path, found, self._file.size)
        return self._map[start:stop]

    def expect(self, start: int, stop: int) -> None:
        """These will be read soon."""
        if self._raw is not None:
            size = self._dtype.itemsize
            self._raw.expect(self._offset + start * size, (stop - start) * size)

    def __del__(self) -> None:
        raw: RawFile | None = getattr(self, "_raw", None)  # absent where opening it failed
        if raw is not None:
            raw.close()


class IdFormat(Generic[T]):
    """What the formats of ids share: open files, the least lately used closed first."""

    def __init__(self, paths: Sequence[Path | str | SourceFile], field: str, access: Access) -> None:
        assert access.vocabulary is not None, "ids mean nothing without a tokenizer"
        self._files, self._field, self._access = as_files(paths), field, access
        self._vocabulary = access.vocabulary
        self._opened: OrderedDict[int, T] = OrderedDict()

    @staticmethod
    def fields(path: Path | str | SourceFile, access: Access) -> list[str] | None:
        return None

    def decode(self, content: bytes | None) -> str | Bad:
        return Bad("no token ids")  # what `read` gives is decoded already

    def _open(self, file: SourceFile) -> T:
        raise AssertionError("each format opens its own files")

    def _at(self, file: int) -> T:
        known = self._opened.pop(file, None)
        if known is None:
            if len(self._opened) >= OPEN_FILES:
                self._opened.popitem(last=False)
            known = self._open(self._files[file])
        self._opened[file] = known
        return known


# --------------------------------------------------------------------------------------- flat files


class FlatIds(IdFormat[Stored]):
    """Documents up to and including EOS, one after another; a range is in ids, and a document belongs to
    where it begins. EOS alone is no document, as a blank line is none. The file's end ends the last one."""

    def decoded_bytes(self, file: int) -> int:
        return BYTES_PER_ID * self._at(file).count

    def documents(self, file: int) -> tuple[np.ndarray, np.ndarray]:
        ids = self._at(file)
        found = [np.zeros(0, dtype=np.int64)]
        for at in range(0, ids.count, SCANNED):
            piece = ids.get(at, min(ids.count, at + SCANNED))
            found.append(np.flatnonzero(piece == self._vocabulary.eos) + at + 1)
        ends = np.concatenate(found)
        stops = ends if len(ends) and ends[-1] == ids.count else np.append(ends, ids.count)
        starts = np.concatenate([[0], stops[:-1]]).astype(np.int64)
        held = stops - starts > 1
        held[len(ends) :] = stops[len(ends) :] > starts[len(ends) :]
        return starts[held], stops[held]

    def ranges(self, file: int, block_bytes: int) -> tuple[np.ndarray, np.ndarray]:
        count = self._at(file).count
        return even_ranges(0, count, -(-count * BYTES_PER_ID // block_bytes))

    def read(self, file: int, start: int, stop: int) -> list[Record]:
        ids, eos = self._at(file), self._vocabulary.eos
        first = max(0, start - 1)  # a document begins at `start` only where EOS comes before
        held = ids.get(first, stop)
        begins: list[int] = (np.flatnonzero(held[:-1] == eos) + first + 1).tolist()
        if not start:
            begins.insert(0, 0)
        if not begins:
            return []
        end = stop if held[-1] == eos else self._end_from(ids, stop)
        if end > stop:
            held = ids.get(first, end)
        found: list[Record] = []
        for begin, after in zip(begins, [*begins[1:], end], strict=True):
            document = held[begin - first : after - first]
            if len(document) > 1 or document[0] != eos:
                found.append((begin, checked(document, self._vocabulary)))
        return found

    def _end_from(self, ids: Stored, at: int) -> int:
        """Where the document ends that goes on at a position."""
        size = SCANNED // 64
        while at < ids.count:
            found = np.flatnonzero(ids.get(at, min(ids.count, at + size)) == self._vocabulary.eos)
            if len(found):
                return at + int(found[0]) + 1
            at, size = at + size, min(SCANNED, 2 * size)
        return ids.count

    def expect(self, file: int, start: int, stop: int) -> None:
        self._at(file).expect(start, stop)

    def place(self, file: int, position: int) -> str:
        return f"token {position}"

    def _stored(self, file: SourceFile, dtype: np.dtype, offset: int, count: int) -> Stored:
        eos, most = self._vocabulary.eos, int(np.iinfo(dtype).max)
        if eos > most:
            raise DataError(
                f"{file.path}: {dtype.name} holds ids up to {most}, and the tokenizer's EOS, which ends each "
                f"document, is {eos}: the ids are of another tokenizer"
            )
        return Stored(file, self._access, dtype, offset, count)


class FlatBin(FlatIds):
    """Ids without a header, of the dtype that the source names (`field`)."""

    def _open(self, file: SourceFile) -> Stored:
        dtype = np.dtype(self._field).newbyteorder("<")
        if file.size % dtype.itemsize:
            raise DataError(
                f"{file.path}: {file.size} bytes are no whole number of {dtype.name} ids: the file is "
                "truncated, or ids_dtype is another"
            )
        return self._stored(file, dtype, 0, file.size // dtype.itemsize)


class Npy(FlatIds):
    """An array of one dimension, as numpy.save writes it."""

    def _open(self, file: SourceFile) -> Stored:
        raw = open_raw(file, self._access)
        try:
            head = io.BytesIO(raw.read(0, HASHED))
        finally:
            raw.close()
        try:
            version = np.lib.format.read_magic(head)
            if version == (1, 0):
                shape, _, dtype = np.lib.format.read_array_header_1_0(head)
            else:
                shape, _, dtype = np.lib.format.read_array_header_2_0(head)
        except ValueError as error:
            raise DataError(f"{file.path}: cannot be read as .npy: {error}") from None
        if len(shape) != 1 or dtype.name not in FLAT_DTYPES:
            raise DataError(
                f"{file.path}: holds {dtype.name} of shape {shape}; expected one dimension of token ids, "
                f"{', '.join(FLAT_DTYPES)}"
            )
        expected = head.tell() + shape[0] * dtype.itemsize
        if file.size < expected:
            raise DataError(
                f"{file.path}: truncated: {file.size} bytes of the {expected} that its header says; "
                "replace the file"
            )
        return self._stored(file, dtype, head.tell(), shape[0])


# ------------------------------------------------------------------------------------------ Megatron

MAGIC = b"MMIDIDX\0\0"
HEADER = 34  # bytes: magic, version, dtype, counts of sequences and of document bounds
DTYPES = dict(enumerate(["uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"], 1))


def index_path(path: Path | str) -> Path | str:
    """The index beside a .bin."""
    if isinstance(path, Path):
        return path.with_suffix(".idx")
    name, mark, query = path.partition("?")
    return name.removesuffix(".bin") + ".idx" + mark + query


def look_with_index(name: str, path: Path | str) -> SourceFile:
    """A .bin as it is now; its hash knows its index. Raises DataError."""
    file, index = look(name, path), look(name, index_path(path))
    digest = hashlib.blake2b(f"{file.hash} {index.hash} {index.size}".encode(), digest_size=16)
    return SourceFile(name, path, file.size, digest.hexdigest())


class Indexed(NamedTuple):
    """An open .bin with its index."""

    ids: Stored
    first: np.ndarray  # int64 [sequences]: where each begins, in ids
    size: np.ndarray  # int32 [sequences]: ids in each
    bounds: np.ndarray  # int64 [documents + 1]: the first sequence of each
    before: np.ndarray  # int64 [documents + 1]: ids of all documents before


class Megatron(IdFormat[Indexed]):
    """A document is the sequences that the index gives it; a range is in documents."""

    def decoded_bytes(self, file: int) -> int:
        return BYTES_PER_ID * int(self._at(file).before[-1])

    def documents(self, file: int) -> tuple[np.ndarray, np.ndarray]:
        count = len(self._at(file).bounds) - 1
        return even_ranges(0, count, count)

    def ranges(self, file: int, block_bytes: int) -> tuple[np.ndarray, np.ndarray]:
        before = self._at(file).before
        wanted = np.arange(0, before[-1], -(-block_bytes // BYTES_PER_ID))
        starts = np.unique(np.searchsorted(before, wanted)) if len(before) > 1 else wanted[:0]
        starts = starts[starts < len(before) - 1]
        return starts, np.append(starts[1:], len(before) - 1)[: len(starts)]

    def read(self, file: int, start: int, stop: int) -> list[Record]:
        opened, found = self._at(file), list[Record]()
        for document in range(start, stop):
            pieces: list[np.ndarray] = []
            begin = end = -1
            for s in range(int(opened.bounds[document]), int(opened.bounds[document + 1])):
                at, size = int(opened.first[s]), int(opened.size[s])
                if at != end:  # sequences of a document lie one behind the other, nearly always
                    if end > begin:
                        pieces.append(opened.ids.get(begin, end))
                    begin = at
                end = at + size
            if end > begin:
                pieces.append(opened.ids.get(begin, end))
            ids = pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, np.int64), *pieces])
            found.append((document, checked(ids, self._vocabulary)))
        return found

    def expect(self, file: int, start: int, stop: int) -> None:
        opened = self._at(file)
        sequences = int(opened.bounds[start]), int(opened.bounds[stop]) - 1
        if sequences[0] <= sequences[1]:
            begin, end = (int(opened.first[s]) for s in sequences)
            opened.ids.expect(begin, max(begin, end + int(opened.size[sequences[1]])))

    def place(self, file: int, position: int) -> str:
        return f"document {position}"

    def _open(self, file: SourceFile) -> Indexed:
        index = look(file.name, index_path(file.path))
        damaged = DataError(f"{index.path}: cannot be read as Megatron's index; replace it")
        head = Stored(index, self._access, np.dtype("u1"), 0, min(index.size, HEADER))
        content = head.get(0, head.count).tobytes()
        version, kind = int.from_bytes(content[9:17], "little"), content[17] if len(content) == HEADER else 0
        if len(content) < HEADER or not content.startswith(MAGIC) or kind not in DTYPES or version != 1:
            raise damaged
        sequences, bounds = (int.from_bytes(content[i : i + 8], "little") for i in (18, 26))
        if index.size < HEADER + 12 * sequences + 8 * bounds or not bounds:
            raise damaged
        arrays = [("<i4", 0, sequences), ("<i8", 4 * sequences, sequences), ("<i8", 12 * sequences, bounds)]
        size, first, bound = (
            Stored(index, self._access, np.dtype(dtype), HEADER + at, count).get(0, count)
            for dtype, at, count in arrays
        )
        dtype = np.dtype(DTYPES[kind]).newbyteorder("<")
        ids = Stored(file, self._access, dtype, 0, file.size // dtype.itemsize)
        rest = first % dtype.itemsize
        if bound[0] or bound[-1] != sequences or (np.diff(bound) < 0).any():
            raise damaged
        if sequences and (rest.any() or size.min() < 0 or first.min() < 0):
            raise damaged
        needed = int((first + size.astype(np.int64) * dtype.itemsize).max(initial=0))
        if needed > file.size:
            raise DataError(
                f"{file.path}: truncated: {file.size} bytes, and its index {index.path} speaks of {needed}; "
                "put both back as they were written"
            )
        before = np.concatenate([[0], np.cumsum(size, dtype=np.int64)])[bound]
        return Indexed(ids, first // dtype.itemsize, size, bound, before)

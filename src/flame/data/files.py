"""The text of a source's files as bytes that can be read anywhere, whatever stores them.

A view is one file seen so. Positions are bytes of decoded text, so that a document is called the same
compressed or not. Where the length of a stream's text is not known yet, a range of it is written in
negative numbers, as parts of an estimated length E: [-E, 0) is the whole, and `place` turns a part into
the true positions once the text has been decoded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import count, pairwise, takewhile
from pathlib import Path
from typing import Protocol

import numpy as np

from flame.data.blocks import even_ranges
from flame.data.cache import Access
from flame.data.compressed import (
    LARGEST_FRAME,
    Frames,
    Undecodable,
    compression,
    decode_frame,
    decode_stream,
    estimated_size,
    read_table,
    remembered_frames,
    walk_frames,
    write_frames,
)
from flame.data.raw import LocalFile, RawFile, SourceFile, ends_hash, is_url, read_exactly, shrunk
from flame.data.remote import RemoteFile
from flame.errors import DataError

OPEN_FILES = 64  # kept open by one reader
KEPT_BYTES = 64 * 2**20  # of decoded frames, per source

Ranges = tuple[np.ndarray, np.ndarray]  # (starts, stops), int64


class View(Protocol):
    """One file's text. Raises DataError on what cannot be read."""

    def estimate(self) -> int:
        """The length of the text, nearly; reads no text."""
        ...

    def size(self) -> int:
        """The length of the text."""
        ...

    def cut(self, block_bytes: int) -> Ranges:
        """Ranges of about `block_bytes` that tile the text; reads no text."""
        ...

    def place(self, start: int, stop: int) -> tuple[int, int]:
        """The positions of a range of `cut`."""
        ...

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start`, fewer only at the end."""
        ...

    def corrupt(self, start: int, stop: int) -> list[tuple[int, str]]:
        """What in a range that was read could not be decoded: (position, reason). It reads as newlines."""
        ...

    def expect(self, start: int, stop: int) -> None:
        """A range of `cut` will be read soon."""
        ...

    def close(self) -> None: ...


class Files:
    """The files of one source, the least lately used closed first."""

    def __init__(self, files: Sequence[SourceFile], access: Access) -> None:
        self._files, self._access = files, access
        self._open: OrderedDict[int, View] = OrderedDict()
        self._frames = FrameMemory(KEPT_BYTES)

    def __getitem__(self, file: int) -> View:
        view = self._open.get(file)
        if view is not None:
            if len(self._open) > 1:
                self._open.move_to_end(file)
            return view
        if len(self._open) >= OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        view = self._open[file] = open_view(self._files[file], self._access, self._frames)
        return view

    def read_exactly(self, file: int, start: int, length: int) -> bytes:
        content = self[file].read(start, length)
        if len(content) < length:
            raise self.shrunk(file, start + len(content), start + length)
        return content

    def shrunk(self, file: int, found: int, expected: int) -> DataError:
        """The error of a file that ends before it should."""
        return shrunk(self._files[file].path, found, expected)

    def __del__(self) -> None:
        for view in self._open.values():
            view.close()


def as_files(paths: Sequence[Path | str | SourceFile]) -> list[SourceFile]:
    """Files named by path alone among them, looked at."""
    return [path if isinstance(path, SourceFile) else look(Path(path).name, path) for path in paths]


def look(name: str, path: Path | str) -> SourceFile:
    """A file as it is now. Raises DataError."""
    raw = open_raw(path)
    try:
        size = raw.size
        return SourceFile(name, path, size, ends_hash(raw, size))
    finally:
        raw.close()


def open_raw(path: Path | str | SourceFile, access: Access | None = None) -> RawFile:
    """A file's bytes as they are stored; those of a known remote one by way of the cache of `access`.
    Raises DataError."""
    name = path.path if isinstance(path, SourceFile) else path
    if not is_url(name):
        return LocalFile(Path(name))
    if isinstance(path, SourceFile) and access is not None:
        return RemoteFile(str(name), access, path.key, path.size)
    return RemoteFile(str(name))


def head_lines(path: Path | str | SourceFile, access: Access) -> Iterator[bytes]:
    """A file's lines from its beginning, as many as are asked for; of a broken file those before the break.
    Raises DataError on a failed read."""
    name = path.path if isinstance(path, SourceFile) else path
    raw, kind = open_raw(path, access), compression(name)
    try:
        pieces = decode_stream(raw, kind) if kind else (raw.read(at, 2**18) for at in count(0, 2**18))
        rest = None
        try:
            for piece in takewhile(bool, pieces):
                *lines, rest = ((rest or b"") + piece).split(b"\n")
                yield from lines
        except Undecodable as error:
            if rest is None:
                raise undecodable(name, "", error) from None
        yield rest or b""
    finally:
        raw.close()


def open_view(file: SourceFile, access: Access, memory: FrameMemory) -> View:
    """A file's text. Raises DataError where the file is not what it was, or not what its suffix says."""
    raw, kind = open_raw(file, access), compression(file.path)
    try:
        if raw.size < file.size:
            raise shrunk(file.path, raw.size, file.size)
        if kind is None:
            return PlainView(raw)
        frames = _frames(file, raw, access) if kind == "zst" else None
        if frames is not None and frames.largest <= LARGEST_FRAME:
            return FramedView(file.path, raw, frames, access, memory)
        return StreamView(file, raw, kind, frames, access, memory)
    except Undecodable as error:
        raw.close()
        raise undecodable(file.path, "", error) from None
    except BaseException:
        raw.close()
        raise


def _frames(file: SourceFile, raw: RawFile, access: Access) -> Frames | None:
    """The frames of a zstd file; None where only decoding it would show them. Raises Undecodable.

    A remote file without a table of them is fetched whole to find them, once per node: its blocks must be
    those of the same file on a disk.
    """
    found = read_table(raw)
    if found is not None:
        return found
    try:
        return remembered_frames(raw, access.cache, file.key) if is_url(file.path) else walk_frames(raw)
    except Undecodable:
        if not access.skip_corrupt:
            raise
        return None  # as far as it goes


def undecodable(path: Path | str, where: str, error: Undecodable) -> DataError:
    """The error of what is there and cannot be decoded."""
    return DataError(
        f"{path}: {where}cannot be decoded: {error}; replace the file, or set data.skip_corrupt_blocks = "
        "true to go on without what is lost"
    )


class PlainView:
    """Text stored as it is."""

    def __init__(self, raw: RawFile) -> None:
        self._raw = raw
        self.read, self.close = raw.read, raw.close

    def estimate(self) -> int:
        return self._raw.size

    def size(self) -> int:
        return self._raw.size

    def cut(self, block_bytes: int) -> Ranges:
        return even_ranges(0, self._raw.size, max(1, -(-self._raw.size // block_bytes)))

    def place(self, start: int, stop: int) -> tuple[int, int]:
        return start, stop

    def corrupt(self, start: int, stop: int) -> list[tuple[int, str]]:
        return []

    def expect(self, start: int, stop: int) -> None:
        self._raw.expect(start, stop - start)


class FrameMemory:
    """Decoded frames, the least lately used forgotten first."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self._held = most_bytes, 0
        self._frames: OrderedDict[tuple[int, int], bytes] = OrderedDict()

    def get(self, key: tuple[int, int]) -> bytes | None:
        frame = self._frames.pop(key, None)
        if frame is not None:
            self._frames[key] = frame
        return frame

    def put(self, key: tuple[int, int], frame: bytes) -> None:
        self._frames[key] = frame
        self._held += len(frame)
        while self._held > self._most and len(self._frames) > 1:
            self._held -= len(self._frames.popitem(last=False)[1])


class FramedView:
    """Text in zstd frames whose places are known."""

    _views = 0  # made so far: each has keys of its own in the memory of frames

    def __init__(
        self, path: Path | str, raw: RawFile, frames: Frames, access: Access, memory: FrameMemory
    ) -> None:
        self._path, self._raw, self._frames = path, raw, frames
        self._access, self._memory = access, memory
        self._corrupt: dict[int, str] = {}
        self.close = raw.close
        FramedView._views += 1
        self._number = FramedView._views

    def estimate(self) -> int:
        return self._frames.size

    def size(self) -> int:
        return self._frames.size

    def cut(self, block_bytes: int) -> Ranges:
        """At the starts of frames; frames much larger than a block are cut evenly."""
        starts, size = self._frames.decoded, self._frames.size
        wanted = np.arange(0, size, block_bytes, dtype=np.int64)
        bounds = np.unique(np.append(starts[np.searchsorted(starts, wanted)], size))
        pieces = [
            even_ranges(int(a), int(b), 1 if b - a <= 2 * block_bytes else -(-int(b - a) // block_bytes))
            for a, b in pairwise(bounds)
        ]
        if not pieces:
            return even_ranges(0, 0, 1)
        return np.concatenate([p[0] for p in pieces]), np.concatenate([p[1] for p in pieces])

    def place(self, start: int, stop: int) -> tuple[int, int]:
        return start, stop

    def read(self, start: int, length: int) -> bytes:
        stop = min(start + length, self._frames.size)
        first, last = self._span(start, stop)
        content = b"".join(self._frame(i) for i in range(first, last))
        offset = start - int(self._frames.decoded[first])
        return content[offset : offset + max(0, stop - start)]

    def corrupt(self, start: int, stop: int) -> list[tuple[int, str]]:
        for i in range(*self._span(start, stop)):
            self._frame(i)
        return [(at, self._corrupt[at]) for at in sorted(self._corrupt) if start <= at < stop]

    def expect(self, start: int, stop: int) -> None:
        first, last = self._span(start, stop)
        begin = int(self._frames.stored[first])
        self._raw.expect(begin, int(self._frames.stored[last]) - begin)

    def _span(self, start: int, stop: int) -> tuple[int, int]:
        """The frames that a range touches: [first, last)."""
        decoded = self._frames.decoded
        if stop <= start:
            return 0, 0
        first = int(np.searchsorted(decoded, start, side="right")) - 1
        return first, int(np.searchsorted(decoded, stop))

    def _frame(self, i: int) -> bytes:
        key = (self._number, i)
        text = self._memory.get(key)
        if text is None:
            stored, position = int(self._frames.stored[i]), int(self._frames.decoded[i])
            length = int(self._frames.decoded[i + 1]) - position
            content = read_exactly(self._path, self._raw, stored, int(self._frames.stored[i + 1]) - stored)
            try:
                text = decode_frame(content, length)
            except Undecodable as error:
                if not self._access.skip_corrupt:
                    raise undecodable(self._path, f"frame {i} at byte {stored}: ", error) from None
                self._corrupt[position] = f"cannot be decoded: {length} bytes from here on: {error}"
                text = b"\n" * length
            self._memory.put(key, text)
        return text


class StreamView:
    """Text that can only be decoded from the beginning: done once per node, into the block cache."""

    def __init__(
        self,
        file: SourceFile,
        raw: RawFile,
        kind: str,
        frames: Frames | None,
        access: Access,
        memory: FrameMemory,
    ) -> None:
        self._file, self._raw, self._kind = file, raw, kind
        self._access, self._memory = access, memory
        self._estimate = max(1, estimated_size(raw, kind) if frames is None else frames.size)
        self._decoded: FramedView | None = None

    def estimate(self) -> int:
        return self._estimate

    def size(self) -> int:
        return self._view().size()

    def cut(self, block_bytes: int) -> Ranges:
        return even_ranges(-self._estimate, 0, -(-self._estimate // block_bytes))

    def place(self, start: int, stop: int) -> tuple[int, int]:
        if start >= 0:
            return start, stop
        size, whole = self.size(), self._estimate
        return (start + whole) * size // whole, (stop + whole) * size // whole

    def read(self, start: int, length: int) -> bytes:
        return self._view().read(start, length)

    def corrupt(self, start: int, stop: int) -> list[tuple[int, str]]:
        return self._view().corrupt(start, stop)

    def expect(self, start: int, stop: int) -> None:
        pass  # all of it is needed, and is read ahead while it is decoded

    def close(self) -> None:
        self._raw.close()
        if self._decoded is not None:
            self._decoded.close()

    def _view(self) -> FramedView:
        """The decoded text. Raises DataError."""
        if self._decoded is None:
            path = self._file.path

            def refuse(error: Undecodable) -> None:
                if not self._access.skip_corrupt:
                    raise undecodable(path, "", error) from None

            entry = self._access.cache.open(
                f"{self._kind}/{self._file.key}",
                lambda out: write_frames(decode_stream(self._raw, self._kind), out, refuse),
            )
            made = LocalFile(Path(str(path)), entry)
            frames = read_table(made)
            if frames is None:
                made.close()
                raise DataError(
                    f"{path}: its entry in the block cache {self._access.cache.directory} is damaged; "
                    "remove that directory"
                )
            self._decoded = FramedView(path, made, frames, self._access, self._memory)
        return self._decoded

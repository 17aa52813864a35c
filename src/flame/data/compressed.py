"""Compressed files: zstd frames that can be entered, and streams decoded into such frames.

A file of many frames is read frame by frame where it lies. What cannot be entered in the middle (.gz, a
.zst of one large frame) is decoded once per node, from its beginning, into the block cache: there it is
zstd in the seekable format (facebook/zstd, contrib/seekable_format): small frames and a table of them.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import zstandard

from flame.data.cache import BlockCache
from flame.data.raw import RawFile

SUFFIXES = {".gz": "gz", ".zst": "zst", ".zstd": "zst"}
LARGEST_FRAME = 16 * 2**20  # decoded bytes; a file with larger frames is decoded as a stream
CACHED_FRAME = 128 * 2**10  # decoded bytes in a frame of the cache
CHUNK = 2**20  # bytes read at once from a stream
MOST_WINDOW = 2**31  # what `zstd --long=31` needs

FRAME, SKIPPABLE, TABLE, FOOTER = 0xFD2FB528, 0x184D2A50, 0x184D2A5E, 0x8F92EAB1
NOTE = struct.pack("<I", SKIPPABLE)  # begins a frame of the cache that says what could not be decoded


class Undecodable(Exception):
    """Bytes that are there and cannot be decoded; not a failed read."""


@dataclass(frozen=True, slots=True)
class Frames:
    """Where the frames of a file lie: `stored`, `decoded`: int64 [frames + 1], their starts and the end."""

    stored: np.ndarray
    decoded: np.ndarray

    @property
    def size(self) -> int:
        """Of the decoded text, in bytes."""
        return int(self.decoded[-1])

    @property
    def largest(self) -> int:
        return int(np.diff(self.decoded).max(initial=0))


def compression(path: Path | str) -> str | None:
    """`gz`, `zst` or None, by suffix."""
    return SUFFIXES.get(Path(str(path).partition("?")[0]).suffix.lower())


# -------------------------------------------------------------------------------------- tables


def read_table(file: RawFile) -> Frames | None:
    """The frames by the table at the file's end; None where there is none."""
    size = file.size
    footer = file.read(size - 9, 9) if size >= 17 else b""
    if len(footer) < 9 or struct.unpack("<I", footer[5:])[0] != FOOTER:
        return None
    count, flags = struct.unpack("<IB", footer[:5])
    width = 12 if flags & 0x80 else 8  # with a checksum or without
    length = count * width + 17
    if length > size:
        return None
    table = file.read(size - length, length)
    if struct.unpack("<II", table[:8]) != (TABLE, length - 8):
        return None
    entries = np.frombuffer(table[8 : 8 + count * width], dtype="<u4").reshape(count, width // 4)
    stored, decoded = (np.concatenate([[0], np.cumsum(entries[:, i], dtype=np.int64)]) for i in (0, 1))
    return Frames(stored, decoded) if stored[-1] == size - length else None


def walk_frames(file: RawFile) -> Frames | None:
    """The frames by their headers and those of their blocks, decoding nothing. None where a frame does not
    say how long its text is. Raises Undecodable where this is not zstd or is cut off."""
    at, size = 0, file.size
    stored, decoded = [0], [0]
    while at < size:
        file.expect(at, 8 * CHUNK)
        head = file.read(at, 18)
        magic = struct.unpack("<I", head[:4])[0] if len(head) >= 4 else None
        if magic is not None and magic & 0xFFFFFFF0 == SKIPPABLE:
            end, length = at + 8 + (struct.unpack("<I", head[4:8])[0] if len(head) >= 8 else size), 0
        elif magic is not None and magic != FRAME:
            raise Undecodable(f"no zstd frame begins at byte {at}")
        else:
            end, length = _frame_end(file, at, head)
        if end is None or end > size:
            raise Undecodable("truncated: the file ends in the middle of a zstd frame")
        if length < 0:
            return None
        at = end
        stored.append(at)
        decoded.append(decoded[-1] + length)
    return Frames(np.array(stored, dtype=np.int64), np.array(decoded, dtype=np.int64))


def remembered_frames(file: RawFile, cache: BlockCache, key: str) -> Frames | None:
    """`walk_frames` once per node: `key` names the file's content in the block cache."""

    def make(out: BinaryIO) -> None:
        frames = walk_frames(file)
        if frames is not None:
            np.save(out, np.stack([frames.stored, frames.decoded]))

    with os.fdopen(cache.open(f"frames/{key}", make), "rb") as entry:
        content = entry.read()
    return Frames(*np.load(io.BytesIO(content), allow_pickle=False)) if content else None


def _frame_end(file: RawFile, at: int, head: bytes) -> tuple[int | None, int]:
    """Where a frame ends (None: the file ends before) and the size of its text (-1: not said)."""
    size = file.size
    try:
        parameters: Any = zstandard.get_frame_parameters(head)
        length = zstandard.frame_content_size(head)
        position = at + zstandard.frame_header_size(head)
    except zstandard.ZstdError:
        return None, 0
    while True:
        file.expect(position, 8 * CHUNK)
        block = int.from_bytes(file.read(position, 3), "little")
        kind = block >> 1 & 3
        position += 3 + (1 if kind == 1 else block >> 3)
        if position > size or kind == 3:
            return None, 0
        if block & 1:
            break
    position += 4 * bool(parameters.has_checksum)
    return (position, length) if position <= size else (None, 0)


# -------------------------------------------------------------------------------------- frames


def decode_frame(content: bytes, length: int) -> bytes:
    """The text of one frame. Raises Undecodable."""
    if content[:4] == NOTE and length == 1:
        raise Undecodable(content[8:].decode())
    if not length:  # nothing to decode, as in a skippable frame
        return b""
    decoder = zstandard.ZstdDecompressor(max_window_size=MOST_WINDOW)
    try:
        text = decoder.decompress(content, max_output_size=length)
    except zstandard.ZstdError as error:
        raise Undecodable(str(error)) from None
    if len(text) != length:
        raise Undecodable(f"holds {len(text)} bytes instead of {length}")
    return text


# ------------------------------------------------------------------------------------- streams


def estimated_size(file: RawFile, kind: str) -> int:
    """About how long a stream's text is, from its size and its end alone: blocks are cut by it."""
    size = file.size
    if kind == "zst":
        return 4 * size
    last = file.read(max(0, size - 4), 4)  # gzip keeps its last member's size there, modulo 2^32
    return max(3 * size, int.from_bytes(last, "little") if len(last) == 4 else 0)


def decode_stream(file: RawFile, kind: str) -> Iterator[bytes]:
    """The text of a .gz or .zst file from its beginning, in pieces. Raises Undecodable, after the last piece
    that could be decoded."""
    yield from (_gunzip if kind == "gz" else _unzstd)(_chunks(file))


def _chunks(file: RawFile) -> Iterator[bytes]:
    for start in range(0, file.size, CHUNK):
        file.expect(start + CHUNK, 4 * CHUNK)
        yield file.read(start, CHUNK)


def _gunzip(chunks: Iterator[bytes]) -> Iterator[bytes]:
    member, begun = zlib.decompressobj(31), False
    for chunk in chunks:
        rest = chunk
        while rest:
            if not begun and not (rest := rest.lstrip(b"\0")):  # padding between and after members
                break
            begun = True
            try:
                text = member.decompress(rest, CHUNK)
            except zlib.error as error:
                raise Undecodable(f"not valid gzip: {error}") from None
            if text:
                yield text
            rest = member.unconsumed_tail
            if member.eof:
                rest = member.unused_data
                member, begun = zlib.decompressobj(31), False
    if begun:
        while text := member.decompress(member.unconsumed_tail, CHUNK):
            yield text
        raise Undecodable("truncated: the file ends in the middle of a gzip member")


def _unzstd(chunks: Iterator[bytes]) -> Iterator[bytes]:
    decoder = zstandard.ZstdDecompressor(max_window_size=MOST_WINDOW)
    frame: Any = decoder.decompressobj()
    begun = False
    for chunk in chunks:
        for start in range(0, len(chunk), CHUNK // 16):  # what a piece decodes to is held in memory
            rest = chunk[start : start + CHUNK // 16]
            while rest:
                begun = True
                try:
                    text = frame.decompress(rest)
                except zstandard.ZstdError as error:
                    raise Undecodable(f"not valid zstd: {error}") from None
                if text:
                    yield text
                rest = b""
                if frame.eof:
                    rest = frame.unused_data
                    frame, begun = decoder.decompressobj(), False
    if begun:
        raise Undecodable("truncated: the file ends in the middle of a zstd frame")


def write_frames(
    pieces: Iterator[bytes], file: BinaryIO, on_undecodable: Callable[[Undecodable], None]
) -> None:
    """Write text as seekable zstd.

    Where `pieces` raises Undecodable, `on_undecodable` is called; if it returns, the file ends with a note of
    it that counts as one byte of text.
    """
    encoder = zstandard.ZstdCompressor(level=1, write_checksum=True, write_content_size=True)
    table: list[bytes] = []

    def put(frame: bytes, length: int) -> None:
        file.write(frame)
        table.append(struct.pack("<II", len(frame), length))

    held = bytearray()
    try:
        for piece in pieces:
            held += piece
            if len(held) >= CACHED_FRAME:
                whole = len(held) - len(held) % CACHED_FRAME
                view = bytes(held[:whole])
                for start in range(0, whole, CACHED_FRAME):
                    put(encoder.compress(view[start : start + CACHED_FRAME]), CACHED_FRAME)
                del held[:whole]
        error = None
    except Undecodable as found:
        on_undecodable(found)
        error = found
    if held:
        put(encoder.compress(bytes(held)), len(held))
    if error is not None:
        note = str(error).encode()
        put(NOTE + struct.pack("<I", len(note)) + note, 1)
    entries = b"".join(table)
    file.write(struct.pack("<II", TABLE, len(entries) + 9) + entries)
    file.write(struct.pack("<IBI", len(table), 0, FOOTER))

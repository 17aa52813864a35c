"""Compressed sources: the same documents as uncompressed, decoded once, and never silently less of them."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from flame.data import blocks, compressed, files
from flame.data.cache import Access, BlockCache
from flame.data.catalog import open_catalog
from flame.data.config import DataConfig, SourceConfig, TokenizerConfig
from flame.data.formats import Bad
from flame.data.lines import JsonLines, PlainText
from flame.data.loader import Loader
from flame.data.plan import DataPlan
from flame.errors import DataError

LINES = [json.dumps({"text": f"{i} " + "word " * (i % 37)}).encode() for i in range(400)]
PLAIN = b"\n".join(LINES) + b"\n"


def zst_frames(content: bytes, size: int, sized: bool = True) -> bytes:
    encoder = zstandard.ZstdCompressor(write_content_size=sized, write_checksum=True)
    pieces = [content[at : at + size] for at in range(0, len(content), size)]
    if sized:
        return b"".join(encoder.compress(piece) for piece in pieces)
    made = []
    for piece in pieces:
        stream = encoder.compressobj()
        made.append(stream.compress(piece) + stream.flush())
    return b"".join(made)


def zst_blocks(content: bytes) -> bytes:
    """One frame of many blocks."""
    stream = zstandard.ZstdCompressor().compressobj()
    made = []
    for at in range(0, len(content), 3000):
        made += [stream.compress(content[at : at + 3000]), stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
    return b"".join([*made, stream.flush()])


STORED: dict[str, Callable[[bytes], bytes]] = {
    "one.jsonl.gz": gzip.compress,
    "members.jsonl.gz": lambda c: gzip.compress(c[:5000]) + gzip.compress(c[5000:]) + b"\0" * 9,
    "one.jsonl.zst": lambda c: zst_frames(c, 2**30),
    "frames.jsonl.zst": lambda c: zst_frames(c, 3000),
    "skippable.jsonl.zst": lambda c: b"\x51\x2a\x4d\x18\3\0\0\0abc" + zst_frames(c, 3000),
    "unsized.jsonl.zst": lambda c: zst_frames(c, 3000, sized=False),
}


@pytest.fixture
def access(tmp_path: Path) -> Access:
    return Access(str(tmp_path / "cache"))


@pytest.fixture
def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames as large ones are, at a size that a test can have."""
    monkeypatch.setattr(files, "LARGEST_FRAME", 4000)
    monkeypatch.setattr(compressed, "CACHED_FRAME", 1000)


def plain_records(tmp_path: Path) -> list[tuple[int, object]]:
    (tmp_path / "plain.jsonl").write_bytes(PLAIN)
    return list(JsonLines([tmp_path / "plain.jsonl"], "text").read(0, 0, len(PLAIN)))


@pytest.mark.parametrize("name", STORED)
def test_compressed_lines_are_the_plain_ones_under_any_cut(
    tmp_path: Path, access: Access, small_frames: None, name: str
) -> None:
    (tmp_path / name).write_bytes(STORED[name](PLAIN))
    expected = plain_records(tmp_path)
    reader = JsonLines([tmp_path / name], "text", access)
    assert JsonLines.fields(tmp_path / name) == ["text"]
    for block_bytes in (100, 2500, 7000, 10**9):
        cut = zip(*(bounds.tolist() for bounds in reader.ranges(0, block_bytes)), strict=True)
        assert [record for bounds in cut for record in reader.read(0, *bounds)] == expected
    starts, stops = reader.documents(0)
    assert starts.tolist() == [position for position, _ in expected]
    assert [reader.read(0, a, b)[0] for a, b in zip(starts.tolist(), stops.tolist(), strict=True)] == expected


@given(content=st.binary(max_size=9000), size=st.integers(1, 4000), seed=st.integers(0, 999))
def test_any_bytes_come_back_from_anywhere(tmp_path_factory, content: bytes, size: int, seed: int) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    access, draw = Access(str(folder / "cache")), random.Random(seed)
    for name, stored in (("a.zst", zst_frames(content, size)), ("a.gz", gzip.compress(content))):
        (folder / name).write_bytes(stored)
        opened = files.Files(files.as_files([folder / name]), access)
        view = opened[0]
        assert view.size() == len(content)
        for _ in range(5):
            start, length = draw.randrange(len(content) + 1), draw.randrange(9000)
            assert view.read(start, length) == content[start : start + length]


def test_frames_are_blocks_and_are_entered_without_what_lies_before(tmp_path: Path, access: Access) -> None:
    stored = bytearray(zst_frames(PLAIN, 5000))
    stored[60:90] = b"\0" * 30  # in the first frame, which is not needed
    (tmp_path / "a.jsonl.zst").write_bytes(stored)
    reader = JsonLines([tmp_path / "a.jsonl.zst"], "text", access)
    starts, _ = reader.ranges(0, 5000)
    assert starts.tolist() == list(range(0, len(PLAIN), 5000))
    assert reader.read(0, 10_000, 15_000)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(DataError, match=r"a.jsonl.zst: frame 0 at byte 0: cannot be decoded: .*skip_corrupt"):
        reader.read(0, 0, 5000)


def test_opening_a_large_stream_decodes_nothing(
    tmp_path: Path, access: Access, small_frames: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(files, "write_frames", never)
    for name in ("one.jsonl.gz", "one.jsonl.zst", "unsized.jsonl.zst"):
        (tmp_path / name).write_bytes(STORED[name](PLAIN))
        reader = JsonLines([tmp_path / name], "text", access)
        assert reader.decoded_bytes(0) > 0
        assert len(reader.ranges(0, 1000)[0]) > 1
        with pytest.raises(AssertionError, match="decoded"):
            reader.read(0, *(int(bounds[0]) for bounds in reader.ranges(0, 1000)))


READ = """
import sys
from flame.data import files
from flame.data.cache import Access
from flame.data.lines import JsonLines
decode, times = files.decode_stream, []
files.decode_stream = lambda *a: times.append(1) or decode(*a)
reader = JsonLines([sys.argv[1]], "text", Access(sys.argv[2]))
ranges = zip(*(bounds.tolist() for bounds in reader.ranges(0, 50_000)))
print(sum(len(reader.read(0, *bounds)) for bounds in ranges), len(times))
"""


def test_a_stream_is_decoded_by_one_of_the_processes_that_want_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(PLAIN * 200))
    command = [sys.executable, "-c", READ, str(tmp_path / "a.jsonl.gz"), str(tmp_path / "cache")]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    told = [reader.communicate(timeout=60)[0].split() for reader in readers]
    assert [line[0] for line in told] == [str(400 * 200)] * 4
    assert sorted(line[1] for line in told) == ["0", "0", "0", "1"]
    assert len(list((tmp_path / "cache").iterdir())) == 1  # no lock and no part is left


def test_the_cache_keeps_its_bound_and_what_was_used_last(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 2500)
    for step, key in enumerate(("a", "b", "a", "c", "a")):
        descriptor = cache.open(key, lambda out: out.write(b"x" * 1000) and None)
        os.utime(descriptor, (step, step))
        assert os.pread(descriptor, 2000, 0) == b"x" * 1000
        os.close(descriptor)
    held = sorted(path.name.rpartition("-")[2] for path in tmp_path.iterdir())
    assert held == ["a.block", "c.block"]


def test_a_failed_maker_leaves_nothing_and_a_removed_entry_is_still_read(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 10)

    def fail(out) -> None:
        out.write(b"half")
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        cache.open("k", fail)
    assert list(tmp_path.iterdir()) == []
    first = cache.open("k", lambda out: out.write(b"x" * 100) and None)
    os.close(cache.open("other", lambda out: out.write(b"y" * 100) and None))
    assert len(list(tmp_path.iterdir())) == 1
    assert os.pread(first, 100, 0) == b"x" * 100
    os.close(first)


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(PLAIN))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"set data\.cache_directory"):
        JsonLines([tmp_path / "a.jsonl.gz"], "text", Access(str(tmp_path / "file" / "cache"))).documents(0)


# ---------------------------------------------------------------------------------- broken input


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut.jsonl.gz": (lambda c: gzip.compress(c, 1)[:-900], "truncated: .* gzip member"),
    "cut.jsonl.zst": (lambda c: zst_frames(c, 3000)[:-40], "truncated: .* zstd frame"),
    "cut_one.jsonl.zst": (lambda c: zst_blocks(c)[:-40], "truncated: .* zstd frame"),
    "garbage.jsonl.gz": (lambda c: gzip.compress(c) + b"garbage", "not valid gzip"),
    "flipped.jsonl.zst": (lambda c: zst_frames(c[:6000], 3000) + _flipped(c[6000:]), "cannot be decoded"),
}


def _flipped(content: bytes) -> bytes:
    first, rest = zst_frames(content[:3000], 3000), zst_frames(content[3000:], 3000)
    return first[:-6] + bytes(b ^ 255 for b in first[-6:]) + rest


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_stop_or_are_counted_and_named_whatever_the_cut(
    tmp_path: Path, access: Access, small_frames: None, name: str
) -> None:
    made, message = BROKEN[name]
    (tmp_path / name).write_bytes(made(PLAIN))
    with pytest.raises(DataError, match=rf"{name}: .*{message}.*skip_corrupt_blocks"):
        JsonLines([tmp_path / name], "text", access).documents(0)
    whole = dict(plain_records(tmp_path))
    reader = JsonLines([tmp_path / name], "text", Access(access.cache_directory, skip_corrupt=True))
    found: list[list[tuple[int, object]]] = []
    for cut in (reader.documents(0), reader.ranges(0, 500), reader.ranges(0, 10**9)):
        pairs = zip(*(bounds.tolist() for bounds in cut), strict=True)
        found.append([record for bounds in pairs for record in reader.read(0, *bounds)])
    assert found[0] == found[1] == found[2]
    bad = [content for _, content in found[0] if isinstance(content, Bad)]
    assert len(bad) == 1
    assert "cannot be decoded" in bad[0].reason or "truncated" in bad[0].reason or "gzip" in bad[0].reason
    kept = [position for position, content in found[0] if whole.get(position) == content]
    assert len(kept) > 150
    assert len(found[0]) - len(kept) <= 3  # the break itself, and the lines cut at its two sides


def test_a_cache_that_is_too_small_is_said_once_with_the_bytes_needed(tmp_path: Path) -> None:
    names = [f"{i}.jsonl.gz" for i in range(3)]
    for name in names:
        (tmp_path / name).write_bytes(gzip.compress(PLAIN))

    def read_all(cache_bytes: int) -> None:
        access = Access(str(tmp_path / f"cache-{cache_bytes}"), cache_bytes)
        for _ in range(6):
            for name in names:
                JsonLines([tmp_path / name], "text", access).documents(0)

    read_all(10**6)
    needed = sum(path.stat().st_size for path in (tmp_path / "cache-1000000").glob("*.block"))
    with pytest.warns(RuntimeWarning, match=rf"cache_bytes = {needed - 1} .* {needed} bytes") as said:
        read_all(needed - 1)
    assert len(said) == 1


def test_text_files_are_documents_compressed_or_not(tmp_path: Path, access: Access) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"some text\n" * 50))
    (tmp_path / "b.txt.zst").write_bytes(zst_frames(b"other text\n" * 50, 100))
    reader = PlainText([tmp_path / "a.txt.gz", tmp_path / "b.txt.zst"], "", access)
    texts = [reader.read(i, *(int(bounds[0]) for bounds in reader.documents(i))) for i in range(2)]
    assert texts == [[(0, b"some text\n" * 50)], [(0, b"other text\n" * 50)]]


def test_a_stream_that_shrinks_before_it_is_read_is_a_failed_read(tmp_path: Path, access: Access) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(PLAIN))
    listed = files.as_files([path])
    path.write_bytes(gzip.compress(PLAIN)[:-100])
    skipping = Access(access.cache_directory, skip_corrupt=True)
    with pytest.raises(DataError, match="put the file back as it was"):
        JsonLines(listed, "text", skipping).documents(0)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        JsonLines(listed, "text", skipping).documents(0)


@pytest.mark.parametrize("each_document", [True, False])
def test_rows_of_a_compressed_source_are_the_same_on_any_ranks(
    tmp_path: Path, folder: Path, small_frames: None, monkeypatch: pytest.MonkeyPatch, each_document: bool
) -> None:
    if not each_document:
        monkeypatch.setattr(blocks, "INDEX_BELOW", 0)
        monkeypatch.setattr(blocks, "SMALLEST", 256)
    (tmp_path / "one.jsonl.gz").write_bytes(gzip.compress(PLAIN))
    config = DataConfig(
        [SourceConfig("web", ["one.jsonl.gz"])], sequence_length=32, lanes=4, cache_directory="cache"
    )
    plan = DataPlan.of(config, 12 * 32, seed=3)
    catalog = open_catalog(config, TokenizerConfig(str(folder / "tok")), plan, tmp_path)
    seen = []
    for world in (1, 3):
        ranks = [Loader(catalog, plan, rank, world, 1, prefetch=False) for rank in range(world)]
        steps = [[rank.next_step() for rank in ranks] for _ in range(12)]
        rows = [sorted((r.index, r.segments) for p in parts for r in p.rows if r.segments) for parts in steps]
        seen.append(rows)
    assert seen[0] == seen[1]
    names = {s.document_id for step in seen[0] for _, segments in step for s in segments if s.epoch == 0}
    assert names <= {f"one.jsonl.gz:{position}" for position, _ in plain_records(tmp_path)}

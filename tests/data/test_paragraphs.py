from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from flame.data import blocks
from flame.data.cache import Access
from flame.data.config import SourceConfig
from flame.data.paragraphs import Paragraphs
from flame.data.sources import open_source
from flame.errors import DataError, RecipeError

LINES = st.lists(
    st.sampled_from([b"", b"a", b"  b c", b" ", b"\t", b"d ", b"e" * 300, b" " * 300]), max_size=30
)


def expected(content: bytes) -> list[tuple[int, bytes]]:
    """By lines, one after another: (position, text) of each paragraph."""
    found: list[tuple[int, bytes]] = []
    at, in_one = 0, False
    for line in content.split(b"\n"):
        end = at + len(line) - line.endswith(b"\r") * (at + len(line) < len(content))
        if line.strip():
            start = found.pop()[0] if in_one else at
            found.append((start, content[start:end]))
        in_one = bool(line.strip())
        at += len(line) + 1
    return found


def held(reader: Paragraphs, cut: tuple[np.ndarray, np.ndarray]) -> list[tuple[int, object]]:
    pairs = zip(*(bounds.tolist() for bounds in cut), strict=True)
    return [record for start, stop in pairs for record in reader.read(0, start, stop)]


@given(LINES, st.sampled_from([b"\n", b"\r\n"]), st.integers(1, 700), st.booleans())
def test_any_cut_holds_every_paragraph_once(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], end: bytes, size: int, last: bool
) -> None:
    content = end.join(lines) + end * last
    path = tmp_path_factory.getbasetemp() / "p.txt"
    path.write_bytes(content)
    reader = Paragraphs([path], "")
    assert held(reader, reader.documents(0)) == expected(content)
    assert held(reader, blocks.even_ranges(0, len(content), -(-len(content) // size))) == expected(content)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_paragraphs_are_the_plain_ones(tmp_path: Path, suffix: str) -> None:
    content = b"\r\n".join(b"line %d\r\nmore" % i + b"\r\n" * (i % 3) for i in range(5000))
    made = gzip.compress(content) if suffix == "gz" else zstandard.compress(content)
    (tmp_path / f"p.txt.{suffix}").write_bytes(made)
    reader = Paragraphs([tmp_path / f"p.txt.{suffix}"], "", Access(str(tmp_path / "cache")))
    assert held(reader, reader.documents(0)) == held(reader, reader.ranges(0, 3000)) == expected(content)


def test_a_source_is_cut_into_paragraphs_by_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(b"\n\none\ntwo\n\n\nthree\n")
    (tmp_path / "b.txt").write_bytes(b"")
    config = SourceConfig("s", ["*.txt"], documents="paragraph")
    for index_below in (2**20, 0):
        monkeypatch.setattr(blocks, "INDEX_BELOW", index_below)
        source = open_source(config, tmp_path, 1)
        assert source.format == "paragraphs"
        assert len(source.blocks) == (2 if index_below else 1)
        reader = source.open()
        cut = source.blocks
        records = [r for i in range(len(cut)) for r in reader.read(0, int(cut.start[i]), int(cut.stop[i]))]
        assert records == [(2, b"one\ntwo"), (12, b"three")]
        assert reader.place(0, 12) == "byte 12"
    (tmp_path / "a.txt").write_bytes(b" \n \n")
    with pytest.raises(DataError, match=r"a.txt: no documents"):
        monkeypatch.setattr(blocks, "INDEX_BELOW", 2**20)
        open_source(config, tmp_path, 1)
    (tmp_path / "c.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(RecipeError, match=r'"paragraph" is for plain text; its files are jsonl'):
        open_source(SourceConfig("s", ["c.jsonl"], documents="paragraph"), tmp_path, 1)

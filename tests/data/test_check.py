from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame.data import check
from flame.data.catalog import open_catalog
from flame.data.check import Hashes, check_sources
from flame.data.config import DataConfig, SourceConfig, TokenizerConfig
from flame.data.formats import Bad
from flame.data.plan import DataPlan


def silent(done: int, total: int) -> None:
    assert 0 < done <= total


@pytest.mark.parametrize("ranges", [False, True])
def test_a_check_counts_every_record_once(open_data: Callable[..., Any], ranges: bool) -> None:
    catalog, plan = open_data(ranges)
    report = check_sources(catalog, plan, 1, silent)
    tokenizer = catalog.load_tokenizer()
    for source, found in zip(catalog.sources, report.sources, strict=True):
        reader = source.open()
        ranges_of = zip(source.blocks.file, source.blocks.start, source.blocks.stop, strict=True)
        texts = [reader.decode(c) for f, a, b in ranges_of for _, c in reader.read(int(f), int(a), int(b))]
        good = [text for text in texts if not isinstance(text, Bad)]
        lengths = [len(ids) for ids in tokenizer.encode(good)]
        assert (found.records, found.documents, found.bad) == (len(texts), len(good), len(texts) - len(good))
        assert (found.tokens, found.characters) == (sum(lengths), sum(map(len, good)))
        assert found.over_length == sum(n > 64 for n in lengths)
        assert sum(found.lengths[6:]) == sum(n >= 64 for n in lengths)
        assert len(found.named) == min(5, found.bad)
    assert "a.jsonl, line 6: not valid JSON" in report.sources[0].named[0]


def test_processes_find_what_one_finds(open_data: Callable[..., Any]) -> None:
    catalog, plan = open_data(True)
    assert check_sources(catalog, plan, 2, silent) == check_sources(catalog, plan, 1, silent)


LISTS = st.lists(st.lists(st.integers(0, 40), max_size=60), min_size=1, max_size=4)


@settings(deadline=None)
@given(LISTS)
def test_duplicates_are_those_of_a_plain_count(
    tmp_path_factory: pytest.TempPathFactory, lists: list[list[int]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "HELD_HASHES", 16)
        hashes = Hashes(tmp_path_factory.mktemp("hashes"), len(lists))
        for source, texts in enumerate(lists):
            for at in range(0, len(texts), 7):
                hashes.add(
                    source, np.array(texts[at : at + 7], dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
                )
        within, shared = hashes.count()
    assert within == [len(texts) - len(set(texts)) for texts in lists]
    pairs = [(a, b) for a in range(len(lists)) for b in range(a + 1, len(lists))]
    assert shared == {(a, b): n for a, b in pairs if (n := len(set(lists[a]) & set(lists[b])))}


def test_a_long_record_is_one_document_and_a_truncated_file_is_named(folder: Path, tmp_path: Path) -> None:
    texts = ["word " * 300_000, "same", "same", "other"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = DataConfig(sources=[SourceConfig("a", ["a.jsonl"])], sequence_length=64)
    plan = DataPlan.of(config, 64, 0)
    catalog = open_catalog(config, TokenizerConfig(str(folder / "tok")), plan, tmp_path)
    (found,) = check_sources(catalog, plan, 1, silent).sources
    assert (found.documents, found.over_length, found.duplicates, found.unreadable) == (4, 1, 1, 0)
    with (tmp_path / "a.jsonl").open("r+b") as file:
        file.truncate(1_500_030)
    (cut,) = check_sources(catalog, plan, 1, silent).sources
    assert (cut.documents, cut.unreadable) == (0, 4)  # a file that has shrunk is not trusted in any part
    assert "put the file back" in cut.named[0]

"""Small real files and a small real tokenizer, made once."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from flame.data import blocks
from flame.data.catalog import Catalog, open_catalog
from flame.data.config import DataConfig, SourceConfig, TokenizerConfig
from flame.data.plan import DataPlan
from flame.data.tokens import train_tokenizer

WORDS = ["lane", "gives", "rows", "of", "tokens", "to", "each", "naïve", "東京", "🔥", "no", "0", "12"]
LONG = 1500  # words; several rows


def texts(seed: int, count: int) -> list[str]:
    """Random documents, most short, a few longer than several rows."""
    draw = random.Random(seed)
    lengths = [LONG if draw.random() < 0.03 else draw.choice([1, 3, 10, 40, 90]) for _ in range(count)]
    return [f"{i} " + " ".join(draw.choice(WORDS) for _ in range(n)) for i, n in enumerate(lengths)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tok/, a.jsonl with bad records, two files of parquet with nulls and small row groups, text files."""
    root = tmp_path_factory.mktemp("data")
    train_tokenizer(texts(0, 200), 400, root / "tok")
    lines = [json.dumps({"id": i, "text": text}).encode() for i, text in enumerate(texts(1, 90))]
    for at, bad in ((5, b"not json"), (30, b'{"id": 1}'), (31, b""), (60, b'{"text": ""}'), (80, b"  ")):
        lines.insert(at, bad)
    (root / "a.jsonl").write_bytes(b"\n".join(lines))
    (root / "p").mkdir()
    for i in range(2):
        column: list[str | None] = [*texts(2 + i, 30), None, ""]
        table = pyarrow.table({"n": list(range(32)), "content": column})
        pyarrow.parquet.write_table(table, root / "p" / f"{i}.parquet", row_group_size=9)
    (root / "t").mkdir()
    for i, text in enumerate(texts(5, 20)):
        (root / "t" / f"{i}.txt").write_text(text, encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def open_data(folder: Path) -> Callable[..., tuple[Catalog, DataPlan]]:
    """Opens the folder's files: `open_data(lanes=3, ranges=True, ...)` -> catalog and plan."""
    known: dict[str, tuple[Catalog, DataPlan]] = {}

    def open_it(
        ranges: bool = False,
        files: tuple[tuple[str, float], ...] = (),
        max_epochs: tuple[int | None, ...] = (None, None, None),
        **settings: Any,
    ):
        key = repr((ranges, files, max_epochs, sorted(settings.items())))
        if key not in known:
            settings = {"sequence_length": 64, "lanes": 3, "window_steps": 4, "rows": 6, **settings}
            rows, seed = settings.pop("rows"), settings.pop("seed", 7)
            named = files or (("a.jsonl", 3.0), ("p/*.parquet", 1.0))
            sources = [
                SourceConfig(f"s{i}", [file], weight=w, max_epochs=max_epochs[i])
                for i, (file, w) in enumerate(named)
            ]
            config = DataConfig(sources=sources, **settings)
            plan = DataPlan.of(config, rows * config.sequence_length, seed)
            with pytest.MonkeyPatch.context() as patch:
                if ranges:
                    patch.setattr(blocks, "INDEX_BELOW", 0)
                    patch.setattr(blocks, "SMALLEST", 256)
                known[key] = open_catalog(config, TokenizerConfig("tok"), plan, folder), plan
        return known[key]

    return open_it

"""What packing cuts and wastes at the default window, beside concatenate-and-chop on the same documents.

    python benchmarks/packing.py [--json FILE] [--quick]

Two sets of documents: `files`, the Python source files of this machine, one document each; `web-like`, the
same text cut at line ends into documents of log-normal length. A document counts as cut where a boundary
falls inside it and not at a multiple of L of its own tokens (what is longer than L must be divided there).
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine import machine
from text import prepare

from flame.batch import Segment
from flame.data.catalog import open_catalog
from flame.data.config import DataConfig, SourceConfig, TokenizerConfig
from flame.data.loader import Loader
from flame.data.plan import DataPlan

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
TOKENS_PER_STEP, WINDOWS = 2**19, 2  # full windows that are counted, after the short ones


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backend", default="gigatoken", help="the library of tokenizers; ids are the same")
    parser.add_argument("--characters", type=float, default=60e6, help="of each set of documents")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/flame-benchmark-data"))
    parser.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="one length, a little text")
    options = parser.parse_args()
    lengths, tokens = LENGTHS, TOKENS_PER_STEP
    if options.quick:
        lengths, tokens, options.characters, options.backend = (256,), 2**11, 4e5, "bytes"
    result = {
        **machine(),
        "packing": measure(options.folder, int(options.characters), options.backend, lengths, tokens),
    }
    print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def files(folder: Path, characters: int) -> Path:
    """files.jsonl: this machine's Python files as documents, made once."""
    path = folder / "files.jsonl"
    if not path.exists():
        partial = path.with_suffix(".partial")
        with partial.open("w") as out:
            out.writelines(json.dumps({"text": text}) + "\n" for text in source_files(characters))
        partial.rename(path)
    return path


def source_files(characters: int) -> Iterator[str]:
    """The standard library's and the installed packages' files, whole."""
    paths = sysconfig.get_paths()
    for root in (paths["stdlib"], paths["purelib"]):
        for path in sorted(Path(root).rglob("*.py")):
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            characters -= len(text)
            if text:
                yield text
            if characters <= 0:
                return


def measure(
    folder: Path, characters: int, backend: str, lengths: tuple[int, ...], tokens: int
) -> list[dict[str, Any]]:
    """A row of the table for each set of documents and each length."""
    text, tokenizer = prepare(folder, characters, 32000, tokenizer=backend != "bytes")
    sets = {"files": files(folder, characters), "web-like": text}
    settings = (
        TokenizerConfig("bytes") if backend == "bytes" else TokenizerConfig(str(tokenizer), backend=backend)
    )
    return [
        {"documents": name, "sequence_length": length, **row_of(path, settings, length, tokens)}
        for name, path in sets.items()
        for length in lengths
    ]


def row_of(path: Path, settings: TokenizerConfig, length: int, tokens: int) -> dict[str, Any]:
    config = DataConfig([SourceConfig("documents", [str(path)])], length)
    plan = DataPlan.of(config, tokens, 0)
    stage = plan.stages[0]
    catalog = open_catalog(config, settings, plan, Path())
    loader = Loader(catalog, plan, 0, 1, stage.rows_per_step, prefetch=False)
    full = next(w for w in range(64) if stage.steps_in_window(w) == stage.window_steps)
    first = sum(stage.steps_in_window(w) for w in range(full))
    segments: list[Segment] = []
    given = cut = documents = rows = 0
    for step in range(first + WINDOWS * stage.window_steps):
        got = loader.next_step()
        if step < first:
            continue
        rows += stage.rows_per_step
        given, cut, documents = (
            given + got.counts.tokens,
            cut + got.counts.cut,
            documents + got.counts.documents,
        )
        segments += [segment for row in got.rows for segment in row.segments]
    return {
        "window_steps": stage.window_steps,
        "rows_in_a_lanes_window": stage.window_steps * plan.lane_rows(full),
        "lanes": plan.lanes,
        "tokens": given,
        "tokens_a_document": given / documents,
        "waste": 1 - given / (rows * length),
        "cut": cut / documents,
        "segments_a_row": len(segments) / rows,
        **chopped(segments, length),
    }


def chopped(segments: list[Segment], length: int) -> dict[str, float]:
    """The same documents end to end in the order of their first segment, cut every `length` tokens."""
    sizes: dict[tuple[int, str], int] = {}
    for segment in segments:
        key = (segment.epoch, segment.document_id)
        sizes[key] = sizes.get(key, 0) + segment.length
    place = cut = pieces = 0
    for size in sizes.values():
        used = place % length  # of the row in which it begins
        crosses = used + size > length
        cut += crosses and used > 0
        pieces += -(-(used + size) // length)
        place += size
    return {"chopped_cut": cut / len(sizes), "chopped_segments_a_row": pieces * length / place}


if __name__ == "__main__":
    main()

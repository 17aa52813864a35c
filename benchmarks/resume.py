"""Resume anywhere in a large source: a 10 GB one, made of hard links to one file under many names.

    python benchmarks/resume.py [--gigabytes 10] [--backend tokenizers] [--json FILE] [--quick]

Seconds from opening the data to the first row: fresh, and from a state at 1, 50 and 99 % of the first
epoch, each in the middle of a window, beside the time of tokenizing one window. States are made, not
reached by reading 10 GB: the cursor of each lane is put at that share of its groups, the hash of its open
window is the one that is not compared. The state at `reached` is a true one, by reading, and compared.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from text import prepare

from flame.data.blocks import positions_of_lane
from flame.data.catalog import Catalog, fingerprint, open_catalog
from flame.data.config import DataConfig, SourceConfig, TokenizerConfig
from flame.data.lanes import UNKNOWN
from flame.data.loader import Loader
from flame.data.plan import DataPlan
from flame.data.state import DataState

SEQUENCE_LENGTH, ROWS = 2048, 64
SHARES = (0.01, 0.5, 0.99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--backend", default="tokenizers")
    parser.add_argument("--characters", type=float, default=60e6, help="of text to lay out")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/flame-benchmark-data"))
    parser.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="a small source")
    options = parser.parse_args()
    shape = (ROWS, SEQUENCE_LENGTH)
    if options.quick:
        options.gigabytes, options.characters, options.backend, shape = 0.002, 2e5, "bytes", (8, 128)
    text, tokenizer = prepare(
        options.folder, int(options.characters), 32000, tokenizer=options.backend != "bytes"
    )
    settings = (
        TokenizerConfig("bytes")
        if options.backend == "bytes"
        else TokenizerConfig(str(tokenizer), backend=options.backend)
    )
    result = {**machine(), "resume": measure(text, settings, options.gigabytes, shape)}
    print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def links(text: Path, gigabytes: float) -> Path:
    """A folder of hard links to `text` that are `gigabytes` together; each counts as a file of its own."""
    count = max(1, round(gigabytes * 1e9 / text.stat().st_size))
    folder = text.with_name(f"{text.stem}-linked")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:05}.jsonl").hardlink_to(text)
    return folder


def measure(
    text: Path, settings: TokenizerConfig, gigabytes: float, shape: tuple[int, int]
) -> dict[str, Any]:
    """Seconds of a fresh start and of resumes, and of one window's tokenizing."""
    folder = links(text, gigabytes)
    rows, length = shape
    config = DataConfig([SourceConfig("large", [f"{folder}/*.jsonl"])], length)
    plan = DataPlan.of(config, rows * length, 0)
    began = time.perf_counter()
    catalog = open_catalog(config, settings, plan, Path())
    opened = time.perf_counter() - began
    loader = Loader(catalog, plan, 0, 1, rows, prefetch=False)
    loader.next_step()
    fresh = time.perf_counter() - began
    stage = plan.stages[0]
    window = stage.window_steps * stage.tokens_per_step
    rate = tokenizing_rate(catalog, text)
    result: dict[str, Any] = {
        "bytes": sum(file.size for file in catalog.sources[0].files),
        "files": len(catalog.sources[0].files),
        "blocks": len(catalog.sources[0].blocks),
        "tokenizer": settings.backend if settings.path != "bytes" else "bytes",
        "open_seconds": opened,
        "fresh_seconds": fresh,
        "window_tokens": window,
        "window_tokenizing_seconds": window / rate,
        "resume_seconds": {},
        "beside_seconds": {},
    }
    bytes_per_token = text.stat().st_size / tokens_in(catalog, text)
    for share in SHARES:
        state = made_state(catalog, plan, share, result["bytes"] / bytes_per_token, loader.columns)
        seconds, _ = resume(config, settings, plan, state, rows)
        result["resume_seconds"][f"{share:.0%}"] = seconds
        # beside each resume, so that a change of the machine's speed meets both
        result["beside_seconds"][f"{share:.0%}"] = window / tokenizing_rate(catalog, text)
    result["reached"] = reached(config, settings, plan, loader, rows)
    return result


def tokens_in(catalog: Catalog, text: Path) -> int:
    """The tokens of the file behind the links, by a sample of its first lines."""
    sample = sample_of(text)
    tokens = sum(len(ids) for ids in catalog.load_tokenizer().encode(sample))
    characters = sum(len(json.dumps({"text": s})) + 1 for s in sample)
    return max(1, round(tokens * text.stat().st_size / characters))


def sample_of(text: Path, documents: int = 4000) -> list[str]:
    with text.open() as file:
        return [json.loads(line)["text"] for line, _ in zip(file, range(documents), strict=False)]


def tokenizing_rate(catalog: Catalog, text: Path) -> float:
    """Tokens per second of the tokenizer alone."""
    tokenizer, sample = catalog.load_tokenizer(), sample_of(text)
    began = time.perf_counter()
    tokens = tokenizer.count_alone(sample)
    return tokens / (time.perf_counter() - began)


def made_state(
    catalog: Catalog, plan: DataPlan, share: float, tokens: float, columns: list[str]
) -> DataState:
    """A state in the middle of a window at a share of the first epoch."""
    step = max(1, int(share * tokens / plan.stages[0].tokens_per_step))
    window, first = plan.window_at(step)
    half = max(1, plan.steps_in_window(window) // 2)
    lanes = np.zeros((plan.lanes, len(columns)), dtype=np.int64)
    for lane in range(plan.lanes):
        groups = positions_of_lane(len(catalog.sources[0].blocks), lane, plan.lanes) // plan.group_blocks
        values = {
            "window": window,
            "row": half * plan.lane_rows(window),
            "window_hash": UNKNOWN,
            "large.group": int(share * groups),
        }
        for name, value in values.items():
            lanes[lane, columns.index(name)] = value
    return DataState(first + half, lanes, columns, fingerprint(catalog, plan))


def resume(
    config: DataConfig, settings: TokenizerConfig, plan: DataPlan, state: DataState, rows: int
) -> tuple[float, int]:
    """Seconds from opening the data to the first row, and the digest of the step."""
    began = time.perf_counter()
    catalog = open_catalog(config, settings, plan, Path())
    got = Loader(catalog, plan, 0, 1, rows, state, prefetch=False).next_step()
    return time.perf_counter() - began, got.counts.digest


def reached(
    config: DataConfig, settings: TokenizerConfig, plan: DataPlan, loader: Loader, rows: int
) -> dict[str, Any]:
    """A resume from a state in the middle of a window that was read up to, by the loader itself."""
    full = next(w for w in range(64) if plan.steps_in_window(w) == plan.stages[0].window_steps)
    steps = sum(plan.steps_in_window(w) for w in range(full)) + plan.steps_in_window(full) // 2
    got = loader.next_step()
    while got.step + 1 < steps:
        got = loader.next_step()
    catalog = open_catalog(config, settings, plan, Path())
    state = DataState(got.step + 1, got.state, loader.columns, fingerprint(catalog, plan))
    seconds, digest = resume(config, settings, plan, state, rows)
    return {"step": steps, "seconds": seconds, "exact": digest == loader.next_step().counts.digest}


if __name__ == "__main__":
    main()

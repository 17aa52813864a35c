"""Whether memory stays flat: the loader over many small steps, and what the process holds at some of them.

python benchmarks/memory.py [--steps 100000] [--json FILE] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from machine import machine
from text import prepare

from flame.data.catalog import open_catalog
from flame.data.config import DataConfig, SourceConfig, TokenizerConfig
from flame.data.loader import Loader
from flame.data.plan import DataPlan

SEQUENCE_LENGTH, ROWS = 128, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--characters", type=float, default=60e6, help="of text to lay out")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/flame-benchmark-data"))
    parser.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="a few steps of a little text")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.characters = 300, 2e5
    text, _ = prepare(options.folder, int(options.characters), 32000, tokenizer=False)
    result = {**machine(), "memory": measure(text, options.steps)}
    print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(text: Path, steps: int) -> dict[str, Any]:
    """Mebibytes held after powers of ten of steps, and after the last."""
    config = DataConfig([SourceConfig("python", [str(text)])], SEQUENCE_LENGTH)
    plan = DataPlan.of(config, ROWS * SEQUENCE_LENGTH, 0)
    catalog = open_catalog(config, TokenizerConfig("bytes"), plan, Path())
    looked = {s for s in (100, 1000, 10_000, 100_000, steps // 2, steps) if s <= steps}
    held: dict[str, float] = {}
    began = time.perf_counter()
    with Loader(catalog, plan, 0, 1, ROWS) as loader:
        for number in range(1, steps + 1):
            got = loader.next_step()
            if number in looked:
                held[str(number)] = resident_mib()
    seconds = time.perf_counter() - began
    shape = {"sequence_length": SEQUENCE_LENGTH, "rows_per_step": ROWS, "tokenizer": "bytes"}
    return {**shape, "steps": steps, "seconds": seconds, "epochs": got.epoch, "resident_mib": held}


def resident_mib() -> float:
    """What this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


if __name__ == "__main__":
    main()

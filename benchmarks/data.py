"""Speed of the data plane on this machine's own text, each library of tokenizers beside itself alone.

    python benchmarks/data.py --json benchmarks/results/data.json [--seconds 20] [--backends tokenizers ...]
    taskset -c 0 python benchmarks/data.py --copies 160 ...   # one core, 10 GB

Loader and tokenizer take turns in one process, a window each, on the same text. Prints a line a library:
tokens per second of both, the share that comes through, seconds to the first rows of a fresh run and of a
resume, and what a step's state of 64 lanes costs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from text import copies, prepare

from flame.data.bench import bench
from flame.data.catalog import open_catalog
from flame.data.config import BACKENDS, DataConfig, SourceConfig, TokenizerConfig
from flame.data.plan import DataPlan

SEQUENCE_LENGTH, ROWS, LANES = 2048, 64, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--characters", type=float, default=60e6, help="of text to lay out")
    parser.add_argument("--copies", type=int, default=1, help="of the text, for a large source")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/flame-benchmark-data"))
    parser.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    options = parser.parse_args()
    text, tokenizer = prepare(options.folder, int(options.characters), options.vocabulary)
    files = [str(text)] if options.copies == 1 else [str(copies(text, options.copies) / "*.jsonl")]
    config = DataConfig([SourceConfig("python", files)], SEQUENCE_LENGTH, lanes=LANES)
    plan = DataPlan.of(config, ROWS * SEQUENCE_LENGTH, 0)
    results: list[dict[str, Any]] = []
    print("library      loader    alone  share  by cpu  first rows  resume   state")
    for backend in options.backends:
        catalog = open_catalog(config, TokenizerConfig(str(tokenizer), backend=backend), plan, Path())
        got = bench(catalog, plan, 1, options.seconds)
        rates = f"{got.tokens_per_second / 1e6:6.2f}M  {got.tokenizer_tokens_per_second / 1e6:6.2f}M"
        seconds = f"{got.first_rows_seconds:8.2f} s  {got.resume_seconds:4.2f} s"
        share, state = f"{100 * got.share_of_tokenizer:5.1f}%", f"{got.state_microseconds:4.1f} us"
        share += f"  {100 * got.processor_share:5.1f}%"
        print(f"{backend:<10} {rates}  {share}  {seconds}  {state}", flush=True)
        results.append({"backend": backend, "version": version(backend), **got.to_json()})
    if options.json:
        load = os.getloadavg()[0]
        machine = {"machine": platform.machine(), "cores": len(os.sched_getaffinity(0)), "load": load}
        settings = {"sequence_length": SEQUENCE_LENGTH, "rows_per_step": ROWS, "lanes": LANES}
        settings["copies"] = options.copies
        options.json.write_text(json.dumps({**machine, **settings, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The data plane measured on this machine's own text.

    python benchmarks/data.py --json benchmarks/results/data.json [--seconds 20] [--backends tokenizers ...]
    python benchmarks/data.py --all --json benchmarks/results/data.json
    taskset -c 0 python benchmarks/data.py --copies 160 ...   # one core, 10 GB

backends: the loader beside its tokenizer alone, each library of tokenizers; they take turns in one process,
a window each, on the same text. `--rivals`: beside other loaders, each in an environment of its own that is
made in the folder (rivals.py). `--all`: these and packing.py, shuffle.py, resume.py, gil.py
and memory.py.
Prints a line for each figure and one JSON object at the end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gil
import packing
import resume
import rivals
import shuffle
from machine import machine
from text import copies, prepare

from flame.data.bench import bench
from flame.data.catalog import open_catalog
from flame.data.config import BACKENDS, DataConfig, SourceConfig, TokenizerConfig
from flame.data.plan import DataPlan
from flame.data.tokens import load_tokenizer

SEQUENCE_LENGTH, ROWS, LANES = 2048, 64, 64
VOCABULARY = 32000


def main() -> None:
    options = arguments()
    folder, began = options.folder, time.monotonic()
    text, tokenizer = prepare(folder, int(options.characters), options.vocabulary)
    result: dict[str, Any] = {**machine(), "sequence_length": SEQUENCE_LENGTH, "rows_per_step": ROWS}
    result |= {"lanes": LANES, "results": backends(text, tokenizer, options)}
    if options.rivals or options.all:
        result["loaders"] = loaders(text, tokenizer, options)
    if options.all:
        fast = "tokenizers" if options.quick else "gigatoken"
        lengths, tokens = ((1024,), 2**13) if options.quick else (packing.LENGTHS, packing.TOKENS_PER_STEP)
        result["packing"] = packing.measure(folder, int(options.characters), fast, lengths, tokens)
        sizes = {"4 MiB": 2**22} if options.quick else shuffle.SIZES
        result["shuffle"] = shuffle.measure(
            sizes, 8 if options.quick else shuffle.STEPS, 2**17 if options.quick else 2**19
        )
        shape = (8, 128) if options.quick else (resume.ROWS, resume.SEQUENCE_LENGTH)
        size = 0.005 if options.quick else 10
        result["resume"] = resume.measure(text, TokenizerConfig(str(tokenizer)), size, shape)
        result["gil"] = gil.measure(text, TokenizerConfig(str(tokenizer)), 1 if options.quick else 8)
        result["memory"] = memory_alone(options)
    result["seconds_in_all"] = round(time.monotonic() - began, 1)
    print(json.dumps(result), flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--characters", type=float, default=60e6, help="of text to lay out")
    parser.add_argument("--copies", type=int, default=1, help="of the text, for a large source")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/flame-benchmark-data"))
    parser.add_argument(
        "--rivals", nargs="*", choices=rivals.LOADERS, help="these loaders; without names all"
    )
    parser.add_argument("--all", action="store_true", help="everything")
    parser.add_argument("--quick", action="store_true", help="a little text; shows that the script runs")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.backends, options.characters, options.vocabulary = (
            1,
            ["tokenizers"],
            1e6,
            1000,
        )
    if options.rivals is not None and not options.rivals:
        options.rivals = list(rivals.LOADERS)
    return options


def backends(text: Path, tokenizer: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The loader and its tokenizer alone, in turns."""
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
    return results


def loaders(text: Path, tokenizer: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """flame's loader and the others, one after another."""
    names = options.rivals or (["flame/tokenizers"] if options.quick else rivals.LOADERS)
    shape = (8, 256) if options.quick else (ROWS, SEQUENCE_LENGTH)
    total = tokens_of(text, tokenizer)
    folder = rivals.shards(text)
    results: list[dict[str, Any]] = []
    for name in names:
        got = rivals.measure(name, options.folder, folder, tokenizer, total, shape)
        rate = got.get("tokens_per_second") or 0.0
        print(f"{name:<17} {got.get('error') or f'{rate / 1e6:6.2f}M tokens/s on one core'}", flush=True)
        results.append(got)
    return results


def memory_alone(options: argparse.Namespace) -> dict[str, Any]:
    """memory.py in a process of its own: this one holds what the others left."""
    script = Path(__file__).with_name("memory.py")
    command = [sys.executable, str(script), "--folder", str(options.folder)]
    command += ["--characters", str(options.characters), "--steps", str(300 if options.quick else 100_000)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])["memory"]


def tokens_of(text: Path, tokenizer: Path) -> int:
    """The tokens of the whole text."""
    loaded, tokens, waiting = load_tokenizer(tokenizer, bos=False), 0, list[str]()
    with text.open() as file:
        for line in file:
            waiting.append(json.loads(line)["text"])
            if len(waiting) == 1000:
                tokens, waiting = tokens + sum(map(len, loaded.encode(waiting))), []
    return tokens + sum(map(len, loaded.encode(waiting)))


if __name__ == "__main__":
    main()

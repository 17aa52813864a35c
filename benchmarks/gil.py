"""What the loader's thread takes from a training thread by the interpreter's lock.

    python benchmarks/gil.py [--backend tokenizers] [--rounds 8] [--tokens-per-second 1e5] [--json FILE]

A thread of pure Python counts for a while alone, then beside a loader that reads one window ahead and whose
steps another thread takes at a given rate, in turns. The counting thread needs the lock all the time, which a
training thread does not: this is the most that the loader can take. `python_us` is the processor time of the
loader's own thread for 1,000 tokens: most of it with the lock, none of it in the tokenizer's threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from pathlib import Path
from typing import Any

from machine import machine
from text import prepare

from flame.data.catalog import open_catalog
from flame.data.config import DataConfig, SourceConfig, TokenizerConfig
from flame.data.loader import Loader
from flame.data.plan import DataPlan

SEQUENCE_LENGTH, ROWS = 2048, 16
COUNT = 40_000_000  # some seconds, in which the loader gives many steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backend", default="tokenizers")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens-per-second", type=float, default=1e5)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/flame-benchmark-data"))
    parser.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="a little text and one round")
    options = parser.parse_args()
    characters, vocabulary = 60_000_000, 32000
    if options.quick:
        options.rounds, characters, vocabulary = 1, 200_000, 1000
        options.tokens_per_second = 1e6
    text, tokenizer = prepare(options.folder, characters, vocabulary)
    settings = TokenizerConfig(str(tokenizer), backend=options.backend)
    result = {**machine(), "gil": measure(text, settings, options.rounds, options.tokens_per_second)}
    print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


class Consumer(threading.Thread):
    """Takes a loader's steps at a rate, until it is told to end."""

    def __init__(self, loader: Loader, tokens_per_second: float) -> None:
        super().__init__(daemon=True)
        self._loader, self._pause = loader, ROWS * SEQUENCE_LENGTH / tokens_per_second
        self.ends, self.tokens = threading.Event(), 0

    def run(self) -> None:
        while not self.ends.wait(self._pause):
            self.tokens += self._loader.next_step().counts.tokens


def counting() -> float:
    """Seconds of some pure Python, which holds the lock."""
    began, total = time.perf_counter(), 0
    for i in range(COUNT):
        total += i
    return time.perf_counter() - began


def measure(text: Path, settings: TokenizerConfig, rounds: int = 8, rate: float = 1e5) -> dict[str, Any]:
    """The slowdown of the counting thread, by median over the rounds, and the cost of the loader's thread."""
    config = DataConfig([SourceConfig("python", [str(text)])], SEQUENCE_LENGTH)
    plan = DataPlan.of(config, ROWS * SEQUENCE_LENGTH, 0)
    catalog = open_catalog(config, settings, plan, Path())
    alone, beside, tokens = [], [], 0
    for _ in range(rounds):
        alone.append(counting())
        with Loader(catalog, plan, 0, 1, ROWS) as loader:
            consumer = Consumer(loader, rate)
            consumer.start()
            beside.append(counting())
            consumer.ends.set()
            consumer.join()
            tokens += consumer.tokens
    slowdown = statistics.median(b / a for a, b in zip(alone, beside, strict=True)) - 1
    return {
        "tokenizer": settings.backend,
        "asked_tokens_per_second": rate,
        "tokens_per_second": tokens / sum(beside),
        "slowdown": slowdown,
        "seconds_alone": alone,
        "seconds_beside": beside,
        "python_us": python_cost(Loader(catalog, plan, 0, 1, ROWS, prefetch=False), min(rounds, 8) * 2**19),
    }


def python_cost(loader: Loader, wanted: int) -> float:
    """Processor microseconds of the thread that makes the rows, for 1,000 tokens, over `wanted` tokens."""
    loader.next_step()
    began, tokens = time.thread_time(), 0
    while tokens < wanted:
        tokens += loader.next_step().counts.tokens
    return 1e9 * (time.thread_time() - began) / tokens


if __name__ == "__main__":
    main()

"""How well the order mixes a source that is sorted, beside a full permutation and a shuffle buffer.

    python benchmarks/shuffle.py [--json FILE] [--quick]

Each document's covariate is its place in the source, 0 to 1: the worst case of sorted data. Lanes, streams,
blocks and packing are flame's own; only reading is simulated (documents of one size, nothing on disk), so
that a source may be of any size. Figures over the first steps of an epoch, means over seeds (a step sees few
blocks of a large source that one seed says little):

variance_ratio   variance of a step's mean covariate / that of a full permutation (1: as good)
worst_ks         the largest, over all seeds, Kolmogorov-Smirnov distance of a step's covariates from uniform
autocorrelation  of the means of neighbouring steps
buffer_*         the same of files in random order through a buffer of 10,000 documents, as streaming does
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

from flame.data import blocks
from flame.data.config import DataConfig, SourceConfig
from flame.data.encoders import Finish
from flame.data.formats import Bad
from flame.data.lanes import Lane
from flame.data.plan import DataPlan
from flame.data.raw import SourceFile
from flame.data.sources import Source
from flame.data.walk import SourceReader

DOCUMENT_BYTES, DOCUMENT_TOKENS = 4096, 1024
FILES, BUFFER = 100, 10_000
STEPS, SEEDS = 32, 32
TEXT = b" " * DOCUMENT_BYTES  # of every document: the stream reads ahead by length
SIZES = {"100 MiB": 100 * 2**20, "1 GiB": 2**30, "10 GiB": 10 * 2**30, "100 GiB": 100 * 2**30, "1 TiB": 2**40}


class Simulated(SourceReader):
    """A source of documents of one size; a document's position is its number."""

    def __init__(self, size: int, plan: DataPlan) -> None:
        documents = size // DOCUMENT_BYTES
        small = size < blocks.INDEX_BELOW
        each = 1 if small else blocks.block_bytes(size, plan.lanes) // DOCUMENT_BYTES
        starts = np.arange(0, documents, each, dtype=np.int64)
        cut = blocks.join([(starts, np.minimum(starts + each, documents))], each_document=small)
        file = SourceFile("simulated", Path("simulated"), size, "")
        super().__init__(Source("simulated", 1.0, "text", "", (file,), cut, ()), plan)
        self.documents = documents

    def records(self, group: list[tuple[int, int, int]]) -> list[tuple[int, int, bytes | Bad | None]]:
        return [(0, i, TEXT) for _, start, stop in group for i in range(start, stop)]

    def expect(self, group: list[tuple[int, int, int]]) -> None:
        """Nothing is read."""


class FixedLength:
    """A tokenizer to which every document is as long."""

    def begin(self, texts: Sequence[str], begins: Sequence[bool], ends: Sequence[bool]) -> Finish:
        stops = np.arange(1, len(texts) + 1) * DOCUMENT_TOKENS
        return lambda: (np.zeros(len(texts) * DOCUMENT_TOKENS, dtype=np.int32), stops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--tokens-per-step", type=int, default=2**19)
    parser.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="one small source")
    options = parser.parse_args()
    sizes = SIZES
    if options.quick:
        options.steps, options.tokens_per_step = 8, 2**17
        sizes = {"4 MiB": 4 * 2**20}
    result = {**machine(), "shuffle": measure(sizes, options.steps, options.tokens_per_step)}
    print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(sizes: dict[str, int], steps: int, tokens_per_step: int) -> list[dict[str, Any]]:
    """A row of the table for each size."""
    return [{"source": name, **row_of(size, steps, tokens_per_step)} for name, size in sizes.items()]


def row_of(size: int, steps: int, tokens_per_step: int) -> dict[str, Any]:
    config = DataConfig([SourceConfig("simulated", ["simulated"])], sequence_length=4096)
    a_step = tokens_per_step // DOCUMENT_TOKENS
    found: dict[str, list[dict[str, float]]] = {"": [], "buffer_": []}
    for seed in range(SEEDS):
        plan = DataPlan.of(config, tokens_per_step, seed)
        reader = Simulated(size, plan)
        steps = min(steps, reader.documents // a_step)
        found[""].append(figures(covariates(reader, plan, steps), reader.documents))
        buffered = shuffle_buffer(reader.documents, steps * a_step, seed).reshape(steps, a_step)
        found["buffer_"].append(figures(list(buffered), reader.documents))
    shape = {"documents": reader.documents, "blocks": len(reader.source.blocks), "lanes": plan.lanes}
    shape |= {"documents_a_step": a_step, "steps": steps, "seeds": SEEDS}
    for way, seeds in found.items():
        for name in seeds[0]:
            values = [one[name] for one in seeds]
            shape[f"{way}{name}"] = max(values) if name == "worst_ks" else sum(values) / SEEDS
    return shape


def covariates(reader: Simulated, plan: DataPlan, steps: int) -> list[np.ndarray]:
    """The covariates of each step's documents, by flame's order."""
    lanes = [Lane(plan, [reader], FixedLength(), lane) for lane in range(plan.lanes)]
    found: list[np.ndarray] = []
    while len(found) < steps:
        windows = [lane.next_window() for lane in lanes]
        rows = plan.lane_rows(windows[0].index)
        for step in range(plan.steps_in_window(windows[0].index)):
            segments = [
                s for w in windows for row in range(step * rows, (step + 1) * rows) for s in w.rows.named(row)
            ]
            places = [int(s.document_id.split(":")[1]) for s in segments if s.offset == 0]
            found.append(np.array(places) / reader.documents)
    return found[:steps]


def shuffle_buffer(documents: int, wanted: int, seed: int) -> np.ndarray:
    """The covariates of the first `wanted` documents through a shuffle buffer, files in random order."""
    draw = np.random.default_rng(seed)
    each = -(-documents // FILES)

    def source() -> Iterator[int]:
        for file in draw.permutation(FILES).tolist():
            yield from range(file * each, min(documents, (file + 1) * each))

    walk = source()
    buffer = [next(walk) for _ in range(min(BUFFER, documents))]
    out: list[int] = []
    for i in walk:
        if len(out) == wanted:
            break
        place = int(draw.integers(len(buffer)))
        out.append(buffer[place])
        buffer[place] = i
    rest = draw.permutation(len(buffer))[: wanted - len(out)]
    return np.array(out + [buffer[i] for i in rest.tolist()]) / documents


def figures(steps: list[np.ndarray], documents: int) -> dict[str, float]:
    """How far the steps are from a full permutation's."""
    means = np.array([step.mean() for step in steps])
    sizes = np.array([len(step) for step in steps])
    expected = float(np.mean((1 / 12) / sizes * (1 - sizes / documents)))
    distances = [ks(step) for step in steps]
    centred = means - 0.5
    neighbours = float((centred[1:] * centred[:-1]).mean() / (centred**2).mean()) if len(means) > 1 else 0.0
    return {
        "variance_ratio": float((centred**2).mean()) / expected,
        "worst_ks": max(distances),
        "autocorrelation": neighbours,
    }


def ks(values: np.ndarray) -> float:
    """The Kolmogorov-Smirnov distance from the uniform distribution on [0, 1]."""
    ordered, count = np.sort(values), len(values)
    above = np.arange(1, count + 1) / count - ordered
    return float(max(above.max(), (ordered - np.arange(count) / count).max()))


if __name__ == "__main__":
    main()

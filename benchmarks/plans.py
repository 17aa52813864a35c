"""What a 7B model needs on 8, 64, 512 and 4,096 GPUs: memory and what a rank sends in a step.

    python benchmarks/plans.py [--json benchmarks/results/plans-7B.json] [--markdown]

Arithmetic, by `flame train --dry-run`: nothing is trained. Steps have 4M tokens, on 4,096 GPUs 16M, in rows
of 4,096; a row is a micro-batch.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import tomli_w

from flame.memory_plan import LayoutPlan, plan_layout
from flame.recipe import read_recipe

ROOT = Path(__file__).parents[1]
GIB = 2**30
LAYOUTS: dict[int, dict[str, int]] = {
    8: {"shard": 8},
    64: {"shard": 64},
    512: {"replicate": 8, "shard": 64},
    4096: {"replicate": 32, "shard": 64, "tensor": 2},
}
HEADING = (
    "| model | GPUs | layout | micro-batches | GiB on a GPU | activations | a GPU sends in a step, GiB |"
)
MODELS = ("transformer_7B", "gla_7B")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--markdown", action="store_true", help="the table of docs/parallelism.md")
    options = parser.parse_args()
    plans = {model: [plan(model, ranks, ways) for ranks, ways in LAYOUTS.items()] for model in MODELS}
    if options.markdown:
        print(HEADING)
        print("|---|---|---|---|---|---|---|")
    for model, found in plans.items():
        for one in found:
            print(row(model, one) if options.markdown else f"{model}: {json.dumps(one.record())}")
    if options.json is not None:
        records = {model: [one.record() for one in found] for model, found in plans.items()}
        options.json.write_text(json.dumps(records, indent=1) + "\n")


def plan(model: str, ranks: int, ways: dict[str, int]) -> LayoutPlan:
    recipe: dict[str, Any] = {
        "run": {"directory": "run", "steps": 1},
        "model": {"config": str(ROOT / "configs/models" / f"{model}.json")},
        "tokenizer": {"path": "bytes"},
        "data": {"sequence_length": 4096, "sources": [{"name": "text", "files": "text.jsonl"}]},
        "batch": {"tokens_per_step": 2**24 if ranks > 1000 else 2**22, "micro_batch_rows": 1},
        "parallel": ways,
    }
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(tomli_w.dumps(recipe))
        file.flush()
        return plan_layout(read_recipe(Path(file.name)), ranks)


def row(model: str, one: LayoutPlan) -> str:
    sizes = {
        name: getattr(one.layout, name) for name in ("pipeline", "replicate", "shard", "context", "tensor")
    }
    layout = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    sent = one.record()["traffic"]
    told = ", ".join(f"{count / GIB:,.1f} {name}" for name, count in sent.items() if count)
    most = one.most
    numbers = f"{one.micro_batches} | {most.total / GIB:.1f} | {most.activations / GIB:.1f}"
    return f"| {model} | {one.layout.ranks:,} | {layout} | {numbers} | {told} |"


if __name__ == "__main__":
    main()

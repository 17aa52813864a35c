"""The same steps on one GPU and on several, by each layout: losses, speed and memory.

    python benchmarks/layouts.py configs/recipes/gla_340M.toml ... [--gpus 2] [--steps 20] \
        [--layouts one,other-order,shard,tensor,pipeline,context] [--kernels ARCHIVE ...] \
        [--json results.jsonl] [--section.field VALUE ...]

Every run is `flame train` on this machine's own text: 131,072 tokens a step in rows of 32,768, one a
micro-batch, at a rate of 1e-4, which lets roundings grow slowly. `other-order` is one GPU with micro-batches
of two rows: what another order of sums alone makes of the losses. Prints a line a run, and a JSON object for
each recipe: each layout's losses and gradient norms step by step, and beside one GPU's run their largest
differences (that of norms relative); tokens per second, the median of the last steps; rank 0's peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from laid_out import lay_out
from train import measured

from flame.train.journal import read_lines

FLAME = [sys.executable, "-m", "flame"]
Steps = list[dict[str, Any]]
LAYOUTS = ("one", "other-order", "shard", "tensor", "pipeline", "context")
ON_ONE = {"one": [], "other-order": ["--batch.micro-batch-rows", "2"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--kernels", nargs="*", default=[], help="archives of `flame kernels pack`")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds a run may take")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/flame-layouts"))
    parser.add_argument("--json", type=Path, default=None, help="append the results to this file")
    options, options.overrides = parser.parse_known_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("FLAME_KERNEL_CACHE", str(options.folder / "kernels"))
    for archive in options.kernels:
        subprocess.run([*FLAME, "kernels", "unpack", archive], stdout=sys.stderr, check=True)
    for recipe in options.recipes:
        result = compare(recipe, options)
        line = json.dumps(result)
        print(line, flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.write(line + "\n")


def compare(recipe: str, options: argparse.Namespace) -> dict[str, Any]:
    """One recipe by all layouts."""
    path = lay_out(
        recipe,
        options.folder,
        characters=int(10e6),
        run={"steps": options.steps},
        data={"sequence_length": 32768},
        batch={"tokens_per_step": 131072, "micro_batch_rows": 1},
        optimizer={"learning_rate": 1e-4, "epsilon": 1e-8},
        schedule={"warmup": f"{min(10, options.steps)} steps"},
        logging={"every": "1 steps"},
    )
    result: dict[str, Any] = {"recipe": recipe, "gpus": options.gpus, "steps": options.steps, "layouts": {}}
    alone: Steps = []
    for layout in options.layouts.split(","):
        found, steps = train(path, layout, options)
        alone = steps if layout == "one" else alone
        if steps and alone:
            found |= differences(steps, alone)
        for name in ("device", "packages"):
            result[name] = found.pop(name, result.get(name))
        result["layouts"][layout] = found
        short = {name: value for name, value in found.items() if not name.startswith("each_")}
        print(Path(recipe).stem, layout, json.dumps(short), file=sys.stderr, flush=True)
    return result


def train(
    recipe: Path, layout: str, options: argparse.Namespace
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One run: its figures, and its record of each step."""
    run = options.folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    ranks = 1 if layout in ON_ONE else options.gpus
    settings = ON_ONE.get(layout, [f"--parallel.{layout}", str(ranks)])
    command = [*FLAME, "train", str(recipe), "--nproc", str(ranks), *options.overrides, *settings]
    began = time.monotonic()
    with (options.folder / f"{layout}.log").open("wb") as log:
        try:
            code: int | None = subprocess.run(
                command, stdout=log, stderr=log, timeout=options.limit, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    seconds = round(time.monotonic() - began, 1)
    steps = list(read_lines(run / "metrics.jsonl"))
    found = {"exit": code, **measured(run), "seconds_in_all": seconds}
    found |= {f"each_{name}": [round(step[name], 5) for step in steps] for name in ("loss", "grad_norm")}
    return found, steps


def differences(steps: Steps, alone: Steps) -> dict[str, Any]:
    """Of a run from one GPU's, step by step."""
    pairs = list(zip(steps, alone, strict=False))
    return {
        "steps_compared": len(pairs),
        "same_rows": all(one["rows_digest"] == two["rows_digest"] for one, two in pairs),
        "loss_difference": max(abs(one["loss"] - two["loss"]) for one, two in pairs),
        "grad_norm_difference": max(abs(one["grad_norm"] / two["grad_norm"] - 1) for one, two in pairs),
    }


if __name__ == "__main__":
    main()

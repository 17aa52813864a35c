"""The same steps on one GPU and on several, by each layout: losses, speed and memory.

    python benchmarks/layouts.py configs/recipes/gla_340M.toml ... [--gpus 2] [--steps 20] \
        [--layouts one,shard,tensor,pipeline,context] [--kernels ARCHIVE ...] [--json results.jsonl]

Every run is `flame train` on this machine's own text, with rows of 16,384 tokens and 65,536 tokens a step.
Prints a line a run, and one JSON object for each recipe: each layout's losses, and beside one GPU's run the
largest differences of loss and (relative) gradient norm over all steps; tokens per second, the median of the
last steps; rank 0's peak memory.
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
WAYS = ("shard", "tensor", "pipeline", "context")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layouts", default=",".join(("one", *WAYS)))
    parser.add_argument("--kernels", nargs="*", default=[], help="archives of `flame kernels pack`")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds a run may take")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/flame-layouts"))
    parser.add_argument("--json", type=Path, default=None, help="append the results to this file")
    options = parser.parse_args()
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
        data={"sequence_length": 16384},
        batch={"tokens_per_step": 65536, "micro_batch_rows": 1},
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
        print(Path(recipe).stem, layout, json.dumps(found), file=sys.stderr, flush=True)
    return result


def train(
    recipe: Path, layout: str, options: argparse.Namespace
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One run: its figures, and its record of each step."""
    run = options.folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    ranks = 1 if layout == "one" else options.gpus
    parallel = [] if layout == "one" else [f"--parallel.{layout}", str(ranks)]
    command = [*FLAME, "train", str(recipe), "--nproc", str(ranks), *parallel]
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
    return {"exit": code, **measured(run), "seconds_in_all": seconds}, steps


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

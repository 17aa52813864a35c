"""Speed of training a recipe as a user would: `flame train` on this machine's text, read from its metrics.

    python benchmarks/train.py configs/recipes/transformer_340M.toml --steps 30 --json results.jsonl \
        [--section.field VALUE ...]

Prints one JSON object: the median over the last steps of tokens per second and step time, the share of
time waiting for data, peak memory, MFU, the first and last losses, the first step's seconds, and
hardware and versions.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from laid_out import lay_out

SETTLED = 20  # steps at the end that are measured, at the least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--log-every", type=int, default=5, help="steps; each log waits for the GPU")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--name", default=None, help="what the result calls this run")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/flame-benchmark"))
    parser.add_argument("--json", type=Path, default=None, help="append the result to this file")
    parser.add_argument("--characters", type=float, default=40e6, help="of text to lay out")
    options, overrides = parser.parse_known_args()

    run = options.folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    path = lay_out(
        options.recipe,
        options.folder,
        characters=int(options.characters),
        vocabulary=options.vocabulary,
        run={"steps": options.steps},
        schedule={"warmup": f"{min(10, options.steps)} steps"},
        logging={"every": f"{options.log_every} steps"},
    )
    command = [sys.executable, "-m", "flame", "train", str(path), *overrides]
    began = time.monotonic()
    code = subprocess.run(command, check=False).returncode
    result = {"name": options.name or Path(options.recipe).stem, "exit": code, **measured(run)}
    result |= {"seconds_in_all": round(time.monotonic() - began, 1), "overrides": " ".join(overrides)}
    print("RESULT", json.dumps(result), flush=True)
    if options.json:
        with options.json.open("a") as file:
            file.write(json.dumps(result) + "\n")
    sys.exit(code)


def measured(run: Path) -> dict[str, Any]:
    """The run's own figures, over its last steps."""
    try:
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except FileNotFoundError:
        metrics = []
    if not metrics:
        return {"steps": 0}
    settled = [m for m in metrics if m["step"] > metrics[-1]["step"] - SETTLED]
    environment = json.loads((run / "environment.json").read_text())
    seconds = statistics.median(m["step_seconds"] for m in settled)
    return {
        "steps": metrics[-1]["step"],
        "tokens_per_second": round(statistics.median(m["tokens_per_second"] for m in settled)),
        "step_seconds": seconds,
        "step_seconds_range": [
            min(m["step_seconds"] for m in settled),
            max(m["step_seconds"] for m in settled),
        ],
        "waiting_share": round(statistics.median(m["data_seconds"] for m in settled) / seconds, 5),
        "mfu": settled[-1]["mfu"],
        "memory_gib": metrics[-1]["memory_gib"],
        "first_step_seconds": metrics[0]["step_seconds"],
        "losses": [round(metrics[i]["loss"], 4) for i in (0, len(metrics) // 2, -1)],
        "device": environment["device"],
        "packages": environment["packages"],
    }


if __name__ == "__main__":
    main()

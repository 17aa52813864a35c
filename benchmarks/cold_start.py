"""Seconds from `flame train` to the end of the first step, with empty and with prepared kernel caches.

    python benchmarks/cold_start.py configs/recipes/gla_340M.toml [--cases hook,unpacked,plain] \
        [--limit 420] [--json results.jsonl] [--archive kernels.tar.zst] [--section.field VALUE ...]

Cases: `plain`: empty caches, Triton's own autotuning; `hook`: empty caches, as any user starts; `again`: with
what `hook` left; `unpacked`: `kernels warm` and `pack` in one folder, then `unpack` into an empty one. A
case that takes longer than the limit is ended, and reported as null. Prints one JSON object. Needs a GPU.
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

FLAME = [sys.executable, "-m", "flame"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--cases", default="hook,again,unpacked,plain")
    parser.add_argument("--limit", type=float, default=420.0, help="seconds a case may take")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/flame-cold-start"))
    parser.add_argument("--archive", type=Path, default=None, help="keep the packed kernels here")
    parser.add_argument("--json", type=Path, default=None, help="append the result to this file")
    parser.add_argument("--characters", type=float, default=10e6, help="of text to lay out")
    options, overrides = parser.parse_known_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    options.overrides = overrides
    recipe = lay_out(
        options.recipe,
        options.folder,
        characters=int(options.characters),
        run={"steps": 3},
        schedule={"warmup": "1 steps"},
        logging={"every": "1 steps"},
    )
    result: dict[str, Any] = {"recipe": options.recipe, "cores": len(os.sched_getaffinity(0)), "cases": {}}
    for case in options.cases.split(","):
        print(f"cold_start: {case}", file=sys.stderr, flush=True)
        result["cases"][case] = CASES[case](recipe, options)
    environment = options.folder / "run" / "environment.json"
    if environment.exists():
        told = json.loads(environment.read_text())
        result |= {"device": told["device"], "packages": told["packages"]}
    line = json.dumps(result)
    print(line)
    if options.json is not None:
        with options.json.open("a") as file:
            file.write(line + "\n")


def empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def variables(cache: Path, **more: str) -> dict[str, str]:
    """The environment with all kernel caches in `cache`."""
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    return {**kept, "FLAME_KERNEL_CACHE": str(cache), **more}


def first_step(recipe: Path, options: argparse.Namespace, env: dict[str, str]) -> dict[str, Any]:
    """Starts training; seconds until its first step is logged, and until the third."""
    run = options.folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    log = (options.folder / "train.log").open("ab")
    begun = time.monotonic()
    process = subprocess.Popen(
        [*FLAME, "train", str(recipe), *options.overrides], env=env, stdout=log, stderr=log
    )
    metrics, first, loss = run / "metrics.jsonl", None, None
    while process.poll() is None and time.monotonic() - begun < options.limit:
        if first is None and metrics.exists() and metrics.read_bytes().count(b"\n"):
            first = time.monotonic() - begun
            loss = json.loads(metrics.read_text().splitlines()[0])["loss"]
        time.sleep(0.05)
    ended = process.poll() is not None
    process.kill()
    process.wait()
    last = time.monotonic() - begun if ended and process.returncode == 0 else None
    return {
        "first_step_seconds": first,
        "third_step_and_exit_seconds": last,
        "loss": loss,
        "code": process.returncode,
    }


def plain(recipe: Path, options: argparse.Namespace) -> dict[str, Any]:
    cache = empty(options.folder / "plain")
    own = {"TRITON_CACHE_DIR": str(cache / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
    return first_step(recipe, options, variables(cache, FLAME_KERNELS="plain", **own))


def hook(recipe: Path, options: argparse.Namespace) -> dict[str, Any]:
    return first_step(recipe, options, variables(empty(options.folder / "hook")))


def again(recipe: Path, options: argparse.Namespace) -> dict[str, Any]:
    return first_step(recipe, options, variables(options.folder / "hook"))


def unpacked(recipe: Path, options: argparse.Namespace) -> dict[str, Any]:
    archive = (options.archive or options.folder / "kernels.tar.zst").absolute()
    env = variables(empty(options.folder / "warm"))
    begun = time.monotonic()
    command = [*FLAME, "kernels", "warm", str(recipe), "--json", *options.overrides]
    warmed = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.monotonic() - begun
    if warmed.returncode:
        return {"warm_code": warmed.returncode, "output": warmed.stdout[-2000:]}
    report = json.loads(warmed.stdout[warmed.stdout.index("{\n") :])
    subprocess.run([*FLAME, "kernels", "pack", str(archive)], env=env, stdout=sys.stderr, check=True)
    env = variables(empty(options.folder / "unpacked"))
    subprocess.run([*FLAME, "kernels", "unpack", str(archive)], env=env, stdout=sys.stderr, check=True)
    return {
        "warm_seconds": seconds,
        "warm": report,
        "archive_bytes": archive.stat().st_size,
        **first_step(recipe, options, env),
    }


CASES = {"plain": plain, "hook": hook, "again": again, "unpacked": unpacked}

if __name__ == "__main__":
    main()

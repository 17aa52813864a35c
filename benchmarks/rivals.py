"""flame's loader beside what a user would take instead, each in an environment of its own.

Called by data.py. The same text for all, 16 files of jsonl, to fixed rows as tensors; each process is pinned
to one core and has no workers. `streaming` and `grain` read rows that were tokenized beforehand.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TORCH = "torch>=2.11,<2.14"
REQUIREMENTS: dict[str, list[str]] = {
    "torchtitan": [TORCH, "torchtitan==0.3.0", "datasets<4.8", "tokenizers"],
    "datasets": [TORCH, "datasets<4.8", "torchdata", "transformers>=5.17,<5.25"],
    "streaming": [TORCH, "mosaicml-streaming", "tokenizers"],
    "grain": [TORCH, "grain", "array_record", "tokenizers"],
}
PREPARED = ("streaming", "grain")
LOADERS = ("flame/tokenizers", "flame/gigatoken", *REQUIREMENTS)
FILES = 16  # that the text is dealt to, so that ranks can share it by file
SAME = 12  # steps compared between one rank and two
PATIENCE = 240  # seconds that the processes of one job may take
AFTER = 3  # steps compared after a resume
MEASURE = Path(__file__).parent / "loaders" / "measure.py"


class Failed(Exception):
    """A rival could not be installed or run; one line that says why."""


def shards(text: Path) -> Path:
    """The lines of a jsonl file in files of their own, made once; their folder."""
    folder = text.with_name(f"{text.stem}-{FILES}")
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        partial.mkdir(exist_ok=True)
        lines = text.read_text().splitlines(keepends=True)
        for i in range(FILES):
            part = lines[i * len(lines) // FILES : (i + 1) * len(lines) // FILES]
            (partial / f"{i:02}.jsonl").write_text("".join(part))
        partial.rename(folder)
    return folder


def environment(name: str, folder: Path) -> tuple[str, dict[str, str]]:
    """The interpreter of a rival's environment, made once, and versions there. Raises Failed."""
    home = folder / "environments" / name
    python, marker = home / "bin" / "python", home / "ready.json"
    wanted = REQUIREMENTS[name]
    if marker.exists() and json.loads(marker.read_text())["requirements"] == wanted:
        return str(python), json.loads(marker.read_text())["versions"]
    for command in (
        [sys.executable, "-m", "venv", str(home)],
        [str(python), "-m", "pip", "install", "--quiet", *wanted],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Failed(f"cannot be installed: {last_line(done.stderr)}")
    listed = subprocess.run(
        [str(python), "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True
    )
    versions = {entry["name"]: entry["version"] for entry in json.loads(listed.stdout)}
    names = [w.split("=")[0].split("<")[0].split(">")[0].replace("_", "-") for w in wanted]
    found = {n: v for n, v in versions.items() if n.replace("_", "-") in names}
    marker.write_text(json.dumps({"requirements": wanted, "versions": found}))
    return str(python), found


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1][:300]


def ranks(python: str, job: dict[str, Any], world: int = 1) -> list[dict[str, Any]]:
    """What the processes of one job told. Raises Failed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes: list[subprocess.Popen[bytes]] = []
    outputs = [Path(job["folder"]) / f"rank-{rank}" for rank in range(world)]
    for rank, output in enumerate(outputs):
        path = output.with_suffix(".json")
        path.write_text(json.dumps({**job, "rank": rank, "world": world}))
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        own |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "HF_HUB_OFFLINE": 1}
        environ = os.environ | {name: str(value) for name, value in own.items()}
        if job["module"] != "with_flame":
            environ.pop("PYTHONPATH", None)
        command = [python, str(MEASURE), str(path)]
        with output.with_suffix(".out").open("wb") as out, output.with_suffix(".err").open("wb") as err:
            processes.append(subprocess.Popen(command, env=environ, stdout=out, stderr=err))
    failed = first_failure(processes)
    if failed is not None:
        raise Failed(last_line(outputs[failed].with_suffix(".err").read_text()))
    texts = [output.with_suffix(".out").read_text() for output in outputs]
    return [json.loads(text.strip().splitlines()[-1]) for text in texts]


def first_failure(processes: list[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all; end them where one fails, and say which. Raises Failed where they take too long."""
    began = time.monotonic()
    try:
        while any(process.poll() is None for process in processes):
            failed = next((i for i, process in enumerate(processes) if process.poll()), None)
            if failed is not None:
                return failed
            if time.monotonic() - began > PATIENCE:
                raise Failed(f"no answer in {PATIENCE} s")
            time.sleep(0.05)
        return next((i for i, process in enumerate(processes) if process.returncode), None)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def together(told: list[dict[str, Any]]) -> list[list[str]]:
    """The rows of each recorded step over all ranks, without their order."""
    steps = told[0]["rows"]
    return [sorted(row for part in told for row in part["rows"][step]) for step in steps]


def measure(name: str, folder: Path, text: Path, tokenizer: Path, total: int, shape: tuple[int, int]) -> dict:
    """One loader's figures; `total`: tokens of the text; `shape`: rows a step, tokens a row."""
    library, _, option = name.partition("/")
    own = folder / "loaders" / name.replace("/", "-")
    own.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"loader": name}
    try:
        python, result["versions"] = (
            (sys.executable, {}) if library == "flame" else environment(library, folder)
        )
        rows, length = shape
        in_all = total // (rows * length)
        marks = [max(1, in_all // 10), max(2, in_all * 9 // 10)]
        job: dict[str, Any] = {
            "module": f"with_{library}",
            "phase": "read",
            "text": str(text),
            "tokenizer": str(tokenizer),
            "folder": str(own),
            "sequence_length": length,
            "rows_per_step": rows,
            "steps": marks[1] + AFTER,
            "save_after": marks,
            "record": [],
            "option": option,
        }
        after = {mark: list(range(mark, mark + AFTER)) for mark in marks}
        first = list(range(min(SAME, marks[1])))
        job["record"] = sorted({*first, *after[marks[0]], *after[marks[1]]})
        if library in PREPARED:
            (made,) = ranks(python, {**job, "phase": "prepare"})
            result["prepare_seconds"], result["prepare_tokens"] = made["seconds"], made["tokens"]
        (whole,) = ranks(python, job)
        seen = {int(step): sorted(found) for step, found in whole["rows"].items()}
        for key in ("tokens_per_second", "tokens_per_processor_second", "first_seconds", "memory_mib"):
            result[key] = whole.get(key)
        result["import_seconds"] = whole["import_seconds"]
        result["resume"] = {}
        for share, mark in zip(("10%", "90%"), marks, strict=True):
            state = whole["states"][str(mark)]
            again = {**job, "state": state["path"], "steps": AFTER, "save_after": [], "record": [0, 1, 2]}
            (resumed,) = ranks(python, again)
            exact = together([resumed]) == [seen[step] for step in after[mark]]
            result["resume"][share] = {
                "seconds": resumed["first_seconds"],
                "state_bytes": state["bytes"],
                "state_seconds": state["seconds"],
                "exact": exact,
            }
        result["same_rows_on_two_ranks"] = compared(
            python, {**job, "steps": len(first), "save_after": [], "record": first}, [seen[s] for s in first]
        )
        result["resumed_on_two_ranks"] = compared(
            python, {**again, "steps": AFTER}, [seen[s] for s in after[marks[1]]]
        )
    except Failed as error:
        result["error"] = str(error)
    return result


def compared(python: str, job: dict[str, Any], expected: list[list[str]]) -> str:
    """Whether two ranks read together, step by step, the rows that one read: yes, no or why not."""
    try:
        return "yes" if together(ranks(python, job, 2)) == expected else "no"
    except Failed as error:
        return f"refused: {error}"

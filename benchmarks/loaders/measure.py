"""Measure one loader in the environment it runs in, pinned to one core: a process a phase.

    python benchmarks/loaders/measure.py JOB.json

`benchmarks/rivals.py` writes the job and reads the one JSON object that is printed last. Needs torch and the
loader's own library, nothing of flame (but for flame's own loader).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Job:
    """What a process is to do."""

    module: str  # the file beside this one that makes the pipeline
    phase: str  # prepare: tokenize beforehand; read: a pass from the beginning; resume: from a state
    text: str  # a folder of jsonl files, field "text"
    tokenizer: str  # a folder with tokenizer.json and tokenizer_config.json
    folder: str  # the loader's own, for what it makes beforehand and its states
    sequence_length: int
    rows_per_step: int  # over all ranks
    rank: int
    world: int
    steps: int
    save_after: list[int]  # numbers of steps read
    record: list[int]  # steps whose rows are told, by hash
    state: str | None = None  # the file of a state to go on from
    option: str = ""  # flame: the library of tokenizers

    @property
    def local_rows(self) -> int:
        return self.rows_per_step // self.world


class Pipeline(Protocol):
    """A loader of one rank: made with (job, state), where `state` is None or what `state` gave before."""

    def next_rows(self) -> torch.Tensor:
        """The rank's rows of the next step: [b, L]."""
        ...

    def state(self) -> bytes:
        """All that a checkpoint must hold of it."""
        ...

    def settled(self) -> bool:
        """Whether all that was read and tokenized so far has been given."""
        ...


def hashes(rows: torch.Tensor) -> list[str]:
    """A hash of each row's tokens."""
    content = rows.to(torch.int32).numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest() for row in content]


def read(pipeline: Pipeline, job: Job, began: float) -> dict[str, Any]:
    """Steps one after another; rates are over what follows the first step, as far as it is settled."""
    recorded: dict[int, list[str]] = {}
    saved: dict[int, dict[str, Any]] = {}
    wall = processor = 0.0
    settled: tuple[int, float, float] = (0, 0.0, 0.0)  # steps after the first, seconds, processor seconds
    first_seconds = 0.0
    for step in range(job.steps):
        wall_before, processor_before = time.perf_counter(), time.process_time()
        rows = pipeline.next_rows()
        if step:
            wall += time.perf_counter() - wall_before
            processor += time.process_time() - processor_before
        else:
            first_seconds = time.perf_counter() - began
        assert tuple(rows.shape) == (job.local_rows, job.sequence_length), rows.shape
        if step and pipeline.settled():
            settled = (step, wall, processor)
        if step in job.record:
            recorded[step] = hashes(rows)
        if step + 1 in job.save_after:
            before = time.perf_counter()
            state = pipeline.state()
            seconds = time.perf_counter() - before
            path = Path(job.folder) / f"state-{step + 1}"
            path.write_bytes(state)
            saved[step + 1] = {"path": str(path), "bytes": len(state), "seconds": seconds}
    result: dict[str, Any] = {"first_seconds": first_seconds, "rows": recorded, "states": saved}
    if settled[0]:
        tokens = settled[0] * job.local_rows * job.sequence_length
        result["tokens_per_second"] = tokens / settled[1]
        result["tokens_per_processor_second"] = tokens / settled[2]
    return result


def most_held_mib() -> float:
    """Of this program alone: what getrusage tells begins with what the process held that forked it."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 2**10


def main() -> None:
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    began = time.perf_counter()
    module = importlib.import_module(job.module)
    result: dict[str, Any] = {"import_seconds": time.perf_counter() - began}
    began = time.perf_counter()
    if job.phase == "prepare":
        result["tokens"] = module.prepare(job)
        result["seconds"] = time.perf_counter() - began
    else:
        state = Path(job.state).read_bytes() if job.state else None
        result |= read(module.open_pipeline(job, state), job, began)
    result["memory_mib"] = most_held_mib()
    print(json.dumps(result), flush=True)
    sys.stdout.flush()
    os._exit(0)  # libraries' threads and shared memory may wait for each other at exit


if __name__ == "__main__":
    main()

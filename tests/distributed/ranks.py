"""Ranks for tests: forked from one process that has everything imported, 0.1 s each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from flame import schema
from flame.commands.train import WARM, WARM_WITHOUT_GPU, has_gpu
from flame.errors import FlameError
from flame.recipe import read_recipe
from flame.train.journal import read_lines

# where there is a GPU, importing fla touches it, which a forked process could not use then
WITH_GPU = has_gpu()
if WITH_GPU:
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # nor if the driver had been asked for GPUs
CONTEXT: Any = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([*WARM] if WITH_GPU else [*WARM, *WARM_WITHOUT_GPU])


class Ranks:
    """Processes that run `work(*args)` as the ranks of one world."""

    def __init__(self, size: int, work: Callable[..., int], *args: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        world = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
        # the warm parent may be older than what a test has set
        world |= {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        environments = [
            world | {"RANK": str(r), "LOCAL_RANK": str(r), "OMP_NUM_THREADS": "1"} for r in range(size)
        ]
        self._errors = CONTEXT.SimpleQueue()
        self.processes = [
            CONTEXT.Process(target=as_rank, args=(e, self._errors, work, *args)) for e in environments
        ]
        for process in self.processes:
            process.start()

    def signal(self, number: int) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def codes(self, timeout: float = 120) -> list[int | None]:
        """Waits for the end; exit codes in the order of ranks."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        found = [process.exitcode for process in self.processes]
        self.signal(signal.SIGKILL)
        return found

    def error(self) -> str:
        """The message of a FlameError that a rank raised."""
        return self._errors.get()


def as_rank(environment: dict[str, str], errors: Any, work: Callable[..., int], *args: Any) -> None:
    os.environ.update(environment)
    try:
        sys.exit(work(*args))
    except FlameError as error:
        errors.put(str(error))
        sys.exit(1)


def train_text(text: str) -> int:
    """`flame.run.work` on a recipe's text."""
    from flame.run import work
    from flame.train.recovery import StopFlag

    return work(StopFlag(), text)


def train_on(size: int, recipe: Path) -> Ranks:
    """Begins to train a recipe on `size` ranks."""
    return Ranks(size, train_text, schema.to_toml(read_recipe(recipe)))


def metrics(run: Path) -> list[dict[str, Any]]:
    return list(read_lines(run / "metrics.jsonl"))


def wait_for_step(run: Path, step: int, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not any(record["step"] >= step for record in metrics(run)):
        assert time.monotonic() < deadline, f"no step {step}"
        time.sleep(0.01)

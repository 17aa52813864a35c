"""The links between the ranks of this machine: really connected, and timed.

`python -m flame.doctor.links BACKEND RANK RANKS FILE` is one rank; `measure` starts them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flame.doctor.finding import Finding, fail, ok, warn
from flame.train.lifeline import die_with_parent

SECONDS = 180  # for processes to start, connect and reduce
BYTES = {"gloo": 2**24, "nccl": 2**28}  # of the tensor that is reduced
SLOW = {"gloo": 0.05, "nccl": 8.0}  # GB/s: below, something is wrong: NCCL's is about PCIe 3
FIX = {
    "gloo": "GLOO_SOCKET_IFNAME=lo for one machine; the host's own name must lead to it (/etc/hosts)",
    "nccl": "NCCL_DEBUG=INFO shows which way it takes; nvidia-smi topo -m; a container needs --ipc=host",
}
TIMES = 3


def links(gpus: int, ranks: int) -> Iterator[Finding]:
    """gloo between `ranks` processes, and NCCL between the GPUs where there are several."""
    yield judged("gloo", ranks, measure("gloo", ranks))
    if gpus > 1:
        yield judged("nccl", gpus, measure("nccl", gpus))


def judged(backend: str, ranks: int, measured: dict[str, Any]) -> Finding:
    """A measurement in words."""
    if "error" in measured:
        return fail(backend, f"{ranks} ranks: {measured['error']}", FIX[backend])
    speed = measured["gb_per_second"]
    found = f"{ranks} ranks: {speed:.2f} GB/s, {1e6 * measured['latency_seconds']:.0f} us for a number"
    return ok(backend, found) if speed >= SLOW[backend] else warn(backend, found, FIX[backend])


def measure(backend: str, ranks: int, seconds: float = SECONDS) -> dict[str, Any]:
    """What rank 0 measured: `gb_per_second` (2 (n - 1) / n times the bytes reduced) and `latency_seconds`;
    or `error`."""
    with tempfile.TemporaryDirectory(prefix="flame-doctor-") as folder:
        command = [sys.executable, "-m", "flame.doctor.links", backend]
        processes = [
            subprocess.Popen(
                [*command, str(rank), str(ranks), str(Path(folder) / "store")],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for rank in range(ranks)
        ]
        try:
            return collected(processes, time.monotonic() + seconds)
        finally:
            for process in processes:
                with suppress(ProcessLookupError):
                    process.kill()
                process.wait()
                for stream in (process.stdout, process.stderr):
                    if stream is not None:
                        stream.close()


def collected(processes: list[subprocess.Popen[str]], deadline: float) -> dict[str, Any]:
    """Rank 0's answer, or what went wrong first."""
    codes: list[int | None] = [None]
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if any(codes) or None not in codes:
            break
        time.sleep(0.05)
    for rank, (process, code) in enumerate(zip(processes, codes, strict=False)):
        if code:
            assert process.stderr is not None
            last = (process.stderr.read().strip().splitlines() or ["no message"])[-1]
            return {"error": f"rank {rank} failed: {last}"}
    if None in codes:
        return {"error": "they did not finish in time: the ranks cannot reach each other"}
    assert processes[0].stdout is not None
    return json.loads(processes[0].stdout.read().strip().splitlines()[-1])


def be_rank(backend: str, rank: int, ranks: int, file: str) -> dict[str, Any]:
    """Connects, reduces, and gives what it took."""
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=dist.FileStore(file, ranks), rank=rank, world_size=ranks)
    one, many = (torch.ones(n, device=device) for n in (1, BYTES[backend] // 4))
    latency = min(timed(one, device) for _ in range(TIMES + 1))
    seconds = min(timed(many, device) for _ in range(TIMES))
    expected = float(ranks) ** (TIMES)
    if many.min() != expected or many.max() != expected:
        raise SystemExit(f"a sum over the ranks is wrong: {float(many[0])} in place of {expected}")
    dist.destroy_process_group()
    moved = 2 * (ranks - 1) / ranks * BYTES[backend]
    return {"gb_per_second": moved / seconds / 1e9, "latency_seconds": latency}


def timed(tensor: torch.Tensor, device: torch.device) -> float:
    """Seconds of one sum over the ranks."""
    began = time.perf_counter()
    dist.all_reduce(tensor)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


if __name__ == "__main__":
    die_with_parent()
    backend, rank, ranks, file = sys.argv[1:]
    print(json.dumps(be_rank(backend, int(rank), int(ranks), file)))

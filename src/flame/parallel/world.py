"""This process's place among the ranks: its device, and the groups it talks on."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from flame.errors import FlameError

T = TypeVar("T")
CONNECT_SECONDS = 300


@dataclass(frozen=True, slots=True)
class World:
    """Rank, device and the two gloo groups beside the default one."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup  # the agreement before each step, and what is told at the start
    checkpoint: dist.ProcessGroup  # saves run in a thread of their own, so they need a group of their own
    store: dist.Store  # of this attempt; keys of a package begin with its name

    def from_rank_zero(self, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0, on every rank; its FlameError is raised on every rank."""
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = make()
            except FlameError as error:
                box[1] = error
        dist.broadcast_object_list(box, group_src=0, group=self.control)
        if box[1] is not None:
            raise box[1]
        return cast("T", box[0])

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values


def join_world() -> World:
    """Connects with the other ranks: NCCL and gloo on GPUs, gloo without."""
    _adopt_slurm()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    # after a restart the store still holds the dead ranks' addresses: each attempt has names of its own
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    agent_has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0 and not agent_has_store,
        timeout=timedelta(seconds=CONNECT_SECONDS),
        wait_for_workers=False,
    )
    store = dist.PrefixStore(f"flame/attempt_{attempt}", store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        device_id=device if on_gpu else None,
    )
    control, checkpoint = dist.new_group(backend="gloo"), dist.new_group(backend="gloo")
    assert isinstance(control, dist.ProcessGroup)
    assert isinstance(checkpoint, dist.ProcessGroup)
    return World(rank, size, local_rank, device, control, checkpoint, store)


def _adopt_slurm() -> None:
    """Under srun alone: Slurm's names for what torchrun would have set."""
    if "RANK" in os.environ:
        return
    env = os.environ
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
    env.setdefault("LOCAL_RANK", env.get("SLURM_LOCALID", "0"))
    env.setdefault("MASTER_ADDR", first_host(env.get("SLURM_STEP_NODELIST", "localhost")))
    env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list such as `gpu[03-05,9],login1`."""
    match = re.match(r"([^\[,]+)(?:\[([0-9]+))?", nodes)
    return (match[1] + (match[2] or "")) if match else "localhost"

"""Stragglers: ranks that are slower than the others in what they do alone.

All ranks end a step together, because each waits for the others in its collectives. What tells them apart is
the time a rank spends between those: in the forward passes of its blocks, whose parameters have been
gathered when they begin, and waiting for its own data.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from flame.train.journal import event

KINDS = ("computing", "data")  # what a rank does alone
LEAST_SHARE = 0.05  # of a step: what a rank must lose to be worth a word
BACKWARD = 2  # passes back take so many times those forward
SINGLE = 0.1  # of the steps: the longest ones, which a rank may have for once


@dataclass(frozen=True, slots=True)
class Slow:
    """A rank that holds the others up."""

    rank: int
    kind: str  # of KINDS: where most of what it loses goes
    seconds: float  # a step, that it needs for itself
    usual_seconds: float  # the median of the others
    step_seconds: float


class Pace:
    """Watches this rank's blocks, and compares the ranks after each window of steps. All ranks call `count`
    at the same steps. An event names a rank once, until it has been as fast as the others again."""

    def __init__(
        self,
        run: Path,
        group: dist.ProcessGroup,
        device: torch.device,
        blocks: Iterable[nn.Module],
        *,
        window: int,
        factor: float,
        stage: int = 0,
    ) -> None:
        """`window` in steps. `factor`: times the median of the others that makes a rank slow. `stage`: only
        ranks of the same one do the same work."""
        self._run, self._group, self._window, self._factor = run, group, window, factor
        self._stage = stage
        self._clock = BlockClock(blocks, device)
        self._waits: list[float] = []
        self._began = time.monotonic()
        self._table: torch.Tensor | None = None
        self._pending: dist.Work | None = None
        self._named: set[int] = set()

    def count(self, step: int, data_seconds: float) -> None:
        """A step was made, for whose rows this rank waited `data_seconds`."""
        if self._pending is not None:
            self._settle(step)
        self._waits.append(data_seconds)
        self._clock.next_step()
        if len(self._waits) == self._window:
            self._exchange()

    def _exchange(self) -> None:
        """Begins to tell the others this rank's seconds a step."""
        seconds = (time.monotonic() - self._began) / self._window
        mine = [self._stage, seconds, usually(self._clock.take()), usually(self._waits)]
        self._table = torch.zeros(dist.get_world_size(self._group), len(mine), dtype=torch.float64)
        self._table[dist.get_rank(self._group)] = torch.tensor(mine, dtype=torch.float64)
        self._pending = cast("dist.Work", dist.all_reduce(self._table, group=self._group, async_op=True))
        self._waits = []

    def _settle(self, step: int) -> None:
        assert self._pending is not None
        assert self._table is not None
        self._pending.wait()
        self._pending, self._began = None, time.monotonic()
        found = slow_ranks(self._table.tolist(), self._factor)
        new = [slow for slow in found if slow.rank not in self._named]
        self._named = {slow.rank for slow in found}
        if new:  # on all ranks, which see the same table
            self._tell(step - 1, new)

    def _tell(self, step: int, found: list[Slow]) -> None:
        hosts = [""] * dist.get_world_size(self._group)
        dist.all_gather_object(hosts, socket.gethostname(), group=self._group)
        for slow in found if dist.get_rank(self._group) == 0 else ():
            seconds, usual, whole = (
                round(s, 5) for s in (slow.seconds, slow.usual_seconds, slow.step_seconds)
            )
            event(
                self._run, "straggler", step=step, steps=self._window, rank=slow.rank, host=hosts[slow.rank],
                phase=slow.kind, seconds=seconds, usual_seconds=usual, step_seconds=whole,
            )  # fmt: skip
            print(
                f"step {step}: rank {slow.rank} on {hosts[slow.rank]} holds the others up ({slow.kind}): it "
                f"needs {seconds:.3f} s a step for itself, the others {usual:.3f} s",
                flush=True,
            )


def slow_ranks(table: list[list[float]], factor: float) -> list[Slow]:
    """Of a line a rank (stage, seconds of a step, and seconds of each of KINDS in it)."""
    found: list[Slow] = []
    for rank, (stage, step_seconds, *mine) in enumerate(table):
        others = [line[2:] for other, line in enumerate(table) if other != rank and line[0] == stage]
        if not others:
            continue
        usual = median(sum(line) for line in others)
        excess = [own - median(line[i] for line in others) for i, own in enumerate(mine)]
        lost = excess[0] * (1 + BACKWARD) + excess[1]
        if sum(mine) <= factor * usual or lost <= LEAST_SHARE * step_seconds:
            continue
        kind = KINDS[excess.index(max(excess))]
        found.append(Slow(rank, kind, sum(mine), usual, step_seconds))
    return found


def usually(seconds: list[float]) -> float:
    """The mean of a window's steps without the longest few: a pause for once makes no rank slow."""
    return fmean(sorted(seconds)[: len(seconds) - int(SINGLE * len(seconds))])


class BlockClock:
    """Seconds that a model's blocks take in the first forward pass of each step, without what waits for
    other ranks: FSDP gathers a block's parameters before this begins to count."""

    def __init__(self, blocks: Iterable[nn.Module], device: torch.device) -> None:
        """Hooks into `blocks`, to which FSDP has been applied."""
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []  # of this step: begin, end, begin, end ...
        self._steps: list[list[Any]] = []  # of the steps before it
        self._timed: set[int] = set()
        for block in blocks:
            block.register_forward_pre_hook(self._begin)
            block.register_forward_hook(self._end, prepend=True)

    def _begin(self, block: nn.Module, arguments: Any) -> None:
        if block.training and id(block) not in self._timed:
            self._marks.append(self._now())

    def _end(self, block: nn.Module, arguments: Any, output: Any) -> None:
        if block.training and id(block) not in self._timed:
            self._timed.add(id(block))
            self._marks.append(self._now())

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def next_step(self) -> None:
        self._steps.append(self._marks)
        self._marks, self._timed = [], set()

    def take(self) -> list[float]:
        """Seconds of each step since the last call; waits for the device."""
        steps, self._steps = self._steps, []
        if self._on_gpu and steps and steps[-1]:
            steps[-1][-1].synchronize()
        return [sum(map(self._between, marks[::2], marks[1::2])) for marks in steps]

    def _between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1000 if self._on_gpu else end - begin

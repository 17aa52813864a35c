"""What a run says about itself: one record a logged step, and a line on the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from flame.batch import Counts
from flame.train.agreement import Agreed
from flame.train.journal import Journal
from flame.train.step import StepResult

PLAIN_LINE_SECONDS = 5.0  # between lines where there is no terminal


class Advanced(Protocol):
    """The part of the loop's progress that is logged."""

    step: int
    tokens: int
    documents: int
    records: list[list[int]]
    sources: list[list[int]]


class Meter:
    """Counts every step; reads the device and writes only at logged ones."""

    def __init__(
        self,
        *,
        flops: Callable[[Counts], float],
        peak_flops: float | None,
        device: torch.device,
        updates_skipped: int,
        sources: list[str],
        journal: Journal | None,
        screen: Screen | None,
    ) -> None:
        """`flops`: floating-point operations of a step, over all ranks. `peak_flops`: per second, of
        all devices together; None where unknown. `sources`: their names. `journal` and `screen`: on rank
        0 alone."""
        self._flops = flops
        self._peak = peak_flops
        self._device = device
        self._sources = sources
        self._journal = journal
        self._screen = screen
        self._skipped = torch.tensor(updates_skipped, dtype=torch.int64, device=device)
        self._reset()

    def start(self) -> None:
        """Begins the first interval."""
        self._reset()

    def _reset(self) -> None:
        self._began = time.perf_counter()
        self._steps = self._tokens = self._padding = 0
        self._operations = self._data_seconds = 0.0

    def count(self, agreed: Agreed, result: StepResult, wait_seconds: float) -> None:
        """Adds one step to the interval; does not wait for the device."""
        self._steps += 1
        self._tokens += agreed.counts.tokens
        self._padding += agreed.counts.padding
        self._operations += self._flops(agreed.counts)
        self._data_seconds += wait_seconds
        self._skipped += ~result.grad_norm.isfinite()

    def pause(self, seconds: float) -> None:
        """Leaves some seconds that were no training out of the interval."""
        self._began += seconds

    def updates_skipped(self) -> int:
        """Updates left out since the run began because a gradient was not finite."""
        return int(self._skipped.item())

    def log(self, progress: Advanced, agreed: Agreed, result: StepResult, learning_rate: float) -> None:
        """Ends the interval: waits for the step and writes its record. All ranks call it."""
        sums = torch.stack([s for s in (result.loss_sum, result.penalty_sum) if s is not None])
        dist.all_reduce(sums)
        loss, *z_loss = (sums / max(1, agreed.counts.predicted)).tolist()
        grad_norm = result.grad_norm.item()
        skipped = self.updates_skipped()
        seconds = time.perf_counter() - self._began
        record: dict[str, Any] = {
            "step": progress.step,
            "tokens": progress.tokens,
            "epoch": agreed.epoch,
            "loss": loss,
            **({"z_loss": z_loss[0]} if z_loss else {}),
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "tokens_per_second": round(self._tokens / seconds, 1),
            "mfu": round(self._operations / seconds / self._peak, 4) if self._peak else None,
            "step_seconds": round(seconds / self._steps, 5),
            "data_seconds": round(self._data_seconds / self._steps, 5),
            "memory_gib": self._memory_gib(),
            "padding_share": round(self._padding / max(1, self._padding + self._tokens), 4),
            "documents": progress.documents,
            "records_skipped": sum(skipped for _, skipped, *_ in progress.records),
            "updates_skipped": skipped,
            "documents_cut": sum(cut for *_, cut in progress.sources),
            "rows_digest": f"{agreed.counts.digest % 2**64:016x}",
            "sources": self._of_sources(progress, agreed),
        }
        if self._journal is not None:
            self._journal.metrics(record)
        if self._screen is not None:
            self._screen.show(record)
        self._reset()

    def _of_sources(self, progress: Advanced, agreed: Agreed) -> dict[str, dict[str, int]]:
        """What each source gave since the run began, and the epoch that all lanes have begun."""
        epochs: list[int] = agreed.epochs.tolist()
        return {
            name: {
                "tokens": tokens,
                "documents": documents,
                "epoch": epoch,
                "skipped": skipped,
                "held_out": held_out,
                "overlong": overlong,
                "cut": cut,
            }
            for name, epoch, (tokens, documents, cut), (_, skipped, held_out, overlong) in zip(
                self._sources, epochs, progress.sources, progress.records, strict=True
            )
        }

    def _memory_gib(self) -> float | None:
        if self._device.type != "cuda":
            return None
        return round(torch.cuda.max_memory_allocated(self._device) / 2**30, 2)


class Screen:
    """Progress on a terminal, or plain lines where output goes elsewhere."""

    def __init__(self, total_steps: int | None, first_step: int) -> None:
        """`total_steps`: None where the data's end is the run's."""
        self._total = total_steps
        self._last_line = 0.0
        self._began, self._first = time.monotonic(), first_step
        self._bar: Progress | None = None
        console = Console()
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("starting", total=total_steps, completed=first_step)
            self._bar.start()

    def show(self, record: dict[str, Any]) -> None:
        """One logged step."""
        step = record["step"]
        waiting = record["data_seconds"] / max(record["step_seconds"], 1e-9)
        of = "" if self._total is None else f"/{self._total}"
        text = (
            f"step {step}{of}  loss {record['loss']:.4f}  "
            f"{record['tokens_per_second']:,.0f} tokens/s  waiting for data {100 * waiting:.1f} %"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
            return
        now = time.monotonic()
        if step == self._total or now - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = now
            rate = (now - self._began) / max(1, step - self._first)
            left = "" if self._total is None else f"  ETA {_clock(rate * (self._total - step))}"
            print(f"{text}{left}", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        sys.stdout.flush()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"

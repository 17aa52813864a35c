"""Whether the steps just made were sound: updates left out, and losses far above those before them.

A step is judged one step late, so that the host does not wait for the device: every rank copies its loss
and the gradient norm to the host, the losses are summed on the control group while the next step computes,
and all ranks come to the same judgement at the same step.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

import torch
import torch.distributed as dist

from flame.train.config import RecoveryConfig
from flame.train.step import StepResult

LOSSES = 128  # steps before it that a loss is compared with ...
FEWEST_LOSSES = 32  # ... and how many of them there must be
MAD_TO_DEVIATION = 1.4826  # a normal distribution's standard deviation, in median absolute deviations
SMALLEST_SCALE = 0.01  # of the median: losses that hardly vary make no spike of a small one
BUDGET_STEPS = 1000  # over which updates left out are counted


@dataclass(frozen=True, slots=True)
class Judged:
    """One step, as all ranks see it."""

    step: int
    data_step: int  # the step of the row stream that it was trained on
    loss: float  # per predicted token
    grad_norm: float
    update_skipped: bool
    trouble: str | None  # why the run must go back; None where it need not


@dataclass(slots=True)
class _Pending:
    """A step whose loss is on its way."""

    step: int
    data_step: int
    predicted: int
    values: torch.Tensor  # float64 [2] on the host: this rank's loss sum, the gradient norm
    copied: torch.cuda.Event | None  # None: `values` is there
    summing: dist.Work | None = None


class Health:
    """`count` each step, then `judge` the steps before it. All ranks call both at the same steps."""

    def __init__(
        self,
        config: RecoveryConfig,
        group: dist.ProcessGroup,
        stage_of: Callable[[int], int],
        history: dict[str, Any],
        *,
        counts_loss: bool = True,
    ) -> None:
        """`stage_of` a data step: losses of two stages are not compared. `history`: what a checkpoint
        holds of `history()`; empty for a fresh run. `counts_loss`: of ranks that hold the same loss one
        adds it."""
        self._config = config
        self._group = group
        self._counts_loss = counts_loss
        self._stage_of = stage_of
        self._stage: int | None = history.get("stage")
        self._losses: deque[float] = deque(history.get("losses", ()), maxlen=LOSSES)
        self._skipped: list[int] = list(history.get("skipped", ()))
        self._pending: deque[_Pending] = deque()

    def history(self) -> dict[str, Any]:
        """What is remembered, for a checkpoint: with it a resumed run judges as an undisturbed one."""
        return {"stage": self._stage, "losses": list(self._losses), "skipped": list(self._skipped)}

    def count(self, step: int, data_step: int, predicted: int, result: StepResult) -> None:
        """Takes note of a step just begun; waits for those before it."""
        for before in self._pending:
            self._sum(before)
        values = torch.stack([result.loss_sum.double() * self._counts_loss, result.grad_norm.double()])
        copied = None
        if values.is_cuda:
            host = torch.empty(2, dtype=torch.float64, pin_memory=True)
            host.copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            values = host
        self._pending.append(_Pending(step, data_step, predicted, values, copied))

    def judge(self, *, all_steps: bool = False) -> Iterator[Judged]:
        """The steps that are known by now, or, waiting for them, all, in order."""
        if all_steps:
            for pending in self._pending:
                self._sum(pending)
        while self._pending and self._pending[0].summing is not None:
            yield self._judge(self._pending.popleft())

    def _sum(self, pending: _Pending) -> None:
        """Begins the sum of the losses over all ranks."""
        if pending.summing is None:
            if pending.copied is not None:
                pending.copied.synchronize()
            work = dist.all_reduce(pending.values[:1], group=self._group, async_op=True)
            pending.summing = cast("dist.Work", work)

    def _judge(self, pending: _Pending) -> Judged:
        assert pending.summing is not None
        pending.summing.wait()
        loss_sum, norm = pending.values.tolist()
        loss, step = loss_sum / max(1, pending.predicted), pending.step
        stage = self._stage_of(pending.data_step)
        if stage != self._stage:  # other text or longer rows: another loss
            self._stage = stage
            self._losses.clear()
        skipped = not math.isfinite(norm)
        trouble = self._budget(step) if skipped else self._spike(loss)
        if not skipped and trouble is None and pending.predicted:
            self._losses.append(loss)
        return Judged(step, pending.data_step, loss, norm, skipped, trouble)

    def _budget(self, step: int) -> str | None:
        self._skipped = [s for s in self._skipped if s > step - BUDGET_STEPS] + [step]
        found, most = len(self._skipped), self._config.skipped_updates
        if found <= most:
            return None
        return (
            f"{found} updates of the last {BUDGET_STEPS} steps were left out because the gradient was not "
            f"finite, and recovery.skipped_updates allows {most}"
        )

    def _spike(self, loss: float) -> str | None:
        if not math.isfinite(loss):
            return "the loss is not finite, though the gradient is"
        most = self._config.spike_threshold
        if most <= 0 or len(self._losses) < FEWEST_LOSSES:
            return None
        usual, score = robust_score(loss, self._losses)
        if score <= most:
            return None
        return (
            f"the loss is {loss:.4f}, {score:.1f} robust standard deviations above {usual:.4f}, the median "
            f"of the {len(self._losses)} steps before; recovery.spike_threshold allows {most:g}"
        )


def robust_score(value: float, before: deque[float]) -> tuple[float, float]:
    """The median of `before`, and how far `value` lies above it in robust standard deviations (from the
    median absolute deviation: a few odd values do not widen it)."""
    usual = median(before)
    deviation = MAD_TO_DEVIATION * median(abs(loss - usual) for loss in before)
    return usual, (value - usual) / max(deviation, SMALLEST_SCALE * abs(usual), 1e-9)

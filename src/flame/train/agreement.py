"""What all ranks agree on before each step: its counts, and whether to save, to stop or to give up.

One small exchange on a gloo group of its own, begun while the step before it still computes. Whatever
one rank wants happens on all ranks at the same step: nobody waits for a rank that has left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.distributed as dist

from flame.batch import COUNTED, Counts, StepRows

NO_COUNTS = Counts(tokens=0, predicted=0, documents=0, cut=0, attended=0, digest=0)


@dataclass(frozen=True, slots=True)
class Agreed:
    """The exchange's outcome, the same on every rank."""

    counts: Counts  # of the next step, over all ranks
    records: np.ndarray  # int64 [sources, 4]: of `StepRows`, that the next step adds
    sources: np.ndarray  # int64 [sources, 3]: tokens, documents, documents cut of the next step
    epoch: int  # the smallest over all lanes
    epochs: np.ndarray  # int64 [sources]: the smallest over all lanes
    save: bool
    stop: bool
    failed_rank: int | None  # a rank whose data cannot be read


@dataclass(frozen=True, slots=True)
class Proposal:
    """One rank's side, on its way."""

    sums: torch.Tensor
    maxima: torch.Tensor
    pending: list[dist.Work]


class Agreement:
    """`propose`, then later `settle`: between the two the rank may do other work."""

    def __init__(self, group: dist.ProcessGroup, rank: int, sources: int, *, speaks: bool = True) -> None:
        """`speaks`: whether this rank counts its rows; of ranks that read the same rows one does."""
        self._group = group
        self._rank = rank
        self._sources = sources
        self._speaks = speaks

    def propose(
        self, rows: StepRows | None, *, save: bool = False, stop: bool = False, failed: bool = False
    ) -> Proposal:
        """Begins the exchange for the next step. `rows` is None where this rank has none to train."""
        if not self._speaks:
            rows = None
        counts = rows.counts if rows is not None else NO_COUNTS
        records = rows.records if rows is not None else np.zeros((self._sources, len(COUNTED)), np.int64)
        ordered = [counts.tokens, counts.predicted, counts.documents, counts.cut, counts.attended]
        sources = rows.sources if rows is not None else np.zeros((self._sources, 3), np.int64)
        by_source = [*records.ravel().tolist(), *sources.ravel().tolist()]
        sums = torch.tensor([*ordered, counts.digest, counts.padding, *by_source], dtype=torch.int64)
        epochs = [rows.epoch, *rows.epochs.tolist()] if rows is not None else [2**31] * (1 + self._sources)
        earliest = [-epoch for epoch in epochs]
        maxima = torch.tensor([save, stop, (self._rank + 1) * failed, *earliest], dtype=torch.int64)
        pending = [
            cast("dist.Work", dist.all_reduce(sums, group=self._group, async_op=True)),
            cast("dist.Work", dist.all_reduce(maxima, dist.ReduceOp.MAX, group=self._group, async_op=True)),
        ]
        return Proposal(sums, maxima, pending)

    def settle(self, proposal: Proposal) -> Agreed:
        """Waits for the exchange."""
        for work in proposal.pending:
            work.wait()
        sums: list[int] = proposal.sums.tolist()
        save, stop, failed, *earliest = proposal.maxima.tolist()
        records_end = 7 + len(COUNTED) * self._sources
        tokens, predicted, documents, cut, attended, digest, padding = sums[:7]
        return Agreed(
            counts=Counts(tokens, predicted, documents, cut, attended, digest, padding),
            records=np.array(sums[7:records_end], np.int64).reshape(self._sources, len(COUNTED)),
            sources=np.array(sums[records_end:], np.int64).reshape(self._sources, 3),
            epoch=-earliest[0],
            epochs=-np.array(earliest[1:], np.int64),
            save=bool(save),
            stop=bool(stop),
            failed_rank=failed - 1 if failed else None,
        )

    def sum_state(self, state: np.ndarray) -> np.ndarray:
        """The data state [N, F] of all lanes, from each rank's own. All ranks call this."""
        whole = torch.from_numpy(state.copy() if self._speaks else np.zeros_like(state))
        dist.all_reduce(whole, group=self._group)
        return whole.numpy()

    def gather_message(self, message: str | None) -> str:
        """The first rank's message that is not None, on every rank. All ranks call this."""
        messages: list[str | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(messages, message, group=self._group)
        return next((m for m in messages if m), "")

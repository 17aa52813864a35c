"""Validation: the loss on held out documents at some steps of a run, without a trace in what is trained."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from flame.batch import HeldOutBatch, RowSet
from flame.errors import DataError
from flame.parallel.fsdp import reshard
from flame.schema import Duration
from flame.train.forward_only import ForwardOnly
from flame.train.journal import Journal
from flame.train.loss import LossModule


class Reader(Protocol):
    """Who reads the set, beside training."""

    def begin(self) -> None:
        """Begins to read. May be called again."""
        ...

    def rows(self) -> RowSet:
        """The set, waited for. All ranks call it. Raises DataError on all ranks where it cannot be read."""
        ...

    def failure(self) -> DataError | None:
        """Why this rank could not read it, as far as it is known already."""
        ...


# What else is done at each validation: (step, tokens) to fields of its event. Called on every rank.
Follower = Callable[[int, int], dict[str, Any]]


class Validation:
    """Measures the loss of a model on the set, and lets others look at the model."""

    def __init__(
        self,
        *,
        every: Duration,
        at_start: bool,
        reader: Reader,
        model: LossModule | ForwardOnly,
        device: torch.device,
        group: dist.ProcessGroup,
        counts: bool = True,
        followers: Sequence[Follower] = (),
    ) -> None:
        """`group`: all ranks, on the CPU. `counts`: whether this one adds the losses of its rows, which
        others may hold too."""
        self.every, self.at_start = every, at_start
        self.last_step: int | None = None  # that was validated here
        self.journal: Journal | None = None  # on rank 0, once the run has begun
        self._reader, self._model, self._device = reader, model, device
        self._group, self._counts, self._followers = group, counts, followers

    def prepare(self) -> None:
        """Begins to read the set, in the background."""
        self._reader.begin()

    def failure(self) -> DataError | None:
        """Why this rank could not read the set, as far as it is known already."""
        return self._reader.failure()

    def run(self, step: int, tokens: int) -> float:
        """Validates after a step, on all ranks; the seconds that it took. Raises DataError, on all of them,
        where the set cannot be read."""
        if self._device.type == "cuda":  # what is queued still belongs to training
            torch.cuda.synchronize(self._device)
        began = time.perf_counter()
        rows = self._reader.rows()
        waited = time.perf_counter() - began
        more: dict[str, Any] = {}
        with evaluating(self._model, self._device):
            sums = loss_sums(self._model, rows, self._device, self._group, counts=self._counts)
            for follower in self._followers:
                more |= follower(step, tokens)
        seconds = time.perf_counter() - began
        self.last_step = step
        figures = {"tokens": tokens, **figures_of(rows, sums)}
        figures |= {"seconds": round(seconds, 3), "waited_seconds": round(waited, 3), **more}
        if self.journal is not None:
            self.journal.validation(figures, step)
            print(described(step, figures), flush=True)
        return seconds


@contextmanager
def evaluating(model: nn.Module, device: torch.device) -> Generator[None]:
    """Within, the model is in evaluation mode and nothing has a gradient; afterwards all is as it was, the
    random generators and the sharding, too."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        reshard(model)


def loss_sums(
    model: LossModule | ForwardOnly,
    rows: RowSet,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
    *,
    counts: bool = True,
) -> np.ndarray:
    """Each source's sum of cross-entropy over the set: float64 [sources], equal on all ranks of `group`, of
    which those that do not count hold rows of others, and those without the last stage have no losses.

    Each row has sums of its own, which are added in the order of the rows, whichever rank has them: where a
    row's forward pass does not depend on the layout, nor does the result, to the last bit.
    """
    parts: list[tuple[list[int], torch.Tensor]] = []
    for part, losses in _token_losses(model, rows.batches(), device):
        whole = torch.zeros(part.sources.size, dtype=torch.float64, device=device)
        whole[part.first : part.first + losses.numel()] = losses
        sources = torch.from_numpy(part.sources).to(device)
        of_rows = whole.view_as(sources)
        of_each = [torch.where(sources == i, of_rows, 0.0).sum(1) for i in range(len(rows.sources))]
        parts.append((part.rows, torch.stack(of_each, 1)))
    table = torch.zeros(rows.total_rows, len(rows.sources), dtype=torch.float64)
    for numbers, sums in parts if counts else ():
        real = [i for i, number in enumerate(numbers) if number >= 0]
        table[[numbers[i] for i in real]] = sums.cpu()[real]
    if group is not None:
        dist.all_reduce(table, group=group)
    return table.numpy().sum(axis=0)


def _token_losses(
    model: LossModule | ForwardOnly, parts: Iterator[HeldOutBatch], device: torch.device
) -> Iterator[tuple[HeldOutBatch, torch.Tensor]]:
    """Micro-batches with the cross-entropy of each of their labels, float32 [n]."""
    if isinstance(model, ForwardOnly):
        yield from model.token_losses(parts)
        return
    for part in parts:
        yield part, model(part.batch.to(device), model.token_losses)


def figures_of(rows: RowSet, sums: np.ndarray) -> dict[str, Any]:
    """Loss per predicted token and bits per byte, in all and of each source.

    Bits per byte: the loss of all predicted tokens in bits, EOS among them, over the UTF-8 bytes of the text
    that these tokens stand for; None where they stand for none.
    """
    figures = _figures(float(sums.sum()), *rows.counts.sum(axis=0).tolist())
    counted = zip(rows.sources, sums.tolist(), rows.counts.tolist(), strict=True)
    return figures | {"sources": {name: _figures(total, *counts) for name, total, counts in counted}}


def _figures(total: float, tokens: int, documents: int, predicted: int, text_bytes: int) -> dict[str, Any]:
    return {
        "loss": total / predicted if predicted else None,
        "bits_per_byte": total / math.log(2) / text_bytes if text_bytes else None,
        "predicted": predicted,
        "bytes": text_bytes,
        "documents": documents,
    }


def described(step: int, figures: dict[str, Any]) -> str:
    """A validation in a line."""
    loss, bits = figures["loss"], figures["bits_per_byte"]
    text = f"validation after step {step}: loss {'none' if loss is None else f'{loss:.4f}'}"
    if bits is not None:
        text += f", {bits:.4f} bits per byte"
    return f"{text}, {figures['seconds']:.1f} s"

"""What the data plane hands to the trainer.

Shapes: b rows a micro-batch, L tokens a row, N lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch

COUNTED = ("records", "skipped", "held_out", "overlong")  # the columns of `StepRows.records`
IGNORED = -100  # the label of a position that predicts nothing


class Segment(NamedTuple):
    """One piece of a document in a row."""

    source: str
    epoch: int
    document_id: str
    offset: int  # of its first token in the document's tokens
    length: int  # in tokens


@dataclass(frozen=True, slots=True)
class Row:
    """One packed row, exactly L tokens. Filler has no segments, and its labels are all masked."""

    index: int  # in the global order of rows; -1 for filler
    tokens: np.ndarray  # int32 [L]
    lengths: np.ndarray  # int64 [segments]: their tokens
    name_segments: Callable[[], tuple[Segment, ...]] = tuple  # names are made only for those who ask
    trained: np.ndarray | None = None  # bool [L]: the tokens that have a loss; None: all

    @property
    def segments(self) -> tuple[Segment, ...]:
        """What the row is made of."""
        return self.name_segments()


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch. Documents never see each other: by `cu_seqlens` over the flattened b * L
    tokens, or by `positions`, which restart at 0 in each segment."""

    tokens: torch.Tensor  # int64 [b, L]
    labels: torch.Tensor  # int64 [b, L]: the segment's next token where it has a loss, else IGNORED
    positions: torch.Tensor  # int64 [b, L]
    cu_seqlens: torch.Tensor  # int32 [segments + 1]
    longest_segment: int  # in tokens; known on the host, so that no kernel launch waits for the device
    first_row: int  # global row number of its first row; seeds the micro-batch's random numbers

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; to a GPU through pinned memory, without waiting for the copy."""
        if device.type == "cpu":
            return self
        moved: dict[str, torch.Tensor] = {
            name: getattr(self, name).pin_memory().to(device, non_blocking=True)
            for name in ("tokens", "labels", "positions", "cu_seqlens")
        }
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class Counts:
    """What one step consumed on this rank. Sums over the data-parallel ranks are the step's."""

    tokens: int  # of real rows, unpredicted ones included; no filler
    predicted: int  # labels that are not IGNORED
    documents: int  # segments that begin a document
    cut: int  # documents of which a segment ends before the document (or its piece of max_document_length)
    # does, each counted once, at the first such segment
    attended: int  # pairs (query, key) under a causal mask within segments: sum of n * (n + 1) / 2
    digest: int  # int64, wraps around: the sum over rows of a hash of (row number, tokens and their masks)
    padding: int = 0  # places in real rows that hold no token


class Skip(NamedTuple):
    """A record that holds no text to train on."""

    source: str
    epoch: int
    document_id: str
    file: str
    place: str  # "line 17", "row 3"
    reason: str


class HeldOutBatch(NamedTuple):
    """A micro-batch of validation rows."""

    batch: Batch
    rows: list[int]  # their numbers in the set; -1 for filler
    sources: np.ndarray  # int64 [b, L]: the source of each token, -1 where there is none
    first: int = 0  # of the b * L tokens, where those of `batch` begin: it may be a part of the rows


class RowSet(Protocol):
    """The validation set, of which this rank has some rows; `flame.data.validation_set` holds one."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Their names."""
        ...

    @property
    def counts(self) -> np.ndarray:
        """Of the whole set, int64 [sources, 4]: tokens, documents, predicted tokens, bytes of their text."""
        ...

    @property
    def total_rows(self) -> int:
        """Of the whole set."""
        ...

    def batches(self) -> Iterator[HeldOutBatch]:
        """This rank's micro-batches, as many as on every other rank."""
        ...


@dataclass(frozen=True, slots=True)
class StepRows:
    """All that one rank trains in one step, and the data state after it."""

    step: int  # data steps count from 0
    rows: tuple[Row, ...]
    micro_batches: tuple[Batch, ...]
    counts: Counts
    records: (
        np.ndarray
    )  # int64 [sources, 4]: records passed, and of them skipped, held out for validation, and longer than
    # max_document_length (cut or skipped), in windows that begin here, by lanes this rank owns
    skips: tuple[Skip, ...]  # the same records' names
    sources: np.ndarray  # int64 [sources, 3]: `counts.tokens`, `.documents` and `.cut` of each source
    epoch: int  # the smallest over this rank's lanes and sources
    epochs: np.ndarray  # int64 [sources]: the smallest over this rank's lanes
    take_state: Callable[[], np.ndarray]  # gives `state`, which is made only for those who ask
    wait_seconds: float  # how long the trainer waited for these rows

    @property
    def state(self) -> np.ndarray:
        """The data state after this step: int64 [N, F], zero in lanes that another rank owns."""
        return self.take_state()

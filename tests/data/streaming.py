"""What the tests of the loader share: loaders as ranks, the state that a trainer saves, and rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from flame.batch import Row, StepRows
from flame.data.catalog import Catalog, fingerprint
from flame.data.loader import Loader
from flame.data.plan import DataPlan
from flame.data.state import DataState

Opened = tuple[Catalog, DataPlan]
PlainRow = tuple[int, bytes, tuple[tuple[object, ...], ...]]


def loaders(data: Opened, world: int, state: DataState | None = None, prefetch: bool = False) -> list[Loader]:
    return [Loader(*data, rank, world, 2, state, prefetch) for rank in range(world)]


def state_after(data: Opened, parts: list[StepRows], columns: list[str]) -> DataState:
    """What the trainer saves: the sum over ranks, through JSON."""
    lanes = sum((part.state for part in parts), np.zeros_like(parts[0].state))
    state = DataState(parts[0].step + 1, lanes, columns, fingerprint(*data))
    return DataState.from_json(state.to_json())


def rows_of(parts: list[StepRows]) -> list[Row]:
    return sorted((row for part in parts for row in part.rows if row.segments), key=lambda row: row.index)


def plain(rows: list[Row]) -> list[PlainRow]:
    return [(row.index, row.tokens.tobytes(), row.segments) for row in rows]


def replayed(
    data: Opened, runs: list[tuple[int, int, int]], save_prefetched: bool = False
) -> Iterator[list[StepRows]]:
    """All ranks' parts of each step of runs of (ranks, steps trained, steps only prefetched), each resumed
    from the last one's state. `save_prefetched`: wrongly, from what was only read ahead."""
    state = None
    for world, trained, ahead in runs:
        ranks = loaders(data, world, state)
        for step in range(trained + ahead):
            parts = [rank.next_step() for rank in ranks]
            if step < trained:
                yield parts
            if step < trained or save_prefetched:
                state = state_after(data, parts, ranks[0].columns)


def tokens_in(parts: list[StepRows]) -> int:
    return sum(part.counts.tokens for part in parts)

"""A look at the rows of some steps, read as the trainer reads them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from flame.batch import Row
from flame.data.catalog import Catalog, fingerprint, open_readers
from flame.data.lanes import Lane
from flame.data.loader import Loader, check_world
from flame.data.plan import DataPlan
from flame.data.state import DataState
from flame.data.windows import state_columns


def preview(catalog: Catalog, plan: DataPlan, steps: range, world: int) -> Iterator[list[Row]]:
    """The rows of each step in global order, through `world` loaders one after another in this process.

    Windows before the first step are read, too. Raises what the loader raises.
    """
    check_world(plan, world)
    if not steps:
        return
    state = state_at_window(catalog, plan, plan.window_at(steps.start)[0]) if steps.start else None
    loaders = [Loader(catalog, plan, rank, world, 1, state, prefetch=False) for rank in range(world)]
    for step in range(0 if state is None else state.next_step, steps.stop):
        rows = [row for loader in loaders for row in loader.next_step().rows if len(row.lengths)]
        if step in steps:
            yield sorted(rows, key=lambda row: row.index)


def state_at_window(catalog: Catalog, plan: DataPlan, window: int) -> DataState:
    """The data state at the beginning of a window of a fresh run."""
    tokenizer = catalog.load_tokenizer()
    readers = open_readers(catalog, plan)
    lanes = [Lane(plan, readers, tokenizer, lane) for lane in range(plan.lanes)]
    for lane in lanes:
        for _ in range(window):
            lane.next_window()
    columns = state_columns([source.name for source in catalog.sources])
    states = np.array([lane.state() for lane in lanes], dtype=np.int64)
    step = sum(plan.steps_in_window(w) for w in range(window))
    return DataState(step, states, columns, fingerprint(catalog, plan))

"""What the tests of the loader share: loaders as ranks, the state that a trainer saves, and rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np
from hypothesis import strategies as st

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
    for world, kept, ahead in runs:
        ranks = loaders(data, world, state)
        for step in range(kept + ahead):
            parts = [rank.next_step() for rank in ranks]
            if step < kept:
                yield parts
            if step < kept or save_prefetched:
                state = state_after(data, parts, ranks[0].columns)


def some_runs(least: int, most_ranks: int, most_steps: int) -> st.SearchStrategy[list[tuple[int, int, int]]]:
    """Runs for `replayed`, at least so many."""
    one = st.tuples(st.integers(1, most_ranks), st.integers(0, most_steps), st.integers(0, 5))
    return st.lists(one, min_size=least, max_size=5)


def documents(data: Opened) -> dict[tuple[str, str], int]:
    """The tokens of every document with text, by source and id."""
    catalog, _ = data
    tokenizer = catalog.load_tokenizer()
    found: dict[tuple[str, str], int] = {}
    for source in catalog.sources:
        reader = source.open()
        for block in range(len(source.blocks)):
            file = int(source.blocks.file[block])
            where = int(source.blocks.start[block]), int(source.blocks.stop[block])
            for position, content in reader.read(file, *where):
                text = reader.decode(content)
                if isinstance(text, str):
                    name = f"{source.files[file].name}:{position}"
                    found[source.name, name] = len(tokenizer.encode([text])[0])
    return found


def trained(steps: Iterable[list[StepRows]]) -> dict[tuple[str, int, str], list[tuple[int, int]]]:
    """(offset, length) of every segment, by (source, epoch, document)."""
    found: dict[tuple[str, int, str], list[tuple[int, int]]] = defaultdict(list)
    for parts in steps:
        for row in rows_of(parts):
            for source, epoch, document, offset, length in row.segments:
                found[source, epoch, document].append((offset, length))
    return found


def assert_tiled(segments: list[tuple[int, int]], tokens: int) -> None:
    """(offset, length) that hold each of a document's tokens once."""
    end = 0
    for offset, length in sorted(segments):
        assert offset == end
        end += length
    assert end == tokens


def tokens_in(parts: list[StepRows]) -> int:
    return sum(part.counts.tokens for part in parts)

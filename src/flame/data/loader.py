"""The loader: one rank's rows of each step, as micro-batches, read one window ahead."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from types import TracebackType

import numpy as np
import torch

from flame.batch import IGNORED, Batch, Counts, Row, Skip, StepRows
from flame.data.catalog import Catalog
from flame.data.lanes import LANE_COLUMNS, Lane, PackedRow, Window, state_columns
from flame.data.plan import DataPlan
from flame.data.state import DataState
from flame.data.streams import SourceReader
from flame.data.tokens import PartsEncoder
from flame.errors import DataError, RecipeError

ROW_COLUMN = LANE_COLUMNS.index("row")
POLL_SECONDS = 0.05  # between looks at whether the loader was closed


class Loader:
    """Gives `StepRows` step by step. The rows depend on catalog, plan and step alone; `rank` and `world`
    (data-parallel ranks) only say which of them come here."""

    def __init__(
        self,
        catalog: Catalog,
        plan: DataPlan,
        rank: int,
        world: int,
        micro_batch_rows: int,
        state: DataState | None = None,
        prefetch: bool = True,
        tokenizer: PartsEncoder | None = None,
    ) -> None:
        """`state`: go on after it (its fingerprint is the caller's to compare). `prefetch`: read one
        window ahead in a thread. `tokenizer`: in place of the catalog's own. Raises RecipeError where
        `world` is too large, DataError where the state is of other data."""
        check_world(plan, world)
        self.columns = state_columns([source.name for source in catalog.sources])
        self._catalog, self._plan, self._rank, self._world = catalog, plan, rank, world
        self._micro_batch_rows = micro_batch_rows
        self._places = rows_of_rank(plan, rank, world)
        self._micro_batches = -(-len(rows_of_rank(plan, 0, world)) // micro_batch_rows)
        self._first_step = 0 if state is None else state.next_step
        states = None if state is None else state.rows_of_lanes(self.columns, plan.lanes)
        tokenizer = catalog.load_tokenizer() if tokenizer is None else tokenizer
        readers = [SourceReader(source, plan) for source in catalog.sources]
        self._lanes = {
            lane: Lane(plan, readers, tokenizer, lane, None if states is None else states[lane])
            for lane in sorted({place % plan.lanes for place in self._places})
        }
        self._owned = [lane for lane in self._lanes if lane % world == rank]
        self.state_seconds = 0.0  # spent in taking the states of all steps made
        self._error: BaseException | None = None
        self._closed = threading.Event()
        self._ready: queue.Queue[StepRows | BaseException] = queue.Queue(plan.window_steps)
        self._steps = self._produce()
        self._thread: threading.Thread | None = None
        if prefetch:
            self._thread = threading.Thread(target=self._run, name=f"flame-data-{rank}", daemon=True)
            self._thread.start()

    def next_step(self) -> StepRows:
        """The rows of the next step. Raises DataError when data cannot be read, now and ever after."""
        if self._error is not None:
            raise self._error
        if self._closed.is_set():
            raise DataError("the data loader is closed")
        begun = time.perf_counter()
        got = self._next()
        if isinstance(got, BaseException):
            self._error = got
            raise got
        return replace(got, wait_seconds=time.perf_counter() - begun)

    def close(self) -> None:
        """End the producer. May be called again."""
        self._closed.set()
        while not self._ready.empty():  # a producer that waits for room looks up at once
            self._ready.get_nowait()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=10)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --------------------------------------------------------------------------- the producer

    def _next(self) -> StepRows | BaseException:
        if self._thread is None:
            try:
                return next(self._steps)
            except Exception as error:
                return error
        while True:
            try:
                return self._ready.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if not self._thread.is_alive() and self._ready.empty():
                    return DataError("the data producer ended without a word")

    def _run(self) -> None:
        try:
            for step in self._steps:
                self._offer(step)
                if self._closed.is_set():
                    return
        except BaseException as error:  # all of them belong to whoever waits for rows
            self._offer(error)

    def _offer(self, item: StepRows | BaseException) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=POLL_SECONDS)
                return
            except queue.Full:
                continue

    def _produce(self) -> Iterator[StepRows]:
        """All steps from the first on, window by window, without end."""
        plan, next_step = self._plan, self._first_step
        while True:
            index, start = plan.window_at(next_step)
            windows: dict[int, Window] = {}
            for number, lane in self._lanes.items():
                if self._closed.is_set():
                    return
                if lane.window_index != index:
                    raise DataError(
                        f"the data state is torn: step {next_step} lies in window {index}, but lane {number} "
                        f"is in window {lane.window_index}; resume from another checkpoint"
                    )
                windows[number] = lane.next_window()
            end, states = start + plan.steps_in_window(index), self._states(windows)
            for step in range(next_step, end):
                yield self._assemble(step, step - start, windows, states)
            next_step = end

    def _assemble(
        self,
        step: int,
        step_in_window: int,
        windows: dict[int, Window],
        states: tuple[np.ndarray, np.ndarray],
    ) -> StepRows:
        plan, used = self._plan, step_in_window * self._plan.lane_rows
        rows_of_lane = plan.steps_in_window(plan.window_at(step)[0]) * plan.lane_rows
        first = step * plan.rows_per_step
        packed = [windows[place % plan.lanes].rows[used + place // plan.lanes] for place in self._places]
        rows = [
            Row(first + place, row.tokens, row.segments)
            for place, row in zip(self._places, packed, strict=True)
        ]
        filler = Row(-1, np.zeros(plan.sequence_length, dtype=np.int32), ())
        size = self._micro_batch_rows
        rows += [filler] * (self._micro_batches * size - len(rows))
        records = np.zeros((len(self._catalog.sources), 2), dtype=np.int64)
        skips: list[Skip] = []
        if step_in_window == 0:
            for lane in self._owned:
                records += windows[lane].records
                skips += windows[lane].skips
        return StepRows(
            step=step,
            rows=tuple(rows),
            micro_batches=tuple(make_batch(rows[i : i + size]) for i in range(0, len(rows), size)),
            counts=_counts(rows, packed),
            records=records,
            skips=tuple(skips),
            epoch=self._epoch(windows),
            state=self._state(states, used + plan.lane_rows, rows_of_lane),
            wait_seconds=0.0,
        )

    def _states(self, windows: dict[int, Window]) -> tuple[np.ndarray, np.ndarray]:
        """The data state in the middle of these windows, but for the rows used, and at their end."""
        begun = time.perf_counter()
        middle, end = (np.zeros((self._plan.lanes, len(self.columns)), dtype=np.int64) for _ in range(2))
        for lane in self._owned:
            middle[lane], end[lane] = windows[lane].state(1), windows[lane].end
        self.state_seconds += time.perf_counter() - begun
        return middle, end

    def _state(self, states: tuple[np.ndarray, np.ndarray], used: int, rows: int) -> np.ndarray:
        """After `used` of a window's `rows` rows of a lane."""
        begun = time.perf_counter()
        middle, end = states
        if used == rows:
            state = end
        else:
            state = middle.copy()
            state[self._owned, ROW_COLUMN] = used
        self.state_seconds += time.perf_counter() - begun
        return state

    def _epoch(self, windows: dict[int, Window]) -> int:
        weights = [source.weight for source in self._catalog.sources]
        return min(
            cursor.epoch
            for window in windows.values()
            for cursor, weight in zip(window.start, weights, strict=True)
            if weight
        )


# ------------------------------------------------------------------------------ rows and ranks


def check_world(plan: DataPlan, world: int) -> None:
    """Refuse more data-parallel ranks than rows. Raises RecipeError."""
    if world > plan.rows_per_step:
        raise RecipeError(
            f"{world} data-parallel ranks are too many for {plan.rows_per_step} rows a step: use at most "
            f"{plan.rows_per_step}, or set batch.tokens_per_step to at least {world * plan.sequence_length}"
        )


def rows_of_rank(plan: DataPlan, rank: int, world: int) -> list[int]:
    """The places in a step, 0 to B - 1, whose rows come to a rank. Rank 0 has the most."""
    groups = plan.lanes if world <= plan.lanes else plan.rows_per_step
    return [place for place in range(plan.rows_per_step) if place % groups % world == rank]


def make_batch(rows: list[Row]) -> Batch:
    """A micro-batch of b rows, filler among them (one segment, no labels)."""
    tokens = np.stack([row.tokens for row in rows]).astype(np.int64)
    length = tokens.shape[1]
    lengths = np.array(
        [n for row in rows for n in ([s.length for s in row.segments] or [length])], dtype=np.int64
    )
    ends = np.cumsum(lengths)
    labels = np.empty(tokens.size, dtype=np.int64)
    labels[:-1] = tokens.reshape(-1)[1:]
    labels[ends - 1] = IGNORED
    labels = labels.reshape(tokens.shape)
    labels[[not row.segments for row in rows]] = IGNORED
    positions = np.arange(tokens.size, dtype=np.int64) - np.repeat(ends - lengths, lengths)
    return Batch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions.reshape(tokens.shape)),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        longest_segment=int(lengths.max()),
        first_row=rows[0].index,
    )


def _counts(rows: list[Row], packed: list[PackedRow]) -> Counts:
    real = [row for row in rows if row.segments]
    lengths = np.array([s.length for row in real for s in row.segments], dtype=np.int64)
    digest = 0
    for row in real:
        content = hashlib.blake2b(row.index.to_bytes(8, "little"), digest_size=8)
        content.update(row.tokens.data)
        digest += int.from_bytes(content.digest(), "little")
    return Counts(
        tokens=int(lengths.sum()),
        predicted=int((lengths - 1).sum()),
        documents=sum(row.documents for row in packed),
        cut=sum(row.cut for row in packed),
        attended=int((lengths * (lengths + 1) // 2).sum()),
        digest=(digest + 2**63) % 2**64 - 2**63,
    )

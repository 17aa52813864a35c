"""The loader: one rank's rows of each step, as micro-batches, read one window ahead."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import TracebackType

import numpy as np
import torch

from flame.batch import IGNORED, Batch, Counts, Row, StepRows
from flame.data.ahead import OneThread, WindowsAhead
from flame.data.catalog import Catalog, open_readers
from flame.data.hashes import digest
from flame.data.lanes import Lane
from flame.data.plan import DataPlan, Stage
from flame.data.state import DataState
from flame.data.tokens import PartsEncoder
from flame.data.windows import RankWindow, state_columns
from flame.errors import DataError, RecipeError

POLL_SECONDS = 0.05  # between looks at whether the loader was closed


class Share:
    """A rank's part of the steps of one stage."""

    def __init__(self, micro_batch_rows: int, places: list[int], most_places: list[int]) -> None:
        """`most_places`: of the rank that has the most; all ranks have as many micro-batches."""
        self.micro_batch_rows = micro_batch_rows
        self.places = places  # in a step, 0 to B - 1
        self.micro_batches = -(-len(most_places) // micro_batch_rows)


class Loader:
    """Gives `StepRows` step by step. The rows depend on catalog, plan and step alone; `rank` and `world`
    (data-parallel ranks) only say which of them come here."""

    def __init__(
        self,
        catalog: Catalog,
        plan: DataPlan,
        rank: int,
        world: int,
        micro_batch_rows: int | Sequence[int],
        state: DataState | None = None,
        prefetch: bool = True,
        tokenizer: PartsEncoder | None = None,
    ) -> None:
        """`micro_batch_rows`: for all stages of the plan, or one for each. `state`: go on after it (its
        fingerprint is the caller's to compare). `prefetch`: read one window ahead in a thread. `tokenizer`:
        in place of the catalog's own. Raises RecipeError where `world` is too large, DataError where the
        state is of other data."""
        check_world(plan, world)
        self.columns = state_columns([source.name for source in catalog.sources])
        self._catalog, self._plan = catalog, plan
        sizes = (
            [micro_batch_rows] * len(plan.stages) if isinstance(micro_batch_rows, int) else micro_batch_rows
        )
        self._shares = [
            Share(size, rows_of_rank(plan, stage, rank, world), rows_of_rank(plan, stage, 0, world))
            for size, stage in zip(sizes, plan.stages, strict=True)
        ]
        self._first_step = 0 if state is None else state.next_step
        states = None if state is None else state.rows_of_lanes(self.columns, plan.lanes)
        self._tokenizer = OneThread(catalog.load_tokenizer() if tokenizer is None else tokenizer)
        readers = open_readers(catalog, plan)
        current = plan.stage_number(plan.window_at(self._first_step)[0])
        wanted = {place % plan.lanes for share in self._shares[current:] for place in share.places}
        self._lanes = {
            lane: Lane(plan, readers, self._tokenizer, lane, None if states is None else states[lane])
            for lane in sorted(wanted)
        }
        self._ahead = WindowsAhead(plan, self._lanes, self._tokenizer, plan.window_at(self._first_step)[0])
        self._owned = [lane for lane in self._lanes if lane % world == rank]
        self._error: BaseException | None = None
        self._closed = threading.Event()
        self._ready: queue.Queue[StepRows | BaseException] = queue.Queue(
            max(stage.window_steps for stage in plan.stages)
        )
        self._steps = self._produce()
        self._thread: threading.Thread | None = None
        if prefetch:
            self._thread = threading.Thread(target=self._run, name=f"flame-data-{rank}", daemon=True)
            self._thread.start()

    def next_step(self) -> StepRows:
        """The rows of the next step; when this rank's lanes have ended, filler and nothing else, ever
        after. Raises DataError when data cannot be read, now and ever after."""
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

    def wait_for_tokenizer(self) -> None:
        """Until it is idle: what it was asked ahead is tokenized. Only where nothing is read in a thread."""
        self._ahead.wait()

    def close(self) -> None:
        """End the producer. May be called again."""
        self._closed.set()
        while not self._ready.empty():  # a producer that waits for room looks up at once
            self._ready.get_nowait()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=10)
        self._tokenizer.close()

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
        index, _ = plan.window_at(next_step)
        for number, lane in self._lanes.items():
            if lane.window_index != index:
                raise DataError(
                    f"the data state is torn: step {next_step} lies in window {index}, but lane {number} "
                    f"is in window {lane.window_index}; resume from another checkpoint"
                )
        for all_windows in self._ahead.windows(self._closed):
            index, start = plan.window_at(next_step)
            share = self._shares[plan.stage_number(index)]
            needed = {place % plan.lanes for place in share.places}  # the others are of another stage
            windows = {number: window for number, window in all_windows.items() if number in needed}
            window = RankWindow(windows, plan, share.places, self._owned, len(self.columns))
            end = start + plan.steps_in_window(index)
            for step in range(next_step, end):
                yield self._assemble(share, window, step, step - start)
            next_step = end

    def _assemble(self, share: Share, window: RankWindow, step: int, step_in_window: int) -> StepRows:
        rows, hashes, sources = window.rows(step_in_window, self._plan.first_row(step))
        counts = _counts(rows, hashes, sources)
        size = share.micro_batch_rows
        if missing := share.micro_batches * size - len(rows):
            length = window.stage.sequence_length
            rows += [Row(-1, np.zeros(length, dtype=np.int32), np.zeros(0, dtype=np.int64))] * missing
        begins = step_in_window == 0
        return StepRows(
            step=step,
            rows=tuple(rows),
            micro_batches=tuple(make_batch(rows[i : i + size]) for i in range(0, len(rows), size)),
            counts=counts,
            records=window.records if begins else np.zeros_like(window.records),
            skips=window.skips if begins else (),
            sources=sources,
            epoch=window.epoch,
            epochs=window.epochs,
            take_state=window.take_state(step_in_window),
            wait_seconds=0.0,
        )


# ------------------------------------------------------------------------------ rows and ranks


def check_world(plan: DataPlan, world: int) -> None:
    """Refuse more data-parallel ranks than rows. Raises RecipeError."""
    fewest = min(plan.stages, key=lambda stage: stage.rows_per_step)
    if world > fewest.rows_per_step:
        raise RecipeError(
            f"{world} data-parallel ranks are too many for {fewest.rows_per_step} rows a step: use at most "
            f"{fewest.rows_per_step}, or set batch.tokens_per_step to at least "
            f"{world * fewest.sequence_length}"
        )


def rows_of_rank(plan: DataPlan, stage: Stage, rank: int, world: int) -> list[int]:
    """The places in a step of a stage, 0 to B - 1, whose rows come to a rank. Rank 0 has the most."""
    groups = plan.lanes if world <= plan.lanes else stage.rows_per_step
    return [place for place in range(stage.rows_per_step) if place % groups % world == rank]


def make_batch(rows: list[Row]) -> Batch:
    """A micro-batch of b rows; filler and the padding of a row are a segment each, without labels."""
    length = len(rows[0].tokens)
    shape = len(rows), length
    tokens = np.concatenate([row.tokens for row in rows], dtype=np.int64)
    lengths = np.concatenate([row.lengths for row in rows])
    padded: list[slice] = []  # tokens that are padding
    if lengths.sum() < len(tokens):
        lengths, padded = _with_padding(rows, length)
    ends = np.cumsum(lengths)
    labels = np.empty_like(tokens)
    labels[:-1] = tokens[1:]
    labels[ends - 1] = IGNORED
    for part in padded:
        labels[part] = IGNORED
    for i, row in enumerate(rows):
        if row.trained is not None:
            labels[i * length : (i + 1) * length - 1][~row.trained[1:]] = IGNORED
    positions = np.arange(len(tokens), dtype=np.int64)
    positions -= np.repeat(ends - lengths, lengths)
    return Batch(
        tokens=torch.from_numpy(tokens.reshape(shape)),
        labels=torch.from_numpy(labels.reshape(shape)),
        positions=torch.from_numpy(positions.reshape(shape)),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        longest_segment=int(lengths.max()),
        first_row=rows[0].index,
    )


def _with_padding(rows: list[Row], length: int) -> tuple[np.ndarray, list[slice]]:
    """The lengths of all segments, the padding of a row a segment of its own, and where padding lies."""
    lengths: list[np.ndarray] = []
    padded: list[slice] = []
    for i, row in enumerate(rows):
        lengths.append(row.lengths)
        real = int(row.lengths.sum())
        if real < length:
            lengths.append(np.array([length - real], dtype=np.int64))
            padded.append(slice(i * length + real, (i + 1) * length))
    return np.concatenate(lengths), padded


def _masked(row: Row) -> int:
    """Tokens without loss that would be predicted if they had one."""
    if row.trained is None:
        return 0
    masked = ~row.trained[: row.lengths.sum()]
    return int(masked.sum()) - int(masked[np.cumsum(row.lengths) - row.lengths].sum())


def _counts(rows: list[Row], hashes: list[int], sources: np.ndarray) -> Counts:
    """Of rows that are no filler, and their hashes."""
    lengths = np.concatenate([np.zeros(0, dtype=np.int64), *(row.lengths for row in rows)])
    return Counts(
        tokens=int(lengths.sum()),
        predicted=int((lengths - 1).sum()) - sum(_masked(row) for row in rows),
        documents=int(sources[:, 1].sum()),
        cut=int(sources[:, 2].sum()),
        attended=int((lengths * (lengths + 1) // 2).sum()),
        digest=digest([row.index for row in rows], hashes),
        padding=sum(len(row.tokens) for row in rows) - int(lengths.sum()),
    )

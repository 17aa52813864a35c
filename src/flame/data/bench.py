"""`flame data bench` at work: the whole loader, and its tokenizer alone on the same text, in turns."""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flame.batch import StepRows
from flame.data.catalog import Catalog, fingerprint
from flame.data.encoders import Finish
from flame.data.loader import Loader
from flame.data.plan import DataPlan
from flame.data.state import DataState
from flame.data.tokens import Tokenizer
from flame.errors import DataError

KEPT_STATES = 64  # of the steps measured, one of which is resumed from


@dataclass(frozen=True, slots=True)
class BenchResult:
    """Rates are of one rank, on the processor time that it got."""

    ranks: int
    steps: int
    tokens: int  # through the loader
    tokens_per_second: float  # of the loader: raw text to batches
    tokenizer_tokens_per_second: float | None  # of it alone: the same calls, in the same process; None
    # where every source holds token ids
    share_of_tokenizer: float | None  # seconds of the tokenizer alone over the loader's, for the same calls;
    # None where that says nothing, as some tokens come from sources of ids
    processor_share: float | None  # the same of processor time, which other work hardly changes
    padding_share: float  # of the rows' places, those that hold no token
    cpu_share: float  # processor seconds a second of the loader; above 1 where threads help
    first_rows_seconds: float  # of a fresh run, tokenizer and files opened
    resume_seconds: float  # to the first row at a random later step
    resumed_step: int
    state_bytes: int  # of one step's state in data.json, all lanes, without the fingerprint
    state_microseconds: float  # of the processor, a step, where each step's state is asked for
    memory_mib: float  # most that the process held
    only_text: bool  # whether no source holds token ids

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


class Recorder:
    """A tokenizer that remembers what it was asked."""

    def __init__(self, inner: Tokenizer) -> None:
        self._inner = inner
        self.calls: list[Sequence[str]] = []

    def begin(self, texts: Sequence[str], begins: Sequence[bool], ends: Sequence[bool]) -> Finish:
        self.calls.append(texts)
        return self._inner.begin(texts, begins, ends)


def bench(catalog: Catalog, plan: DataPlan, ranks: int, seconds: float) -> BenchResult:
    """Measure rank 0 of `ranks` for about `seconds`, half of them the tokenizer alone.

    Loader and tokenizer take turns, a window each, so that a change of the machine's speed meets both. No
    thread runs ahead. Raises what the loader raises, DataError where a resume gives other rows.
    """
    begun = time.perf_counter()
    tokenizer = catalog.load_tokenizer()
    recorder = Recorder(tokenizer)
    loader = Loader(catalog, plan, 0, ranks, plan.stages[0].rows_per_step, prefetch=False, tokenizer=recorder)
    got = loader.next_step()
    first_rows = time.perf_counter() - begun
    loader.wait_for_tokenizer()
    recorder.calls.clear()  # the short windows at the start of a run say little of its speed
    tokens = padding = steps = raw_tokens = 0
    loader_seconds = raw_seconds = cpu = raw_cpu = 0.0
    state_seconds = 0.0
    kept: list[tuple[StepRows, StepRows]] = []  # a step and the one after it
    chosen = random.Random(plan.seed)
    while not steps or loader_seconds + raw_seconds < seconds:
        for _ in range(plan.steps_in_window(plan.window_at(got.step + 1)[0])):
            before, wall, processor = got, time.perf_counter(), time.process_time()
            got = loader.next_step()
            thread = time.thread_time()
            _ = got.state
            state_seconds += time.thread_time() - thread
            loader_seconds += time.perf_counter() - wall
            cpu += time.process_time() - processor
            tokens, steps = tokens + got.counts.tokens, steps + 1
            padding += got.counts.padding
            kept.append((before, got))
            if len(kept) > KEPT_STATES:
                kept.pop(chosen.randrange(KEPT_STATES))
        wall, processor = time.perf_counter(), time.process_time()
        loader.wait_for_tokenizer()  # the calls that it was asked ahead are among those below
        loader_seconds += time.perf_counter() - wall
        cpu += time.process_time() - processor
        wall, processor = time.perf_counter(), time.process_time()
        raw_tokens += sum(tokenizer.count_alone(texts) for texts in recorder.calls)
        raw_seconds += time.perf_counter() - wall
        raw_cpu += time.process_time() - processor
        recorder.calls.clear()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )
    before, after = chosen.choice(kept)
    only_text = not any(source.holds_ids for source in catalog.sources)
    state = DataState(before.step + 1, before.state, loader.columns, fingerprint(catalog, plan))
    return BenchResult(
        ranks=ranks,
        steps=steps,
        tokens=tokens,
        tokens_per_second=tokens / loader_seconds,
        tokenizer_tokens_per_second=raw_tokens / raw_seconds if raw_tokens else None,
        share_of_tokenizer=raw_seconds / loader_seconds if only_text else None,
        processor_share=raw_cpu / cpu if only_text else None,
        padding_share=padding / (tokens + padding),
        cpu_share=cpu / loader_seconds,
        first_rows_seconds=first_rows,
        resume_seconds=_resume(catalog, plan, ranks, state, after),
        resumed_step=state.next_step,
        state_bytes=len(json.dumps({**state.to_json(), "fingerprint": None})),
        state_microseconds=1e6 * state_seconds / steps,
        memory_mib=memory,
        only_text=only_text,
    )


def _resume(catalog: Catalog, plan: DataPlan, ranks: int, state: DataState, expected: StepRows) -> float:
    """Seconds from a state to its next step, which must be the one seen before."""
    begun = time.perf_counter()
    resumed = Loader(catalog, plan, 0, ranks, plan.stages[0].rows_per_step, state, prefetch=False).next_step()
    seconds = time.perf_counter() - begun
    if resumed.counts.digest != expected.counts.digest:
        raise DataError(f"data bench: step {expected.step} has other rows after a resume than before it")
    return seconds

"""The windows of some lanes, one after another: while rows are laid out, a thread tokenizes the next ones."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import count
from typing import NamedTuple

from flame.data.encoders import Finish
from flame.data.lanes import Lane, read_windows
from flame.data.plan import DataPlan
from flame.data.streams import Reading
from flame.data.tokens import PartsEncoder
from flame.data.windows import Window

CALL_TOKENS = 2**19  # of several lanes, tokenized in one call
CALLS_AHEAD = 2  # so that the thread has the next one when it ends the one before


class OneThread:
    """A tokenizer whose work is done by one thread, call after call: not every library can serve two."""

    def __init__(self, inner: PartsEncoder) -> None:
        self._inner = inner
        self._thread = ThreadPoolExecutor(1, "flame-tokenize")

    def begin(self, texts: Sequence[str], begins: Sequence[bool], ends: Sequence[bool]) -> Finish:
        """As `PartsEncoder` says, when all that was begun before is done."""
        return self._thread.submit(self._inner.begin, texts, begins, ends).result()

    def tokenize(self, reading: Reading) -> Future[Reading]:
        """Tokenize what was read, and do not wait."""
        return self._thread.submit(reading.tokenize, self._inner)

    def close(self) -> None:
        """End the thread when its call is done."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class Group(NamedTuple):
    """Lanes whose windows are tokenized in one call."""

    window: int
    lanes: dict[int, Lane]
    ends_window: bool


class WindowsAhead:
    """The windows of all lanes from one on, without end."""

    def __init__(
        self, plan: DataPlan, lanes: dict[int, Lane], tokenizer: OneThread, first_window: int
    ) -> None:
        self._plan, self._lanes, self._tokenizer = plan, lanes, tokenizer
        self._groups = self._all_groups(first_window)
        self._next = next(self._groups)
        self._begun: deque[tuple[Group, list[Future[Reading]]]] = deque()

    def windows(self, closed: threading.Event) -> Iterator[dict[int, Window]]:
        """The window of every lane, by number, window by window, until `closed`. Raises what reading and
        tokenizing raise, where the window is due that needs it."""
        made: dict[int, Window] = {}
        while not closed.is_set():
            self._begin()
            group, readings = self._begun.popleft()
            for reading in readings:
                reading.result().append()
            self._begin()
            made |= {number: lane.next_window() for number, lane in group.lanes.items()}
            if group.ends_window:
                self._begin()
                yield made
                made = {}

    def wait(self) -> None:
        """Until what was begun is tokenized: whoever measures the tokenizer alone wants it idle."""
        wait([reading for _, readings in self._begun for reading in readings])

    def _begin(self) -> None:
        """Read what the next groups lack, and have it tokenized."""
        while len(self._begun) < CALLS_AHEAD:
            group = self._next
            if any(lane.window_index != group.window for lane in group.lanes.values()):
                return  # it has not given the window before
            try:
                readings = [self._tokenizer.tokenize(r) for r in read_windows(list(group.lanes.values()))]
            except Exception as error:
                failed: Future[Reading] = Future()
                failed.set_exception(error)
                readings = [failed]
            self._begun.append((group, readings))
            self._next = next(self._groups)

    def _all_groups(self, first_window: int) -> Iterator[Group]:
        lanes = list(self._lanes.items())
        for window in count(first_window):
            stage = self._plan.stage_of(window)
            tokens = stage.steps_in_window(window) * stage.tokens_per_step // self._plan.lanes
            size = max(1, CALL_TOKENS // tokens)
            for first in range(0, len(lanes), size):
                yield Group(window, dict(lanes[first : first + size]), first + size >= len(lanes))

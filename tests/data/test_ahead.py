"""Tokenizing in a thread of its own: what fails there is raised where its rows are due, and nothing hangs."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

import pytest
from data.streaming import Opened, plain, rows_of

from flame.data.encoders import Finish
from flame.data.loader import Loader
from flame.data.tokens import PartsEncoder

OpenData = Callable[..., Opened]


class Breaking:
    """A tokenizer that fails at its nth call, and stays so."""

    def __init__(self, inner: PartsEncoder, at: int) -> None:
        self._inner, self._left = inner, at

    def begin(self, texts: Sequence[str], begins: Sequence[bool], ends: Sequence[bool]) -> Finish:
        self._left -= 1
        if self._left < 0:
            raise MemoryError("no room for tokens")
        return self._inner.begin(texts, begins, ends)


class Slow:
    """A tokenizer whose calls end when they are let."""

    def __init__(self, inner: PartsEncoder) -> None:
        self._inner = inner
        self.entered, self.let = threading.Event(), threading.Event()

    def begin(self, texts: Sequence[str], begins: Sequence[bool], ends: Sequence[bool]) -> Finish:
        self.entered.set()
        assert self.let.wait(60)
        return self._inner.begin(texts, begins, ends)


@pytest.fixture(autouse=True)
def threads_end() -> Iterator[None]:
    """Those of loaders that a test closed; other tests may have left some of theirs."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 5
    while living := [t for t in threading.enumerate() if t.name.startswith("flame-") and t not in before]:
        assert time.monotonic() < deadline, living
        time.sleep(0.01)


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("calls", [0, 1, 5])
def test_a_failure_is_raised_after_the_rows_before_it_and_ever_after(
    open_data: OpenData, prefetch: bool, calls: int
) -> None:
    catalog, plan = open_data()
    with Loader(catalog, plan, 0, 1, 1) as whole:
        expected = [plain(rows_of([whole.next_step()])) for _ in range(200)]
    breaking = Breaking(catalog.load_tokenizer(), calls)
    with Loader(catalog, plan, 0, 1, 1, prefetch=prefetch, tokenizer=breaking) as loader:
        given = []
        with pytest.raises(MemoryError, match="no room for tokens"):
            while len(given) < 200:
                given.append(plain(rows_of([loader.next_step()])))
        assert given == expected[: len(given)]
        assert plan.window_at(len(given))[1] == len(given)  # all windows before the one that failed
        with pytest.raises(MemoryError):
            loader.next_step()


@pytest.mark.parametrize("prefetch", [True, False])
def test_closing_waits_for_no_call_of_the_tokenizer_longer_than_it_takes(
    open_data: OpenData, prefetch: bool
) -> None:
    catalog, plan = open_data()
    slow = Slow(catalog.load_tokenizer())
    loader = Loader(catalog, plan, 0, 1, 1, prefetch=prefetch, tokenizer=slow)
    reader = threading.Thread(target=lambda: prefetch or suppressed(loader), daemon=True)
    reader.start()
    assert slow.entered.wait(30)
    closing = threading.Thread(target=loader.close)
    closing.start()
    time.sleep(0.1)
    slow.let.set()
    closing.join(5)
    reader.join(5)
    assert not closing.is_alive()
    assert not reader.is_alive()


def suppressed(loader: Loader) -> None:
    """A step of a loader that is closed meanwhile."""
    try:
        loader.next_step()
    except BaseException as error:
        assert not isinstance(error, AssertionError)


def test_a_process_forked_while_a_loader_works_reads_the_same_rows_by_its_own(
    open_data: OpenData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)  # true: tokenizers itself hangs once forked
    catalog, plan = open_data()
    with Loader(catalog, plan, 0, 1, 1) as loader:
        here = [plain(rows_of([loader.next_step()])) for _ in range(20)]
        context = multiprocessing.get_context("fork")
        there, inside = context.Pipe(duplex=False)

        def read() -> None:
            with Loader(catalog, plan, 0, 1, 1) as own:
                inside.send([plain(rows_of([own.next_step()])) for _ in range(20)])
            os._exit(0)

        child = context.Process(target=read)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12's, of forking beside threads
            child.start()
        assert there.poll(60), "the forked process gives no rows"
        assert there.recv() == here
        child.join(10)
        assert child.exitcode == 0

"""Where each rank is, for the watchdog of the process that supervises it.

A rank writes some numbers into a file that both have mapped into memory: no call, no lock, a microsecond a
time. Times are of CLOCK_MONOTONIC, which all processes of a machine share and no clock change moves. In a
process that nobody supervises the numbers go nowhere.
"""

from __future__ import annotations

import mmap
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

# what a rank does, in the order of a step: its rows are fetched while the step before it still computes,
# whose figures are then written
PHASES = ("starting", "data", "writing", "validating", "saving", "agreeing", "computing", "ending")
LONG = ("starting", "validating", "saving", "ending")  # each has a limit of its own
STAMPS = ("up", "loaded", "rows", "stepped")  # moments of a start, in their order
STEPS = 64  # durations of steps that the median is of

# the numbers, all float64
_PHASE, _STEP, _SINCE, _MEDIAN, _FINISHED = range(5)
_FIRST_STAMP = 5
_SIZE = _FIRST_STAMP + len(STAMPS)


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank last said of itself."""

    phase: str
    step: int  # that it works on, or that comes next
    since: float  # monotonic seconds: when it last finished a step, or began or ended a long phase
    median_seconds: float  # of its last steps
    finished: int  # steps in this process
    stamps: dict[str, float]  # of STAMPS, those that have come

    @property
    def place(self) -> tuple[int, int]:
        """How far it is; comparable between ranks."""
        return self.step, PHASES.index(self.phase)


class Heart:
    """A rank's own side."""

    def __init__(self, path: Path | None = None) -> None:
        """`path`: a file of `make_file`; None: nobody looks."""
        self._numbers = np.zeros(_SIZE) if path is None else _map(path)
        self._durations: deque[float] = deque(maxlen=STEPS)
        self._phase = "starting"
        self._numbers[_SINCE] = time.monotonic()

    def enter(self, phase: str, step: int) -> None:
        """The rank begins something else."""
        if self._phase in LONG or phase in LONG:
            self._numbers[_SINCE] = time.monotonic()
        self._phase = phase
        self._numbers[_STEP] = step
        self._numbers[_PHASE] = PHASES.index(phase)

    def finish(self) -> None:
        """The rank has made a step."""
        now = time.monotonic()
        if self._numbers[_FINISHED]:
            self._durations.append(now - self._numbers[_SINCE])
            self._numbers[_MEDIAN] = median(self._durations)
        self.stamp("stepped")
        self._numbers[_SINCE] = now
        self._numbers[_FINISHED] += 1

    def stamp(self, name: str) -> None:
        """A moment of the start; the first time counts."""
        place = _FIRST_STAMP + STAMPS.index(name)
        if not self._numbers[place]:
            self._numbers[place] = time.monotonic()


_heart = [Heart()]


def heart() -> Heart:
    """This process's."""
    return _heart[0]


def begin(path: Path) -> None:
    """From now on this process's heart beats in `path`."""
    _heart[0] = Heart(path)
    _heart[0].stamp("up")


def make_file(path: Path) -> None:
    """An empty file for a rank."""
    path.write_bytes(bytes(8 * _SIZE))


def read(path: Path) -> Beat | None:
    """What the rank of `path` last said; None before it has said anything."""
    numbers = np.frombuffer(path.read_bytes(), dtype=np.float64)
    if not numbers[_SINCE]:
        return None
    stamps = {name: float(t) for name, t in zip(STAMPS, numbers[_FIRST_STAMP:], strict=True) if t}
    return Beat(
        phase=PHASES[int(numbers[_PHASE])],
        step=int(numbers[_STEP]),
        since=float(numbers[_SINCE]),
        median_seconds=float(numbers[_MEDIAN]),
        finished=int(numbers[_FINISHED]),
        stamps=stamps,
    )


def _map(path: Path) -> np.ndarray:
    with path.open("r+b") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0), dtype=np.float64)

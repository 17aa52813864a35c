"""Finds the rank that holds the others up: by heartbeats, stacks, and what the kernel says."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flame.train import heartbeat
from flame.train.config import RecoveryConfig
from flame.train.heartbeat import Beat

MEDIANS = 10  # a step may take so many times the median of those before it
PAUSE_SECONDS = 5.0  # between two looks, after which the machine, not a rank, stood still
STACK_SECONDS = 2.0  # that ranks get to write their stacks
WAITING = (
    "torch/distributed",
    "flame/train/agreement",
    "flame/train/health",
)  # files whose frames wait for peers
INNERMOST = 3  # frames of a stack looked at


@dataclass(frozen=True, slots=True)
class Hang:
    """No rank has come on for too long."""

    rank: int  # the one behind
    phase: str  # what that one does
    step: int
    waited_seconds: float
    limit_seconds: float
    stacks: Path  # of all ranks


class Watchdog:
    """Looks at the ranks of one start."""

    def __init__(self, config: RecoveryConfig, folder: Path, pids: dict[int, int]) -> None:
        """`folder` holds the files of `heart_file` and `stack_file`; `pids` by rank."""
        self._config = config
        self._folder = folder
        self._pids = pids
        self._looked = self._excused = time.monotonic()

    def beats(self) -> dict[int, Beat]:
        """Of the ranks that have begun."""
        found = {rank: heartbeat.read(heart_file(self._folder, rank)) for rank in self._pids}
        return {rank: beat for rank, beat in found.items() if beat is not None}

    def look(self, write_to: Callable[[], Path]) -> Hang | None:
        """Whether the ranks hang; their stacks are then in the file that `write_to` names."""
        now = time.monotonic()
        if now - self._looked > PAUSE_SECONDS:
            self._excused = now  # paused, or this process was stopped: the ranks may have been, too
        self._looked = now
        beats = self.beats()
        if len(beats) < len(self._pids) or not self._config.hang_seconds:
            return None
        waited = now - max(self._excused, *(beat.since for beat in beats.values()))
        limit = max(self._limit(beat) for beat in beats.values())
        if waited <= limit:
            return None
        states = {rank: process_state(pid) for rank, pid in self._pids.items()}
        stacks = dict.fromkeys(self._pids, "") | self._ask_for_stacks(states)
        rank = behind(beats, states, stacks)
        path = write_to()
        write_stacks(path, rank, beats, states, stacks)
        beat = beats[rank]
        return Hang(rank, beat.phase, beat.step, waited, limit, path)

    def _limit(self, beat: Beat) -> float:
        config = self._config
        if beat.phase in ("saving", "ending"):
            return config.save_seconds
        if beat.phase == "validating":
            return config.validation_seconds
        if not beat.finished:
            return config.start_seconds
        return max(MEDIANS * beat.median_seconds, config.hang_seconds)

    def _ask_for_stacks(self, states: dict[int, str]) -> dict[int, str]:
        for rank, pid in self._pids.items():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR2)
                if states[rank] == "T":  # it goes on, to say where it was; it will be killed anyway
                    os.kill(pid, signal.SIGCONT)
        deadline = time.monotonic() + STACK_SECONDS
        found: dict[int, str] = {}
        while len(found) < len(self._pids) and time.monotonic() < deadline:
            time.sleep(0.05)
            for rank in self._pids:
                text = stack_file(self._folder, rank).read_text()
                if "most recent call first" in text:
                    found[rank] = text
        time.sleep(0.05)  # for the last one's last lines
        return {rank: stack_file(self._folder, rank).read_text() for rank in found}


def behind(beats: dict[int, Beat], states: dict[int, str], stacks: dict[int, str]) -> int:
    """The rank that the others wait for: one that is stopped, else the least advanced, and of several of
    those one that does not itself wait for others."""
    stopped = [rank for rank in beats if states.get(rank) == "T"]
    if stopped:
        return stopped[0]
    least = min(beat.place for beat in beats.values())
    last = [rank for rank, beat in beats.items() if beat.place == least]
    return next((rank for rank in last if not waits(stacks[rank])), last[0])


def waits(stacks: str) -> bool:
    """Whether the main thread is in a collective, by its innermost frames."""
    main = stacks.rpartition("most recent call first")[2].splitlines()[1 : 1 + INNERMOST]
    return any(file in line for line in main for file in WAITING)


def process_state(pid: int) -> str:
    """The kernel's letter: R running, S sleeping, D waiting for a device, T stopped; "" where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def write_stacks(
    path: Path, culprit: int, beats: dict[int, Beat], states: dict[int, str], stacks: dict[int, str]
) -> None:
    """One file for all ranks, the one behind first."""
    now = time.monotonic()
    parts: list[str] = []
    for rank in sorted(beats, key=lambda rank: (rank != culprit, rank)):
        beat = beats[rank]
        note = "  <- the rank behind" if rank == culprit else ""
        parts.append(
            f"=== rank {rank}{note}\n{beat.phase}, step {beat.step}, for {now - beat.since:.1f} s; "
            f"process state {states.get(rank) or 'gone'}\n{stacks[rank] or '(it did not answer)'}\n"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts))


def heart_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.heart"


def stack_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.stacks"


def make_files(folder: Path, ranks: int) -> None:
    """Empty files for the ranks of a new start."""
    for rank in range(ranks):
        heartbeat.make_file(heart_file(folder, rank))
        stack_file(folder, rank).write_bytes(b"")


def be_watched(folder: Path, rank: int) -> None:
    """A rank's own part: its heart beats, and at SIGUSR2 it writes the stacks of all its threads, whatever it
    is doing."""
    heartbeat.begin(heart_file(folder, rank))
    stacks = os.open(
        stack_file(folder, rank), os.O_WRONLY | os.O_APPEND
    )  # open for as long as the process lives
    faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)

"""When crashed ranks are started again, and how long it took until they trained."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from flame.train.heartbeat import Beat

FRUITLESS = 3  # crashes in a row without a new step, after which restarting is pointless
LONGEST_PAUSE_SECONDS = 30.0


@dataclass
class Budget:
    """Which crashes are followed by a restart."""

    most: int  # restarts ...
    window_seconds: float  # ... within so much time
    _crashes: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])  # when, last step

    def crash(self, step: int) -> bool:
        """Counts a crash after `step`; whether to start again."""
        self._crashes.append((time.monotonic(), step))
        return not self.fruitless and self.recent <= self.most

    @property
    def recent(self) -> int:
        """Crashes in the window."""
        since = time.monotonic() - self.window_seconds
        return sum(when >= since for when, _ in self._crashes)

    @property
    def _in_a_row(self) -> int:
        """Crashes since the last new step."""
        steps = [step for _, step in self._crashes]
        count = 0
        while count < len(steps) and steps[-1 - count] == steps[-1]:
            count += 1
        return count

    @property
    def fruitless(self) -> bool:
        return self._in_a_row >= FRUITLESS

    @property
    def crashes(self) -> int:
        return len(self._crashes)

    @property
    def pause_seconds(self) -> float:
        """Before the next start: none where there was a new step, then 1, 2, 4 ... seconds."""
        again = self._in_a_row - 2
        return min(2.0**again, LONGEST_PAUSE_SECONDS) if again >= 0 else 0.0


@dataclass
class Recovery:
    """The time from a fault to the next step, part by part; times are monotonic seconds."""

    step: int  # the last one before the fault
    attempt: int
    detected: float
    detect_seconds: float  # how long the fault may have gone unnoticed
    stopped: float = 0.0  # when all ranks were gone
    pids: list[int] = field(default_factory=list[int])  # of the new ranks

    def parts(self, beats: list[Beat]) -> dict[str, float]:
        """Seconds of each part that is over: of the last rank, as all wait for it."""
        moments = {"stop": self.stopped}
        names = {"start": "up", "load": "loaded", "data": "rows", "first_step": "stepped"}
        for part, stamp in names.items():
            if not beats or any(stamp not in beat.stamps for beat in beats):
                break
            moments[part] = max(beat.stamps[stamp] for beat in beats)
        parts = {"detect": self.detect_seconds}
        before = self.detected
        for part, moment in moments.items():
            parts[part] = max(0.0, moment - before)
            before = max(before, moment)
        return {part: round(seconds, 3) for part, seconds in parts.items()}


def trains_again(beats: list[Beat]) -> bool:
    """Whether every rank has made a step."""
    return bool(beats) and all(beat.finished for beat in beats)

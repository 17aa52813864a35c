"""Where the wall time of a run went, and its goodput.

Events say when; metrics say how long steps took, but not when. An attempt's steps are laid out one after
another from an anchor: the moment a checkpoint of a known step began, which its event gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from flame.report.attempts import ENDINGS, Attempt
from flame.report.history import Event, StepRecord

Kind = Literal["training", "lost", "validating", "starting", "saving", "recovery", "stopped"]
KINDS: dict[Kind, str] = {
    "training": "training steps that count",
    "lost": "training steps that were lost and trained again",
    "validating": "loss on held out documents, samples, and a hook",
    "starting": "from a start to the first step: data, compilation, the first batch",
    "saving": "training paused for a checkpoint, or waiting for the last one",
    "recovery": "from the last step before a loss until the ranks were back",
    "stopped": "nothing ran: stopped, or ended without a word; the next start's imports are in here",
}

BY_ITSELF = ("rank_lost", "hang", "rollback")  # after these the supervisor goes on; a user need not


@dataclass(frozen=True, slots=True)
class Span:
    """Seconds since the run's first event."""

    kind: Kind
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Timeline:
    spans: list[Span]  # in order, without gaps

    @property
    def wall_seconds(self) -> float:
        return self.spans[-1].end if self.spans else 0.0

    def total(self, kind: Kind) -> float:
        """Seconds spent on `kind`."""
        return sum(span.seconds for span in self.spans if span.kind == kind)

    @property
    def goodput(self) -> float:
        """Share of the time that the run was up in which steps that count were trained; NaN if never up."""
        up = self.wall_seconds - self.total("stopped")
        return self.total("training") / up if up > 0 else math.nan


def timeline_of(attempts: list[Attempt]) -> Timeline:
    """The spans of all attempts and of the time between them."""
    if not attempts:
        return Timeline([])
    layout = Layout(attempts[0].begins.time)
    for attempt, following in zip(attempts, [*attempts[1:], None], strict=True):
        limit = following.begins.time if following else math.inf
        lay_out(layout, attempt, limit)
        if following:
            again = any(event.name in BY_ITSELF for event in attempt.follows)
            layout.until(limit, "recovery" if again else "stopped")
    return Timeline(layout.spans)


class Layout:
    """Spans one after another; neighbours of one kind become one."""

    def __init__(self, origin: float) -> None:
        """`origin`: seconds since the epoch, as are all times here."""
        self.spans: list[Span] = []
        self.now = self._origin = origin

    def until(self, time: float, kind: Kind) -> None:
        """Fills up to `time`; nothing where that has passed."""
        if time <= self.now:
            return
        begin = self.now - self._origin
        if self.spans and self.spans[-1].kind == kind:
            begin = self.spans.pop().begin
        self.spans.append(Span(kind, begin, time - self._origin))
        self.now = time


def lay_out(layout: Layout, attempt: Attempt, limit: float) -> None:
    """An attempt: starting, its steps and the pauses in them, and how it ended; none of it after `limit`."""
    durations = durations_of(attempt)
    layout.until(min(limit, first_step_began(attempt, durations)), "starting")
    pauses, validated = pauses_of(attempt), validated_of(attempt)
    lost = {record.step for record in attempt.lost}
    before = attempt.after
    for record, seconds in durations:
        end = layout.now + seconds
        # the pause for a checkpoint is part of the step that follows it
        pause = sum(pauses.get(step, 0.0) for step in range(before, record.step))
        layout.until(min(limit, end, layout.now + pause), "saving")
        layout.until(min(limit, end), "lost" if record.step in lost else "training")
        apart = sum(validated.get(step, 0.0) for step in range(before + 1, record.step + 1))
        layout.until(min(limit, layout.now + apart), "validating")
        before = record.step
    if attempt.follows and attempt.ending != "unknown":
        ended = attempt.ending in ("done", "stopped")
        last = max((e.time for e in attempt.follows if e.name != "restart"), default=layout.now)
        layout.until(min(limit, last), "saving" if ended else "recovery")


def durations_of(attempt: Attempt) -> list[tuple[StepRecord, float]]:
    """Each record with the seconds that the steps since the one before took, pauses included."""
    before = attempt.after
    durations: list[tuple[StepRecord, float]] = []
    for record in attempt.records:
        mean = 0.0 if math.isnan(record.step_seconds) else record.step_seconds
        durations.append((record, mean * (record.step - before)))
        before = record.step
    return durations


def first_step_began(attempt: Attempt, durations: list[tuple[StepRecord, float]]) -> float:
    """When the first step began, in seconds since the epoch."""
    if not attempt.follows:
        return attempt.begins.time
    if not durations:
        return attempt.follows[-1].time if attempt.ending == "unknown" else attempt.follows[0].time
    apart = validated_of(attempt)
    for event in attempt.follows:
        if event.name == "checkpoint_saved" and event.step is not None:
            validating = sum(seconds for step, seconds in apart.items() if step <= event.step)
            elapsed = validating + sum(seconds for record, seconds in durations if record.step <= event.step)
            if any(record.step == event.step for record, _ in durations):
                took = _seconds(event, "seconds") + _seconds(event, "pause_seconds")
                return max(attempt.begins.time, event.time - took - elapsed)
    ends = next((e for e in attempt.follows if e.name in ENDINGS), attempt.follows[-1])
    elapsed = sum(apart.values()) + sum(seconds for _, seconds in durations)
    return max(attempt.begins.time, ends.time - elapsed)


def pauses_of(attempt: Attempt) -> dict[int, float]:
    """Seconds that training stood still for the checkpoint of each step."""
    return {
        event.step: _seconds(event, "pause_seconds")
        for event in attempt.follows
        if event.name == "checkpoint_saved" and event.step is not None
    }


def validated_of(attempt: Attempt) -> dict[int, float]:
    """Seconds of the validation after each step, which are in no step's time. What was validated before the
    attempt's first step belongs to its start."""
    return {
        event.step: _seconds(event, "seconds")
        for event in attempt.follows
        if event.name == "validation" and event.step is not None and event.step > attempt.after
    }


def _seconds(event: Event, key: str) -> float:
    value = event.fields.get(key)
    return float(value) if isinstance(value, int | float) else 0.0

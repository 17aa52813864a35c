"""A run as the attempts it took: each from its `start` or `resume` to what ended it.

Neither a rank that is lost nor a signal knows the step it came at; it follows from the steps that were
trained twice, which every resume moves to logs/superseded.jsonl.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from flame.report.history import Event, History, StepRecord

BEGINNINGS = ("start", "resume")
# what a chart marks: (event, how it is called there)
INTERRUPTIONS = {
    "rank_lost": "rank lost",
    "hang": "hang",
    "rollback": "rollback",
    "signal": "signal",
    "restart": "restart",
    "start": "start",
    "resume": "resume",
    "failed": "failed",
}

Ending = Literal["lost", "stopped", "done", "failed", "unknown"]
ENDINGS: dict[str, Ending] = {
    "done": "done",
    "failed": "failed",
    "rank_lost": "lost",
    "hang": "lost",
    "rollback": "lost",
    "signal": "stopped",
}


@dataclass(slots=True)
class Attempt:
    """One life of the ranks."""

    begins: Event
    follows: list[Event] = field(default_factory=list[Event])  # up to the next beginning
    kept: list[StepRecord] = field(default_factory=list[StepRecord])
    lost: list[StepRecord] = field(default_factory=list[StepRecord])  # trained again by a later attempt

    @property
    def after(self) -> int:
        """The step it continued from; 0 for a fresh start."""
        return self.begins.step or 0

    @property
    def ending(self) -> Ending:
        for event in self.follows:
            if event.name in ENDINGS:
                return ENDINGS[event.name]
        return "unknown"

    @property
    def records(self) -> list[StepRecord]:
        """What it trained, kept or not, ascending."""
        return sorted([*self.kept, *self.lost], key=lambda record: record.step)


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that interrupted the run, or brought it back, at a step."""

    step: int
    name: str  # of the event


def attempts_of(history: History) -> list[Attempt]:
    """The attempts in order, each with its events and records."""
    attempts: list[Attempt] = []
    for event in history.events:
        if event.name in BEGINNINGS:
            attempts.append(Attempt(event))
        elif attempts:
            attempts[-1].follows.append(event)
    groups = superseded_groups(history, [attempt.after for attempt in attempts])
    for index, group in enumerate(groups):
        for record in group:
            _give(attempts[:index], record, lost=True)
    for record in history.steps:
        _give(attempts, record, lost=False)
    return attempts


def _give(attempts: list[Attempt], record: StepRecord, *, lost: bool) -> None:
    """To the last of `attempts` that can have trained it."""
    for attempt in reversed(attempts):
        if attempt.after < record.step:
            (attempt.lost if lost else attempt.kept).append(record)
            return


def superseded_groups(history: History, continued: list[int]) -> list[list[StepRecord]]:
    """Which superseded records the attempt that continued after each of `continued` moved there.

    A group begins with the first logged step after the one that was continued, and leaves none out; where
    the next group's first step carries on from it, the groups are parted there.
    """
    logged = sorted({record.step for record in [*history.steps, *history.superseded]})
    following = dict(pairwise(logged))  # what was lost was trained again, so that every logged step is known
    first = [next((s for s in logged if s > after), None) for after in continued]
    groups: list[list[StepRecord]] = [[] for _ in continued]
    rest = list(history.superseded)
    for index in range(1, len(continued)):  # nothing was there before the first attempt
        group = groups[index]
        upcoming = first[index + 1] if index + 1 < len(first) else None
        while rest and rest[0].step == (following.get(group[-1].step) if group else first[index]):
            if group and rest[0].step == upcoming:
                break
            group.append(rest.pop(0))
    return groups


def steps_of_events(history: History, attempts: list[Attempt]) -> dict[int, int]:
    """The step at which each event happened, by its index in `history.events`."""
    found: dict[int, int] = {}
    current = -1
    for index, event in enumerate(history.events):
        if event.name in BEGINNINGS:
            current += 1
        if event.step is not None:
            found[index] = event.step
        elif event.name == "restart" and current + 1 < len(attempts):
            found[index] = attempts[current + 1].after
        elif current >= 0:
            records = attempts[current].records
            found[index] = records[-1].step if records else attempts[current].after
    return found


def marks_of(history: History, attempts: list[Attempt]) -> list[Mark]:
    """What the charts mark, by step. The first start is no interruption."""
    steps = steps_of_events(history, attempts)
    marks: list[Mark] = []
    begun = False
    for index, event in enumerate(history.events):
        first, begun = event.name in BEGINNINGS and not begun, begun or event.name in BEGINNINGS
        if event.name in INTERRUPTIONS and not first and index in steps:
            marks.append(Mark(steps[index], event.name))
    return sorted(marks, key=lambda mark: mark.step)

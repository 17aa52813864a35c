"""Going back before a bad step: RUN/skipped_rows.json, and what honours it.

That file alone is the decision to go back. It is replaced atomically before anything else happens; every
start then sets aside the checkpoints that have trained rows which it names, and passes those rows over. So a
crash in the middle of a rollback is a crash like any other. The row stream stays the recipe's: what is
trained is that stream without the ranges of this file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import orjson

from flame.batch import Skip, StepRows
from flame.errors import CheckpointError, TrainingError
from flame.train.health import Health, Judged
from flame.train.journal import event, replace_file
from flame.train.keeping import STEPS_BACK, read_record, saved_steps, step_directory

FILE = "skipped_rows.json"


@dataclass(frozen=True, slots=True)
class Range:
    """Rows that are not trained. All pairs are from the first on and up to, not with, the second."""

    rows: tuple[int, int]  # global row numbers
    data_steps: tuple[int, int]  # of the row stream, from 0
    steps: tuple[int, int]  # trained steps, from 1, as they were numbered when they were bad
    why: str
    time: float  # seconds since the epoch
    inherited: bool = False  # from the run that this one branched off


@dataclass(frozen=True, slots=True)
class Skipped:
    """All ranges of a run, in the order in which they were found."""

    ranges: tuple[Range, ...] = ()

    def __contains__(self, data_step: int) -> bool:
        return any(r.data_steps[0] <= data_step < r.data_steps[1] for r in self.ranges)

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(r) for r in self.ranges]

    @classmethod
    def from_json(cls, raw: Iterable[dict[str, Any]]) -> Skipped:
        """Raises KeyError, TypeError or ValueError where it is something else."""
        pairs = ("rows", "data_steps", "steps")
        found: list[dict[str, Any]] = [{**r, **{name: _pair(r[name]) for name in pairs}} for r in raw]
        return cls(tuple(Range(**fields) for fields in found))

    def trained(self, steps: range) -> list[int]:
        """The data steps that trained steps (here from 0) are made of."""
        found: list[int] = []
        for data_step in steps:
            end = 0  # of what is passed over by now; ranges may overlap
            for first, after in sorted(r.data_steps for r in self.ranges):
                if first <= data_step:
                    data_step += max(0, after - max(first, end))
                    end = max(end, after)
            found.append(data_step)
        return found


def _pair(raw: Any) -> tuple[int, int]:
    first, end = raw
    return int(first), int(end)


def read_skipped(run: Path) -> Skipped:
    """The rows that a run passes over. Raises CheckpointError where the file is damaged."""
    path = run / FILE
    if not path.exists():
        return Skipped()
    try:
        return Skipped.from_json(cast("dict[str, Any]", orjson.loads(path.read_bytes()))["ranges"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not a list of row ranges ({error!r}); the newest checkpoint's data.json holds a copy "
            "under skipped_rows: restore it from there"
        ) from None


def write_skipped(run: Path, skipped: Skipped) -> None:
    """Makes it the run's, to stay."""
    record = {"ranges": skipped.to_json()}
    replace_file(run / FILE, orjson.dumps(record, option=orjson.OPT_INDENT_2))


def inherit(run: Path, trunk: Path) -> Skipped:
    """What a run skips that goes on in the data of another: that one's rows, and its own if it has gone back
    before its first checkpoint. Only for who holds the run's lock."""
    theirs, own = read_skipped(trunk), read_skipped(run)
    new = [replace(r, inherited=True) for r in theirs.ranges]
    whole = Skipped((*new, *(r for r in own.ranges if not r.inherited)))
    if whole != own:
        write_skipped(run, whole)
    return whole


def set_aside(run: Path) -> Skipped:
    """Renames checkpoints that have trained rows which the run skips; only for who holds the run's lock."""
    skipped = read_skipped(run)
    for step in saved_steps(run):
        try:
            record = read_record(run, step, "data.json")
            known = Skipped.from_json(record.get("skipped_rows", []))
            trained = [r for r in skipped.ranges if r.data_steps[0] < int(record["next_step"])]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged: it will be rejected
        if set(trained) - set(known.ranges):
            path = step_directory(run, step)
            target = path.with_name(f"{path.name}.rolled-back")
            if target.exists():
                target = path.with_name(f"{path.name}.rolled-back-{time.time_ns()}")
            path.rename(target)
    return skipped


class RowsLeft:
    """A reader of rows that passes over what is skipped."""

    def __init__(self, read: Callable[[], StepRows], skipped: Skipped) -> None:
        self._read = read
        self._skipped = skipped

    def next_step(self) -> StepRows:
        """The next step's rows that are trained. Counts of records in what was passed over are kept."""
        rows = self._read()
        records, skips, waited = rows.records, rows.skips, rows.wait_seconds
        while rows.step in self._skipped:
            rows = self._read()
            records, waited = records + rows.records, waited + rows.wait_seconds
            skips: tuple[Skip, ...] = (*skips, *rows.skips)
        return replace(rows, records=records, skips=skips, wait_seconds=waited)


class RolledBack(Exception):
    """The run goes on from before a bad step: whoever built it loads it anew."""


@dataclass
class Guard:
    """Watches the steps of a run on one rank, and takes all ranks back where one was bad."""

    run: Path
    rank: int
    health: Health
    skipped: Skipped
    first_row: Callable[[int], int]  # of a data step
    most: int  # rollbacks
    wait: Callable[[], None]  # for the save under way
    begun: int  # the step that a run without a checkpoint of its own goes back to

    def check(self, *, all_steps: bool = False) -> None:
        """Looks at the steps that are known by now. All ranks call it at the same steps.

        Raises RolledBack where the run must go back, TrainingError where it has gone back too often.
        """
        for judged in self.health.judge(all_steps=all_steps):
            if judged.update_skipped and self.rank == 0:
                rows = [self.first_row(judged.data_step), self.first_row(judged.data_step + 1)]
                event(
                    self.run, "update_skipped", step=judged.step, rows=rows, data_step=judged.data_step,
                    loss=judged.loss, grad_norm=judged.grad_norm,
                )  # fmt: skip
            if judged.trouble is not None:
                self._go_back(judged)

    def _go_back(self, judged: Judged) -> None:
        self.wait()
        if self._times >= self.most:
            raise TrainingError(self._hopeless(judged))
        if self.rank == 0:
            bad = bad_range(judged, self.skipped, saved_steps(self.run) or [self.begun], self.first_row)
            write_skipped(self.run, Skipped((*self.skipped.ranges, bad)))
            event(self.run, "rollback", step=judged.step, rows=bad.rows, steps=bad.steps, why=judged.trouble)
            print(
                f"step {judged.step}: {judged.trouble}; going back, and passing over the rows of steps "
                f"{bad.steps[0]} to {judged.step}",
                flush=True,
            )
        raise RolledBack

    @property
    def _times(self) -> int:
        """That this run has gone back."""
        return sum(not r.inherited for r in self.skipped.ranges)

    def _hopeless(self, judged: Judged) -> str:
        first, times = max(0, judged.step - STEPS_BACK - 1), self._times
        return (
            f"{self.run}: step {judged.step}: {judged.trouble}. The run has gone back {times} time(s) "
            "already, as often as recovery.max_rollbacks allows. Look at the loss and grad_norm before it "
            f"(flame report {self.run}); at the rows in {FILE}, and at these: flame data preview "
            f"{self.run / 'recipe.toml'} --run {self.run} --steps {first}:{judged.step}; at "
            "optimizer.learning_rate and precision. A larger recovery.max_rollbacks lets it go on"
        )


def bad_range(
    judged: Judged, skipped: Skipped, checkpoints: list[int], first_row: Callable[[int], int]
) -> Range:
    """The rows of the STEPS_BACK + 1 steps up to a bad one.

    `checkpoints`: the steps that the run can go back to. Where none is from before those, the rows begin
    after the oldest one: what was before it is pruned, or another run's, and a long run is not begun again
    for the sake of some rows.
    """
    first = max(1, judged.step - STEPS_BACK)
    before = [step for step in checkpoints if step < judged.step]
    if before and before[0] >= first:
        first = before[0] + 1
    data_step, left = judged.data_step, judged.step - first
    while left:
        data_step -= 1
        left -= data_step not in skipped
    return Range(
        rows=(first_row(data_step), first_row(judged.data_step + 1)),
        data_steps=(data_step, judged.data_step + 1),
        steps=(first, judged.step + 1),
        why=judged.trouble or "",
        time=round(time.time(), 3),
    )

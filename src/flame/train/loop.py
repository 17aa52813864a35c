"""The training loop."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from flame.batch import StepRows
from flame.errors import CheckpointError, DataError, Exit
from flame.parallel.mesh import Place
from flame.schema import Duration
from flame.train.agreement import Agreed, Agreement, Proposal
from flame.train.checkpoint import Checkpointer, Records, tensors_of
from flame.train.exporter import Exporter
from flame.train.heartbeat import heart
from flame.train.journal import SkipLog, event
from flame.train.metrics import Meter
from flame.train.mirror import STOP_SECONDS
from flame.train.optimizer import set_learning_rate
from flame.train.pace import Pace
from flame.train.replicas import Replicas
from flame.train.rollback import Guard
from flame.train.schedule import Schedule
from flame.train.shards import Shards
from flame.train.step import Passes, train_step
from flame.train.validation import Validation

COLLECT_STEPS = 50


class RowReader(Protocol):
    """Where the rows come from; `flame.data.loader.Loader` is one."""

    def next_step(self) -> StepRows:
        """The next step's rows of this rank. Raises DataError where they cannot be read."""
        ...


@dataclass
class Progress:
    """How far a run is, besides its tensors; saved as a checkpoint's train.json."""

    step: int = 0
    tokens: int = 0  # of real rows, unpredicted ones included
    documents: int = 0
    updates_skipped: int = 0
    records: list[list[int]] = field(default_factory=list[list[int]])  # per source, as in StepRows
    sources: list[list[int]] = field(default_factory=list[list[int]])  # tokens, documents, documents cut
    health: dict[str, Any] = field(default_factory=dict[str, Any])  # `Health.history`

    def with_records(self, agreed: Agreed) -> np.ndarray:
        """Records passed, skipped, held out and overlong, [sources, 4], when the next step is trained too."""
        return agreed.records + np.array(self.records or np.zeros_like(agreed.records), np.int64)

    def advance(self, agreed: Agreed) -> None:
        """Counts one more trained step."""
        self.records = self.with_records(agreed).tolist()
        self.sources = (agreed.sources + np.array(self.sources or 0, np.int64)).tolist()
        self.step += 1
        self.tokens += agreed.counts.tokens
        self.documents += agreed.counts.documents


@dataclass
class Job:
    """Everything that the loop drives, already built and, on a resume, loaded."""

    run: Path
    seed: int
    total_steps: int | None  # None: the data's end is the run's
    clip_norm: float
    checkpoint_every: Duration
    logging_every: Duration

    guest: nn.Module  # the model itself, whose names checkpoints use
    model: nn.Module | Passes  # the guest with its loss, called with a Batch; or a pipeline of such
    device: torch.device
    shards: Shards  # the guest's parameters as this rank holds them
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    rows: RowReader
    agreement: Agreement
    checkpointer: Checkpointer
    exporter: Exporter
    export_every: Duration | None
    meter: Meter
    validation: Validation | None
    skip_log: SkipLog
    rank: int
    place: Place
    progress: Progress
    guard: Guard  # against bad steps
    replicas: Replicas | None  # of several copies of the model
    pace: Pace | None  # of several ranks
    beginning: dict[str, Any] | None  # data.json before the first step, where no checkpoint holds it yet

    should_stop: Callable[[], bool]
    check_records: Callable[[np.ndarray], None]  # raises DataError when too many are skipped
    data_record: Callable[[int, np.ndarray], dict[str, Any]]  # data.json of a step and its whole state
    extra_record: dict[str, Any]  # goes into train.json too


def train(job: Job) -> Exit:
    """Trains until the last step, the end of the data or a stop request, and always leaves a checkpoint.

    Where data cannot be read, every rank saves at the same step and raises the same DataError. After a bad
    step every rank raises RolledBack: the run is to be loaded anew.
    """
    if is_last(job, job.progress.step):
        return finish(job, None, "there was no step to make")
    clock = SaveClock(job.checkpoint_every)
    heart().stamp("loaded")
    coming = Coming.fetch(job, clock)
    heart().stamp("rows")
    if job.validation is not None and job.validation.at_start and job.progress.step == 0:
        heart().enter("validating", 1)
        job.validation.run(0, 0)
    job.meter.start()

    with collector_at_rest() as collect:
        return run_steps(job, clock, coming, collect)


def run_steps(job: Job, clock: SaveClock, coming: Coming, collect: Callable[[int], None]) -> Exit:
    """The steps themselves. `coming` is the first one's rows."""
    trained: StepRows | None = None  # the rows of the last step made here
    write_metrics: Callable[[], None] | None = None  # of that step, where it is not logged yet
    while not is_last(job, job.progress.step):
        # what all ranks agreed on before this step
        heart().enter("agreeing", job.progress.step + 1)
        agreed = coming.settle(job)
        job.guard.check()
        problem = data_problem(job, coming, agreed)
        if problem is not None or agreed.stop:
            return leave(job, trained, problem)
        if agreed.counts.tokens == 0:
            if write_metrics is not None:
                write_metrics()
            return finish(job, trained, "the data ended")
        assert coming.rows is not None
        trained = coming.rows

        # forward, backward, update
        step, tokens_before = job.progress.step + 1, job.progress.tokens
        heart().enter("computing", step)
        learning_rate = job.schedule.learning_rate(step)
        set_learning_rate(job.optimizer, learning_rate)
        result = train_step(
            job.model,
            job.shards,
            job.optimizer,
            [batch.to(job.device) for batch in trained.micro_batches],
            predicted=agreed.counts.predicted,
            clip_norm=job.clip_norm,
            seed=(job.seed, step, *job.place.seed),
        )
        job.progress.advance(agreed)
        job.meter.count(agreed, result, trained.wait_seconds)
        job.guard.health.count(step, trained.step, agreed.counts.predicted, result)
        heart().finish()
        if job.pace is not None:
            job.pace.count(step, trained.wait_seconds)

        # while the device works: the next step's rows, and the exchange about them
        if not is_last(job, step):
            coming = Coming.fetch(job, clock)

        # write down
        heart().enter("writing", step + 1)
        write_skips(job, trained, agreed)
        write_metrics = partial(job.meter.log, job.progress, agreed, result, learning_rate)
        if step == 1 or is_last(job, step) or crossed(job.logging_every, job.progress, tokens_before):
            write_metrics()
            write_metrics = None
        if job.replicas is not None and crossed(job.replicas.every, job.progress, tokens_before):
            job.replicas.check(step)
        problem = validate(job, tokens_before)
        if problem is not None:
            return leave(job, trained, problem)
        export = job.export_every is not None and crossed(job.export_every, job.progress, tokens_before)
        if export:
            job.exporter.want(step)
        if export or agreed.save or crossed(job.checkpoint_every, job.progress, tokens_before):
            save(job, trained)
            clock.saved()
            heart().enter("writing", step + 1)
        collect(step)

    return finish(job, trained, "its last step was made")


def is_last(job: Job, step: int) -> bool:
    """Whether a step is at the run's given length, or past it."""
    return job.total_steps is not None and step >= job.total_steps


@contextmanager
def collector_at_rest() -> Generator[Callable[[int], None]]:
    """Keeps Python's garbage collector out of the steps: what exists is set aside, and young objects are
    looked at every COLLECT_STEPS steps, on all ranks at the same one, so that none waits for another."""

    def collect(step: int) -> None:
        if step % COLLECT_STEPS == 0:
            gc.collect(1)

    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield collect
    finally:
        gc.enable()
        gc.unfreeze()


@dataclass(frozen=True, slots=True)
class Coming:
    """The next step's rows on this rank, and the exchange about them on its way."""

    rows: StepRows | None
    failure: DataError | None  # of this rank's own data
    proposal: Proposal

    @staticmethod
    def fetch(job: Job, clock: SaveClock) -> Coming:
        heart().enter("data", job.progress.step + 1)
        rows: StepRows | None = None
        failure: DataError | None = None
        try:
            rows = job.rows.next_step()
        except DataError as error:
            failure = error
        if job.validation is not None and failure is None:
            failure = job.validation.failure()
        save_now = job.rank == 0 and clock.due()
        proposal = job.agreement.propose(
            rows, save=save_now, stop=job.should_stop(), failed=failure is not None
        )
        return Coming(rows, failure, proposal)

    def settle(self, job: Job) -> Agreed:
        return job.agreement.settle(self.proposal)


@dataclass
class SaveClock:
    """Whether it is time to save, where the interval is in minutes; rank 0's clock counts."""

    every: Duration
    last: float = field(default_factory=time.monotonic)

    def due(self) -> bool:
        return self.every.unit == "minutes" and time.monotonic() - self.last >= 60 * self.every.amount

    def saved(self) -> None:
        self.last = time.monotonic()


def crossed(every: Duration, progress: Progress, tokens_before: int) -> bool:
    """Whether the step just made is the first at or past a multiple of `every`. Never for minutes.

    `tokens_before`: trained before that step.
    """
    if every.unit == "minutes":
        return False
    if every.unit == "steps":
        return progress.step % every.amount == 0
    return progress.tokens // every.amount > tokens_before // every.amount


def data_problem(job: Job, coming: Coming, agreed: Agreed) -> DataError | None:
    """The error that every rank raises where the next step's data cannot be trained."""
    if agreed.failed_rank is not None:
        text = job.agreement.gather_message(str(coming.failure) if coming.failure else None)
        return DataError(text)
    try:
        job.check_records(job.progress.with_records(agreed))
    except DataError as error:
        return error
    return None


def write_skips(job: Job, trained: StepRows, agreed: Agreed) -> None:
    """Each rank names the records that its own lanes skipped; rank 0 counts them in an event."""
    if job.place.speaks:
        job.skip_log.write(trained.skips)
    skipped = int(agreed.records[:, 1].sum())
    if job.rank == 0 and skipped:
        event(job.run, "record_skipped", step=job.progress.step, records=skipped)


def validate(job: Job, tokens_before: int, *, last: bool = False) -> DataError | None:
    """Validates where the step just made asks for it, or the run's end. Its time is no training's.

    Returns what all ranks raise where the set cannot be read.
    """
    validation, progress = job.validation, job.progress
    if validation is None:
        return None
    validation.prepare()  # from the first step on, so that this does not wait for it
    due = last or crossed(validation.every, progress, tokens_before)
    if not due or validation.last_step == progress.step:
        return None
    heart().enter("validating", progress.step + 1)
    try:
        job.meter.pause(validation.run(progress.step, progress.tokens))
    except DataError as error:
        return error
    return None


def save(job: Job, trained: StepRows) -> None:
    """Begins a checkpoint of the step just made, if that was sound. All ranks call it at the same step."""
    heart().enter("saving", job.progress.step + 1)
    job.guard.check(all_steps=True)
    if job.replicas is not None:
        job.replicas.check(job.progress.step)
    job.progress.health = job.guard.health.history()
    job.progress.updates_skipped = job.meter.updates_skipped()
    state = job.agreement.sum_state(trained.state)
    begin_checkpoint(job, job.data_record(trained.step + 1, state))


def begin_checkpoint(job: Job, data_record: dict[str, Any]) -> None:
    records = Records(train={**asdict(job.progress), **job.extra_record}, data=data_record)
    job.checkpointer.save(job.progress.step, tensors_of(job.guest, job.shards, job.optimizer), records)


def leave(job: Job, trained: StepRows | None, problem: DataError | None) -> Exit:
    """Saves what was trained and stops before the next step."""
    save_last(job, trained)
    job.checkpointer.uploaded(STOP_SECONDS)
    job.exporter.abandon()
    if problem is not None:
        raise problem
    return Exit.STOPPED


def finish(job: Job, trained: StepRows | None, why: str) -> Exit:
    """The last checkpoint, then the end. Raises DataError where the data held nothing to train."""
    if job.progress.step == 0 and not is_last(job, 0):
        raise DataError("no source holds any text that could be trained; see logs/skipped-records.jsonl")
    problem = validate(job, job.progress.tokens, last=True)
    save_last(job, trained)
    if problem is not None:
        raise problem
    job.exporter.finish(job.progress.step)
    job.checkpointer.uploaded()
    if job.rank == 0:
        event(job.run, "done", step=job.progress.step, tokens=job.progress.tokens, why=why)
        print(f"done after step {job.progress.step}: {why}", flush=True)
    return Exit.DONE


def save_last(job: Job, trained: StepRows | None) -> None:
    """Makes sure that the last trained step has a checkpoint. Raises CheckpointError where it cannot."""
    heart().enter("ending", job.progress.step + 1)
    job.checkpointer.wait()
    first = trained is None and job.beginning is not None and is_last(job, job.progress.step)
    if (trained is not None or first) and job.checkpointer.last_saved != job.progress.step:
        if trained is not None:
            save(job, trained)
        elif job.beginning is not None:
            begin_checkpoint(job, job.beginning)
        job.checkpointer.wait()
        if job.checkpointer.last_saved != job.progress.step:
            raise CheckpointError(
                f"{job.run}: step {job.progress.step} could not be saved: {job.checkpointer.error}"
            )

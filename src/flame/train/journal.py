"""A run directory's own records: metrics.jsonl, events.jsonl, TensorBoard, and the lock.

Each line is one `os.write` to a file opened for appending, so that several processes may write and a
crash leaves at most one torn line, which the next start removes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import orjson

from flame.batch import Skip
from flame.errors import CheckpointError

LOCK_WAIT_SECONDS = 30.0
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_unwritten: dict[Path, bytes] = {}  # lines that a full disk did not take
SAMPLES = "samples.jsonl"  # what the model wrote at validations


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Appends one JSON object as a line. Numbers that are not finite become null.

    Where the disk is full the line is kept, and comes with the next one that can be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n"
    lines = _unwritten.pop(path, b"") + line
    try:
        _append(path, lines)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        _unwritten[path] = lines


def _append(path: Path, lines: bytes) -> None:
    """All of `lines` or, with an OSError, nothing of them."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        written = os.write(descriptor, lines)
        if written < len(lines):  # the disk is full
            os.ftruncate(descriptor, os.lseek(descriptor, 0, os.SEEK_CUR) - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a .jsonl file; a torn one at its end is passed over.

    Raises CheckpointError naming a line that is no JSON object.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError:
                record = None
            if not isinstance(record, dict):
                raise CheckpointError(f"{path}: line {number} is no JSON object; mend or remove that line")
            yield cast("dict[str, Any]", record)


def event(run: Path, name: str, **fields: Any) -> None:
    """Appends to events.jsonl: when, what, and what belongs to it."""
    append_line(run / "events.jsonl", {"time": round(time.time(), 3), "event": name, **fields})


class Told(Protocol):
    """Somebody else who is told the figures."""

    def log(self, record: Mapping[str, Any], step: int) -> None: ...

    def close(self) -> None: ...


class Journal:
    """Metrics of a run, written by rank 0 alone."""

    def __init__(self, run: Path, step: int, *, tensorboard: bool, trackers: Told | None = None) -> None:
        """`step`: the last step that is kept; later lines are moved to logs/superseded.jsonl."""
        self.run = run
        self._trackers = trackers
        self._metrics = run / "metrics.jsonl"
        self._board: Any = None
        trim_torn_line(run / "events.jsonl")
        supersede(self._metrics, step, run / "logs" / "superseded.jsonl")
        supersede(run / SAMPLES, step, run / "logs" / "superseded-samples.jsonl")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # 0.6 s, only where it is wanted

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def metrics(self, record: Mapping[str, Any]) -> None:
        """One logged step."""
        append_line(self._metrics, record)
        self._draw(record, record["step"])

    def validation(self, figures: Mapping[str, Any], step: int) -> None:
        """What was measured after a step: an event, and curves of their own."""
        event(self.run, "validation", step=step, **figures)
        self._draw({"validation": figures}, step)

    def _draw(self, record: Mapping[str, Any], step: int) -> None:
        if self._trackers is not None:
            self._trackers.log(record, step)
        if self._board is None:
            return
        for name, value in flat(record):
            if isinstance(value, (int, float)) and name != "step" and math.isfinite(value):
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._trackers is not None:
            self._trackers.close()


def flat(record: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """The record's values with their names, those of objects in it as `outer/inner`."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from flat(cast("dict[str, Any]", value), f"{where}{name}/")
        else:
            yield f"{where}{name}", value


class SkipLog:
    """logs/skipped-records.jsonl: each (source, epoch, document) that was skipped, once."""

    def __init__(self, run: Path) -> None:
        self._path = run / "logs" / "skipped-records.jsonl"
        self._known = {(r["source"], r["epoch"], r["document_id"]) for r in read_lines(self._path)}

    def write(self, skips: Iterable[Skip]) -> None:
        for skip in skips:
            key = (skip.source, skip.epoch, skip.document_id)
            if key not in self._known:
                self._known.add(key)
                append_line(self._path, skip._asdict())


def trim_torn_line(path: Path) -> None:
    """Removes an unfinished line at a file's end."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole != len(content):
        os.truncate(path, whole)


def supersede(metrics: Path, step: int, superseded: Path) -> None:
    """Rewrites `metrics` without a torn tail and without lines after `step`, which move to `superseded`."""
    if not metrics.exists():
        return
    records = list(read_lines(metrics))
    kept = [r for r in records if r["step"] <= step]
    for record in records:
        if record["step"] > step:
            append_line(superseded, record)
    replace_file(metrics, b"".join(orjson.dumps(r) + b"\n" for r in kept))


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file so that a crash leaves either the old or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Makes renames in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RunLock:
    """One trainer a run directory: RUN/lock is held until `release`, or until the process ends."""

    def __init__(self, run: Path) -> None:
        """Waits up to LOCK_WAIT_SECONDS, then raises CheckpointError naming who holds it."""
        run.mkdir(parents=True, exist_ok=True)
        self._file = (run / "lock").open("a+")
        deadline = time.monotonic() + LOCK_WAIT_SECONDS
        while not self._try():
            if time.monotonic() > deadline:
                self._file.seek(0)
                holder = self._file.read().strip() or "unknown"
                self.release()
                raise CheckpointError(
                    f"{run}: another trainer holds this run: {holder}; wait for it or stop it"
                )
            time.sleep(0.1)
        self._file.truncate(0)
        self._file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        self._file.flush()

    def release(self) -> None:
        """Lets others have the run."""
        self._file.close()

    def _try(self) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        return True

"""Exports while a run trains: made of finished checkpoints, in a thread of rank 0.

RUN/exports/step-00005000/   every so often      RUN/export/   at the run's end
"""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from flame.train.config import ExportConfig
from flame.train.journal import event

AT_END = "export"
EXPORTS = "exports"

Write = Callable[[int, Path, Callable[[], None]], None]
"""Exports a step to a folder; calls its last argument between tensors, which raises when it is to give up."""


class Abandoned(Exception):
    """The run stops; what is not written yet will not be."""


class Exporter:
    """Asked for exports by the loop, told of finished checkpoints by the checkpointer. An export that fails
    is an event, and training goes on. On other ranks than 0 it does nothing."""

    def __init__(self, run: Path, config: ExportConfig, write: Write | None) -> None:
        """`write`: on rank 0."""
        self._run, self._config, self._write = run, config, write
        self._lock = threading.Lock()
        self._wanted: set[int] = set()  # steps whose checkpoints are not finished yet
        self._at_work: list[int] = []  # steps whose checkpoints are needed, in the order they are exported
        self._threads: list[threading.Thread] = []
        self._stop = threading.Event()

    def want(self, step: int) -> None:
        """The checkpoint of `step`, which is about to be saved, is to be exported."""
        if self._write is not None:
            with self._lock:
                self._wanted.add(step)

    def committed(self, step: int) -> None:
        """A checkpoint is whole. Called in the checkpointer's thread."""
        with self._lock:
            if step not in self._wanted:
                return
            self._wanted.remove(step)
            self._at_work.append(step)
            before = self._threads[-1] if self._threads else None
            thread = threading.Thread(
                target=self._export, args=(step, before), name=f"export-{step}", daemon=True
            )
            self._threads = [t for t in self._threads if t.is_alive()] + [thread]
            thread.start()

    def lost(self, step: int, why: str) -> None:
        """A checkpoint could not be saved."""
        with self._lock:
            wanted = step in self._wanted
            self._wanted.discard(step)
        if wanted:
            self._failed(step, self._folder(step), why)

    def held(self) -> set[int]:
        """Steps whose checkpoints must stay for now."""
        with self._lock:
            return set(self._at_work)

    def finish(self, step: int) -> None:
        """Waits for what is under way, and exports the run's last step where that is asked for."""
        if self._write is None:
            return
        for thread in list(self._threads):
            thread.join()
        if self._config.at_end:
            self._attempt(step, self._run / AT_END)

    def abandon(self) -> None:
        """Gives up what is under way, with an event for each."""
        self._stop.set()
        for thread in list(self._threads):
            thread.join()

    def _export(self, step: int, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        try:
            if self._attempt(step, self._folder(step)) and self._config.keep is not None:
                for old in exported_steps(self._run)[: -self._config.keep]:
                    shutil.rmtree(self._folder(old), ignore_errors=True)
        finally:
            with self._lock:
                self._at_work.remove(step)

    def _attempt(self, step: int, to: Path) -> bool:
        assert self._write is not None
        began = time.monotonic()
        try:
            self._look_up()
            self._write(step, to, self._look_up)
        except Exception as error:  # whatever it is, the run goes on
            why = str(error) if isinstance(error, Abandoned) else f"{type(error).__name__}: {error}"
            self._failed(step, to, why)
            return False
        event(self._run, "exported", step=step, to=str(to), seconds=round(time.monotonic() - began, 3))
        return True

    def _look_up(self) -> None:
        if self._stop.is_set():
            raise Abandoned("the run was stopped or went back; flame export makes it of its checkpoint")

    def _failed(self, step: int, to: Path, why: str) -> None:
        event(self._run, "export_failed", step=step, to=str(to), why=why)
        print(f"step {step} could not be exported to {to}: {why}", flush=True)

    def _folder(self, step: int) -> Path:
        return self._run / EXPORTS / f"step-{step:08d}"


def exported_steps(run: Path) -> list[int]:
    """The steps in RUN/exports, oldest first."""
    found = (run / EXPORTS).glob("step-*")
    return sorted(int(path.name[5:]) for path in found if path.name[5:].isdigit())


def remove_unfinished(run: Path) -> None:
    """Deletes what exports left behind when their process ended. Only for who holds the run's lock."""
    for folder, name in ((run, re.escape(AT_END)), (run / EXPORTS, r"step-\d+")):
        for path in folder.glob(".*"):
            if re.fullmatch(rf"\.{name}\.(old\.)?\w{{8}}", path.name):
                shutil.rmtree(path, ignore_errors=True)

"""Weights & Biases and MLflow beside a run's own records, through their packages.

Nothing of them is on the way of a step: one thread tells all, and where a tracker fails, training goes on
without it. A run is one run there, too: the ids that they gave it are kept in RUN/trackers.json.
"""

from __future__ import annotations

import math
import os
import queue
import re
import threading
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

import orjson

from flame.errors import RecipeError, without_secrets
from flame.train.config import LoggingConfig
from flame.train.journal import event, flat, read_lines, replace_file

FILE = "trackers.json"
PROJECT = "flame"  # where neither the recipe nor the environment names one
CLOSING_SECONDS = 60.0  # for what is still on its way, at the run's end
PARAMETER_LENGTH = 6000  # MLflow's limit
PARAMETERS = 100  # in one of its requests


class Tracker(Protocol):
    """One service, for one run."""

    @property
    def id(self) -> str: ...

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self, outcome: str) -> None:
        """`outcome`: done, stopped or failed."""
        ...


class WandbTracker:
    """A run of Weights & Biases. WANDB_MODE=offline keeps it in RUN/wandb, for `wandb sync`."""

    def __init__(self, run: Path, known: str | None, project: str | None, config: Mapping[str, Any]) -> None:
        import wandb  # takes a second, and is an extra

        self._run: Any = wandb.init(
            dir=str(run),
            id=known,
            resume="allow",
            name=None if os.environ.get("WANDB_NAME") else run.name,
            project=project or os.environ.get("WANDB_PROJECT") or PROJECT,
            config=dict(config),
            # figures and the recipe, and nothing else of this machine: no code, output, arguments or remotes
            settings=wandb.Settings(
                save_code=False,
                disable_code=True,
                disable_git=True,
                console="off",
                x_disable_meta=True,
                x_save_requirements=False,
                silent=True,
            ),
        )
        self.id = str(self._run.id)
        # steps after a checkpoint come again when a run goes on from it; wandb's own counter cannot go back
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def close(self, outcome: str) -> None:
        self._run.finish(exit_code=1 if outcome == "failed" else 0)


class MlflowTracker:
    """A run of MLflow, at MLFLOW_TRACKING_URI, else in files in RUN/mlflow."""

    def __init__(self, run: Path, known: str | None, project: str | None, config: Mapping[str, Any]) -> None:
        entities = import_module("mlflow.entities")  # takes a second, and is an extra
        self._metric: Any = entities.Metric
        place = os.environ.get("MLFLOW_TRACKING_URI")
        if place is None:
            place = (run / "mlflow").absolute().as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # it would rather have a database
        self._client: Any = import_module("mlflow.tracking").MlflowClient(tracking_uri=place)
        if known is not None:
            self.id = known
            self._client.update_run(known, status="RUNNING")
            return
        name = project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self.id = str(self._client.create_run(number, run_name=run.name).info.run_id)
        settings = [entities.Param(key, str(value)[:PARAMETER_LENGTH]) for key, value in flat(config)]
        for first in range(0, len(settings), PARAMETERS):
            self._client.log_batch(self.id, params=settings[first : first + PARAMETERS])

    def log(self, values: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        named = [self._metric(re.sub(r"[^\w\-. /:]", "_", n), v, now, step) for n, v in values.items()]
        self._client.log_batch(self.id, metrics=named)

    def close(self, outcome: str) -> None:
        status = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[outcome]
        self._client.set_terminated(self.id, status)


CLASSES: dict[str, type[WandbTracker | MlflowTracker]] = {"wandb": WandbTracker, "mlflow": MlflowTracker}


class Trackers:
    """The trackers of a run, on rank 0."""

    def __init__(self, run: Path, logging: LoggingConfig, recipe: Mapping[str, Any], *, new: bool) -> None:
        """`recipe`: as tables; `new`: no checkpoint to go on from. Raises RecipeError where a tracker cannot
        be begun; a run that goes on does so without it."""
        self._run = run
        ids = read_ids(run)
        config = cast("dict[str, Any]", without_secrets(recipe))
        self._trackers: dict[str, Tracker] = {}
        for name in logging.trackers:
            try:
                self._trackers[name] = CLASSES[name](run, ids.get(name), logging.project, config)
            except Exception as error:  # theirs, of many kinds
                if new:
                    raise RecipeError(
                        f"logging.trackers: {name} cannot be begun: {described(error)}; see "
                        "docs/trackers.md, or leave it out"
                    ) from error
                self._failed(name, error)
        ids |= {name: tracker.id for name, tracker in self._trackers.items()}
        if ids:
            replace_file(run / FILE, orjson.dumps(ids, option=orjson.OPT_INDENT_2))
        self._told: queue.SimpleQueue[tuple[dict[str, float], int] | str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._tell, name="trackers", daemon=True)
        if self._trackers:
            self._thread.start()

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """The finite numbers of a record, those of tables in it as `outer/inner`. Returns at once."""
        if self._trackers:
            self._told.put((finite(record), step))

    def close(self) -> None:
        """Waits CLOSING_SECONDS at most for what is on its way."""
        if not self._thread.is_alive():
            return
        self._told.put(outcome(self._run))
        self._thread.join(CLOSING_SECONDS)
        if self._thread.is_alive():
            why = f"did not finish within {CLOSING_SECONDS:.0f} s; what it has not sent is missing there"
            event(self._run, "tracker_failed", trackers=list(self._trackers), why=why)

    def _tell(self) -> None:
        while True:
            told = self._told.get()
            for name, tracker in list(self._trackers.items()):
                try:
                    tracker.close(told) if isinstance(told, str) else tracker.log(*told)
                except Exception as error:
                    self._failed(name, error)
                    del self._trackers[name]
            if isinstance(told, str):
                return

    def _failed(self, name: str, error: Exception) -> None:
        event(self._run, "tracker_failed", trackers=[name], why=described(error))


def read_ids(run: Path) -> dict[str, str]:
    """What each tracker calls this run."""
    path = run / FILE
    return orjson.loads(path.read_bytes()) if path.exists() else {}


def finite(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a record by name, without its step."""
    return {
        name: float(value)
        for name, value in flat(record)
        if isinstance(value, (int, float)) and name != "step" and math.isfinite(value)
    }


def outcome(run: Path) -> str:
    """How a run that ends now ends, from its last event."""
    last = ""
    for record in read_lines(run / "events.jsonl"):
        last = str(record.get("event"))
    return "done" if last == "done" else "stopped" if last in ("signal", "checkpoint_saved") else "failed"


def described(error: Exception) -> str:
    """An error in a line, without the secrets that a URL in it may hold."""
    lines = str(error).strip().splitlines()
    return str(without_secrets(f"{type(error).__name__}: {lines[0] if lines else ''}"))

"""What a run directory says of itself, as typed records."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import orjson

from flame.errors import DataError, without_secrets
from flame.recipe import FILE, Recipe, run_recipe
from flame.train.journal import SAMPLES, read_lines

NAN = math.nan


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A line of metrics.jsonl. Numbers that were not finite, or not known, are NaN."""

    step: int  # counts from 1
    tokens: int  # since the run began
    loss: float  # per predicted token
    grad_norm: float
    learning_rate: float
    tokens_per_second: float
    mfu: float  # 0 to 1
    step_seconds: float  # mean over the steps since the line before
    data_seconds: float  # of these, waiting for data
    memory_gib: float
    records_skipped: int  # since the run began
    updates_skipped: int  # since the run began
    sources: dict[str, dict[str, int]]  # by name: tokens, documents, epoch, skipped, cut since the run began

    @staticmethod
    def of(line: dict[str, Any]) -> StepRecord:
        def number(key: str) -> float:
            value = line.get(key)
            return NAN if value is None else float(value)

        return StepRecord(
            step=int(line["step"]),
            tokens=int(line.get("tokens") or 0),
            loss=number("loss"),
            grad_norm=number("grad_norm"),
            learning_rate=number("learning_rate"),
            tokens_per_second=number("tokens_per_second"),
            mfu=number("mfu"),
            step_seconds=number("step_seconds"),
            data_seconds=number("data_seconds"),
            memory_gib=number("memory_gib"),
            records_skipped=int(line.get("records_skipped") or 0),
            updates_skipped=int(line.get("updates_skipped") or 0),
            sources=line.get("sources") or {},
        )


@dataclass(frozen=True, slots=True)
class Event:
    """A line of events.jsonl."""

    time: float  # seconds since the epoch
    name: str
    fields: dict[str, Any]  # what else the line says

    @staticmethod
    def of(line: dict[str, Any]) -> Event:
        fields = {key: value for key, value in line.items() if key not in ("time", "event")}
        return Event(float(line["time"]), str(line["event"]), fields)

    @property
    def step(self) -> int | None:
        """The step that the line itself names."""
        value = self.fields.get("step")
        return value if isinstance(value, int) else None


def validations(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The validations that count, by step: of lines of events.jsonl. What was measured after a step that a
    resume left out does not count, and of a step that was validated twice the last one does."""
    found: dict[int, dict[str, Any]] = {}
    for line in lines:
        if line["event"] in ("start", "resume"):
            kept = line.get("step") or 0
            found = {step: one for step, one in found.items() if step <= kept}
        elif line["event"] == "validation":
            found[line["step"]] = dict(line)
    return [found[step] for step in sorted(found)]


@dataclass(frozen=True, slots=True)
class History:
    """All that the report reads."""

    run: Path
    recipe: Recipe
    recipe_text: str
    environment: dict[str, Any]  # empty where it is not written yet
    steps: list[StepRecord]  # those that count, ascending
    superseded: list[StepRecord]  # trained, then lost to an interruption; in the order they were moved
    events: list[Event]  # in the order they were written
    validations: list[dict[str, Any]]  # of these, those that count, by step
    samples: list[dict[str, Any]]  # lines of samples.jsonl: step, prompt, text


def read_history(run: Path) -> History:
    """Reads a run directory. Raises RecipeError where there is no run, CheckpointError or
    DataError for a broken file."""
    recipe = run_recipe(run)
    steps = [StepRecord.of(line) for line in read_lines(run / "metrics.jsonl")]
    events = list(read_lines(run / "events.jsonl"))
    return History(
        run=run,
        recipe=recipe,
        recipe_text=without_secrets((run / FILE).read_text(encoding="utf-8")),
        environment=_object(run / "environment.json"),
        steps=sorted(steps, key=lambda record: record.step),
        superseded=[StepRecord.of(line) for line in read_lines(run / "logs" / "superseded.jsonl")],
        events=[Event.of(line) for line in events],
        validations=validations(events),
        samples=list(read_lines(run / SAMPLES)),
    )


def _object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return cast("dict[str, Any]", orjson.loads(path.read_bytes()))
    except orjson.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON ({error}); remove it, or restore the file") from None

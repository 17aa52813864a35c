"""A run's checkpoints as directories: which there are, which stay, and which are deleted."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import orjson

from flame.schema import Duration

MANIFEST = "manifest.json"
STEPS_BACK = 15  # where step s was bad, the rows of steps s - 15 to s are skipped


def step_directory(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def saved_steps(run: Path) -> list[int]:
    """The steps of a run's checkpoints, oldest first; whether they are sound is not asked."""
    found = (run / "checkpoints").glob(f"step-*/{MANIFEST}")
    return sorted(int(p.parent.name[5:]) for p in found if p.parent.name[5:].isdigit())


def read_record(run: Path, step: int, name: str) -> dict[str, Any]:
    """One of a checkpoint's JSON files."""
    return cast("dict[str, Any]", orjson.loads((step_directory(run, step) / name).read_bytes()))


def kept(steps: list[int], keep: int, tokens: dict[int, int], every: Duration | None) -> set[int]:
    """Of a run's saved `steps`, ascending, those that stay.

    The `keep` newest; those, one or two, that leave any rollback to come one to go on from; and the first
    at or past each multiple of `every`. `tokens`: trained by each step, where `every` counts tokens.
    """
    if not steps:
        return set()
    stay = set(steps[-max(1, keep) :])
    anchors = [steps[0]]  # far apart: the last of them, or the one before, is old enough for any rollback
    for step in steps:
        if step >= anchors[-1] + STEPS_BACK:
            anchors.append(step)
    stay |= set(anchors[-1:] if anchors[-1] <= steps[-1] - STEPS_BACK else anchors[-2:])
    if every is not None:
        before = 0
        for step in steps:
            reached = step if every.unit == "steps" else tokens.get(step, 0)
            if reached // every.amount > before // every.amount:
                stay.add(step)
            before = reached
    return stay


def prune(run: Path, keep: int, every: Duration | None = None, *, spare: Collection[int] = ()) -> list[int]:
    """Deletes the checkpoints that do not stay, but for the steps `spare`, and those that a newer one of the
    same step replaced; the steps deleted."""
    steps = saved_steps(run)
    tokens = {step: _tokens(run, step) for step in steps} if every and every.unit == "tokens" else {}
    stay = kept(steps, keep, tokens, every) | set(spare)
    gone: list[int] = []
    for step in steps:
        if step not in stay:
            _delete(step_directory(run, step))
            gone.append(step)
    for leftover in (run / "checkpoints").glob("step-*.replaced-*"):
        shutil.rmtree(leftover)
    return gone


def _tokens(run: Path, step: int) -> int:
    try:
        return int(read_record(run, step, "train.json")["tokens"])
    except (OSError, orjson.JSONDecodeError, KeyError):
        return 0


def _delete(path: Path) -> None:
    """It loses its name first: a crash in between leaves no checkpoint that seems whole."""
    going = path.with_name(f"{path.name}.partial")
    path.rename(going)
    shutil.rmtree(going)


def remove_leftovers(run: Path) -> None:
    """Deletes saves that never got their manifest. Only for who holds the run's lock."""
    for partial in (run / "checkpoints").glob("step-*.partial"):
        shutil.rmtree(partial)

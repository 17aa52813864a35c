"""Supervised runs for tests: supervisor and ranks forked from one process that has all imported."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distributed.ranks import CONTEXT

from flame import schema
from flame.recipe import Recipe, read_recipe
from flame.train.journal import read_lines


def supervised(recipe: Path, ranks: int, work: Callable[..., int], *extra: Any) -> Any:
    """Begins to train a recipe under a supervisor; `work(stop, text, *extra)` is what each rank runs."""
    process = CONTEXT.Process(target=_supervise, args=(read_recipe(recipe), ranks, work, extra))
    process.start()
    return process


def _supervise(recipe: Recipe, ranks: int, work: Callable[..., int], extra: tuple[Any, ...]) -> None:
    from flame.commands.train import WARM, WARM_WITHOUT_GPU, warm_parent
    from flame.train import recovery

    os.environ["OMP_NUM_THREADS"] = "1"
    recipe.directory.mkdir(parents=True, exist_ok=True)
    output = os.open(recipe.directory / "said", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    warm_parent((*WARM, *WARM_WITHOUT_GPU))
    code = recovery.supervise(
        work,
        (schema.to_toml(recipe), *extra),
        run=recipe.directory,
        ranks=ranks,
        max_restarts=recipe.run.max_restarts,
        config=recipe.recovery,
    )
    sys.exit(code)


def ended(process: Any, timeout: float = 90) -> int | None:
    """The exit code of a supervised run; None where it had to be killed."""
    process.join(timeout)
    code = process.exitcode
    if code is None:
        os.kill(process.pid, signal.SIGKILL)
    return code


def work(stop: Callable[[], bool], text: str) -> int:
    """What `flame train` gives its ranks to do."""
    from flame.run import work

    return work(stop, text)


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [e for e in read_lines(run / "events.jsonl") if e["event"] == name]


def said(run: Path) -> str:
    """What a supervised run printed."""
    return (run / "said").read_text()

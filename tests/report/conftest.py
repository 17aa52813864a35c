"""A recorded run: a rank is lost, a signal comes, the run goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from report.recorded_run import RunWriter


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[[str], RunWriter]:
    return lambda name: RunWriter(tmp_path / name)


@pytest.fixture
def interrupted(new_run: Callable[[str], RunWriter]) -> Path:
    """Starts in 2 s; steps 1 to 6, saved at 4; lost, 5 and 6 again; a signal after 8; 9 to 12."""
    run = new_run("interrupted")
    run.environment()
    for step in range(1, 13):
        run.step(step)
    run.superseded(5, 6)
    run.event(0, "start", step=0, ranks=2, host="here", pids=[11, 12])
    run.saved(2 + 4 + 0.75, 4)
    run.event(9, "rank_lost", rank=1, pid=12, how="SIGKILL")
    run.event(10, "restart", attempt=1, pids=[21, 22])
    run.event(11, "resume", step=4, ranks=2, host="here", pids=[21, 22])
    run.event(15, "signal", signal="SIGTERM")
    run.saved(12 + 4 + 0.75, 8)
    run.event(30, "resume", step=8, ranks=2, host="here", pids=[31, 32])
    run.saved(31 + 4 + 0.75, 12)
    run.event(36, "done", step=12, tokens=36864)
    return run.path

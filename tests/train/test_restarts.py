"""What a supervisor makes of heartbeats, stacks and crashes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from flame.train import heartbeat, restarts, watchdog
from flame.train.config import RecoveryConfig
from flame.train.heartbeat import Beat, Heart
from flame.train.recovery import in_a_line
from flame.train.restarts import Budget, Recovery
from flame.train.watchdog import Watchdog, behind, heart_file, make_files

WAITING = """Thread 0x1 (most recent call first):
  File "/lib/threading.py", line 3 in wait

Current thread 0x2 (most recent call first):
  File "/site-packages/torch/distributed/distributed_c10d.py", line 3 in all_reduce
  File "/src/flame/train/shards.py", line 9 in gradient_norm
"""
WORKING = WAITING.replace("torch/distributed/distributed_c10d.py", "model.py")


def beat(phase: str = "computing", step: int = 7, since: float = 0.0, median: float = 0.1, **more) -> Beat:
    return Beat(phase, step, since, median, more.get("finished", 5), more.get("stamps", {}))


def test_the_rank_behind_is_the_stopped_one_else_the_least_advanced_else_the_one_that_does_not_wait() -> None:
    there = {0: "S", 1: "S", 2: "S"}
    stacks = {0: WAITING, 1: WAITING, 2: WAITING}
    beats = {0: beat("agreeing", 8), 1: beat("data", 8), 2: beat("agreeing", 8)}
    assert behind(beats, there, stacks) == 1
    assert behind(beats, there | {2: "T"}, stacks) == 2
    beats = {0: beat("writing", 8), 1: beat("data", 8), 2: beat("computing", 7)}
    assert behind(beats, there, stacks) == 2
    del beats[2]
    assert behind(beats, there, stacks) == 1, (
        "the figures of step 7 are written after the rows of step 8 are there"
    )
    beats = {0: beat(), 1: beat(), 2: beat()}
    assert behind(beats, there, stacks | {2: WORKING}) == 2
    assert behind(beats | {1: beat(step=6)}, there, stacks | {2: WORKING}) == 1


@pytest.fixture
def hearts(tmp_path: Path) -> list[Heart]:
    make_files(tmp_path, 2)
    return [Heart(heart_file(tmp_path, rank)) for rank in range(2)]


def limit(tmp_path: Path, config: RecoveryConfig) -> float:
    """After how many seconds two ranks count as hanging."""
    dog = Watchdog(config, tmp_path, {0: 10**9, 1: 10**9})
    return max(dog._limit(b) for b in dog.beats().values())


def test_each_phase_has_its_limit_and_one_rank_that_may_wait_speaks_for_all(hearts, tmp_path: Path) -> None:
    config = RecoveryConfig(hang_seconds=2, start_seconds=900, save_seconds=70, validation_seconds=80)
    assert limit(tmp_path, config) == 900
    for heart in hearts:
        heart.finish()
        heart.enter("agreeing", 2)
    assert limit(tmp_path, config) == 2
    hearts[0]._numbers[heartbeat._MEDIAN] = 0.5
    assert limit(tmp_path, config) == 5, "ten times the median"
    hearts[1].enter("saving", 2)
    assert limit(tmp_path, config) == 70
    hearts[0].enter("validating", 2)
    assert limit(tmp_path, config) == 80


def test_the_time_of_a_long_phase_is_not_counted_against_the_next_step(hearts, tmp_path: Path) -> None:
    hearts[0].finish()
    hearts[0].enter("saving", 1)
    time.sleep(0.05)
    hearts[0].enter("writing", 1)
    found = heartbeat.read(heart_file(tmp_path, 0))
    assert found is not None
    assert time.monotonic() - found.since < 0.04
    assert (found.phase, found.step, found.finished) == ("writing", 1, 1)


def test_a_machine_that_stood_still_is_no_hang(
    hearts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for heart in hearts:
        heart.finish()
        heart.enter("agreeing", 2)
    dog = Watchdog(RecoveryConfig(hang_seconds=20), tmp_path, {0: 10**9, 1: 10**9})
    stood_still = time.monotonic() + 3600
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: stood_still)
    assert dog.look(lambda: tmp_path / "stacks") is None
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: stood_still + 4)
    assert dog.look(lambda: tmp_path / "stacks") is None


def test_crashes_end_a_run_when_they_lead_nowhere_or_come_too_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(restarts.time, "monotonic", lambda: now[0])
    budget = Budget(most=2, window_seconds=100)
    assert [budget.crash(step) for step in (5, 9)] == [True, True]
    assert budget.pause_seconds == 0
    assert not budget.crash(14), "a third one in the window"
    now[0] = 150.0
    assert budget.crash(20)
    budget = Budget(most=100, window_seconds=100)
    assert budget.crash(5)
    assert budget.crash(5)
    assert budget.pause_seconds == 1
    assert not budget.crash(5), "three in a row without a new step"


def test_the_parts_of_a_recovery_are_those_of_its_last_rank() -> None:
    recovery = Recovery(step=7, attempt=1, detected=10.0, detect_seconds=0.1, stopped=10.5)
    stamps = {"up": 11.0, "loaded": 12.0, "rows": 12.25, "stepped": 13.0}
    later = stamps | {"loaded": 12.5, "rows": 12.6}
    parts = recovery.parts([beat(stamps=stamps), beat(stamps=later)])
    expected = {"detect": 0.1, "stop": 0.5, "start": 0.5, "load": 1.5, "data": 0.1, "first_step": 0.4}
    assert parts == pytest.approx(expected)
    assert list(recovery.parts([beat(stamps=stamps), beat(stamps={"up": 11.0})])) == [
        "detect",
        "stop",
        "start",
    ]


def test_an_error_is_told_in_a_line_with_what_it_came_from() -> None:
    error = RuntimeError("\n    [Stage 0] failed to run forward:\n    args: ()\n")
    error.__cause__ = IndexError("list index out of range")
    assert in_a_line(error) == (
        "RuntimeError: [Stage 0] failed to run forward: (from IndexError: list index out of range)"
    )
    assert in_a_line(MemoryError()) == "MemoryError"

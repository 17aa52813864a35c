"""What a run directory says is read as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from report.recorded_run import RunWriter

from flame.commands.status import status
from flame.errors import CheckpointError, RecipeError
from flame.report.attempts import attempts_of, marks_of
from flame.report.history import read_history
from flame.report.timeline import timeline_of

New = Callable[[str], RunWriter]


def test_null_is_read_as_nan(new_run: New) -> None:
    run = new_run("nulls")
    run.step(1, loss=None)
    (record,) = read_history(run.path).steps
    assert math.isnan(record.loss) and math.isnan(record.mfu)


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no run here"):
        read_history(tmp_path)


def test_a_broken_line_is_refused_with_the_file(new_run: New) -> None:
    run = new_run("broken")
    (run.path / "metrics.jsonl").write_text("{nonsense\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: line 1 is no JSON"):
        read_history(run.path)


def test_each_attempt_has_the_steps_it_trained(interrupted: Path) -> None:
    attempts = attempts_of(read_history(interrupted))
    assert [a.ending for a in attempts] == ["lost", "stopped", "done"]
    assert [[r.step for r in a.kept] for a in attempts] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    assert [[r.step for r in a.lost] for a in attempts] == [[5, 6], [], []]


def test_interruptions_are_marked_at_the_step_they_came_at(interrupted: Path) -> None:
    history = read_history(interrupted)
    marks = [(m.step, m.name) for m in marks_of(history, attempts_of(history))]
    assert marks == [(4, "restart"), (4, "resume"), (6, "rank_lost"), (8, "signal"), (8, "resume")]


def test_superseded_steps_belong_to_the_crash_that_lost_them(new_run: New) -> None:
    """Crashes after 5 (back to 4), after 8 (back to 8: nothing lost) and after 11 (back to 10)."""
    run = new_run("three crashes")
    for step in range(1, 13):
        run.step(step)
    run.superseded(5, 5)
    run.superseded(11, 11)
    run.event(0, "start", step=0)
    for index, step in enumerate((4, 8, 10)):
        run.event(10 + 10 * index, "rank_lost", rank=0)
        run.event(11 + 10 * index, "resume", step=step)
    history = read_history(run.path)
    attempts = attempts_of(history)
    assert [[r.step for r in a.lost] for a in attempts] == [[5], [], [11], []]
    assert [m.step for m in marks_of(history, attempts) if m.name == "rank_lost"] == [5, 8, 11]


def test_the_timeline_accounts_for_every_second(interrupted: Path) -> None:
    timeline = timeline_of(attempts_of(read_history(interrupted)))
    assert timeline.wall_seconds == pytest.approx(36)
    assert all(a.end == b.begin for a, b in zip(timeline.spans, timeline.spans[1:], strict=False))
    found = {kind: timeline.total(kind) for kind in ("starting", "lost", "recovery", "stopped")}
    assert found["starting"] == pytest.approx(2 + 1 + 1)
    assert found["lost"] == pytest.approx(2 - 0.25)  # the pause for the checkpoint of step 4 is saving
    assert found["recovery"] == pytest.approx(11 - 8)
    assert found["stopped"] == pytest.approx(30 - 16.75)
    assert timeline.total("training") == pytest.approx(12)
    assert timeline.goodput == pytest.approx(12 / (36 - 13.25))


def test_steps_between_logged_ones_count_as_time(new_run: New) -> None:
    run = new_run("every fifth")
    for step in (1, 5, 10):
        run.step(step)
    run.event(0, "start", step=0)
    run.event(12, "done", step=10)
    timeline = timeline_of(attempts_of(read_history(run.path)))
    assert timeline.total("training") == pytest.approx(10)
    assert timeline.total("starting") == pytest.approx(2)


def test_status_says_where_the_time_went(interrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(str(interrupted)) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "goodput" in x]
    assert "52.7 % of 23 s" in line  # 12 of 22.75 s
    assert "starting 17.6 %" in line
    assert "recovery 13.2 %" in line
    assert "recomputed 7.7 %" in line


def test_validations_are_time_of_their_own(new_run: New) -> None:
    """Steps of a second from 2 on, and three seconds of validation after the second and the last."""
    run = new_run("validated")
    for step in range(1, 5):
        run.step(step)
    run.event(0, "start", step=0)
    for after, step in ((7, 2), (12, 4)):
        run.event(after, "validation", step=step, seconds=3.0)
    run.saved(12.75, 4)
    run.event(13, "done", step=4)
    timeline = timeline_of(attempts_of(read_history(run.path)))
    found = {kind: timeline.total(kind) for kind in ("starting", "training", "validating", "saving")}
    assert found == pytest.approx({"starting": 2, "training": 4, "validating": 6, "saving": 1})
    spans = [(span.kind, span.begin) for span in timeline.spans]
    assert spans == [
        ("starting", 0),
        ("training", pytest.approx(2)),
        ("validating", pytest.approx(4)),
        ("training", pytest.approx(7)),
        ("validating", pytest.approx(9)),
        ("saving", pytest.approx(12)),
    ]
    assert timeline.goodput == pytest.approx(4 / 13)

"""Records on disk survive torn lines and two writers."""

from __future__ import annotations

import json
import multiprocessing
import resource
from pathlib import Path

import pytest

from flame.batch import Skip
from flame.errors import CheckpointError
from flame.train import journal
from flame.train.journal import Journal, RunLock, SkipLog, append_line, flat, read_lines


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    append_line(tmp_path / "a.jsonl", {"loss": float("nan"), "norm": float("inf"), "step": 1})
    assert list(read_lines(tmp_path / "a.jsonl")) == [{"loss": None, "norm": None, "step": 1}]


def test_a_torn_line_is_passed_over_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event": "start"}\n{"event": "che')
    assert list(read_lines(path)) == [{"event": "start"}]
    journal.trim_torn_line(path)
    assert path.read_bytes() == b'{"event": "start"}\n'


def test_a_resume_sets_later_steps_aside(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in range(1, 8)) + '{"st')
    Journal(tmp_path, 5, tensorboard=False).metrics({"step": 6, "loss": 2.0})
    assert [r["step"] for r in read_lines(metrics)] == [1, 2, 3, 4, 5, 6]
    assert list(read_lines(metrics))[-1]["loss"] == 2.0
    assert [r["step"] for r in read_lines(tmp_path / "logs" / "superseded.jsonl")] == [6, 7]


def test_each_skipped_record_is_named_once_also_after_a_restart(tmp_path: Path) -> None:
    skip = Skip("web", 0, "a.jsonl:17", "/data/a.jsonl", "line 3", "not JSON")
    SkipLog(tmp_path).write([skip, skip])
    SkipLog(tmp_path).write([skip, skip._replace(epoch=1)])
    written = list(read_lines(tmp_path / "logs" / "skipped-records.jsonl"))
    assert [(r["document_id"], r["epoch"]) for r in written] == [("a.jsonl:17", 0), ("a.jsonl:17", 1)]


def hold(path: Path, ready: object, release: object) -> None:
    lock = RunLock(path)
    ready.set()  # type: ignore[attr-defined]
    release.wait()  # type: ignore[attr-defined]
    lock.release()


def test_a_second_trainer_waits_and_is_refused_with_the_first_ones_pid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context("forkserver")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path, ready, release))
    holder.start()
    assert ready.wait(60)
    monkeypatch.setattr(journal, "LOCK_WAIT_SECONDS", 0.3)
    with pytest.raises(CheckpointError, match=f'"pid": {holder.pid}'):
        RunLock(tmp_path)
    release.set()
    holder.join()
    RunLock(tmp_path).release()


def test_a_replaced_file_is_old_or_new_never_half(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    journal.replace_file(path, b"old")
    journal.replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_objects_in_a_record_are_flattened_for_tensorboard() -> None:
    record = {"step": 1, "sources": {"web": {"tokens": 2}, "code": {"tokens": 3}}}
    assert list(flat(record)) == [("step", 1), ("sources/web/tokens", 2), ("sources/code/tokens", 3)]


def test_lines_that_a_full_disk_does_not_take_come_later_and_none_is_torn(tmp_path: Path) -> None:
    path, most = tmp_path / "metrics.jsonl", 200
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
        for step in range(20):
            append_line(path, {"step": step, "filling": "x" * 20})
        assert path.read_bytes().endswith(b"\n")
        assert 0 < len(list(read_lines(path))) < 20
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    append_line(path, {"step": 20})
    assert [line["step"] for line in read_lines(path)] == list(range(21))

"""Trackers: one run there for one run here, only figures, no secrets, and never in the way of a step."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.commands import train as train_command
from flame.errors import RecipeError, without_secrets
from flame.recipe import read_recipe
from flame.train import config, trackers
from flame.train.config import LoggingConfig
from flame.train.journal import Journal, append_line, event, read_lines
from flame.train.keeping import saved_steps, step_directory
from flame.train.lifeline import StopFlag
from flame.train.trackers import Trackers

KEY = "0123456789abcdef0123456789abcdef01234567"  # of the form that wandb's have
SITE = os.environ.get("FLAME_MLFLOW")  # a folder of packages with MLflow, where this environment has none


class Recorded:
    """A tracker that remembers, and fails or waits where it is told to."""

    made: list[Recorded]
    fails_at: int | None = None
    fails_to_begin = False
    closes_in = 0.0

    def __init__(self, run: Path, known: str | None, project: str | None, recipe: Any) -> None:
        if type(self).fails_to_begin:
            raise ConnectionError("https://user:pass@host/api?token=abc cannot be reached\nmore")
        self.id = known or "made-here"
        self.told: list[tuple[dict[str, float], int]] = []
        self.recipe, self.project = recipe, project
        self.closed: str | None = None
        type(self).made.append(self)

    def log(self, values: dict[str, float], step: int) -> None:
        if step == type(self).fails_at:
            raise OSError("gone")
        self.told.append((values, step))

    def close(self, outcome: str) -> None:
        time.sleep(type(self).closes_in)
        self.closed = outcome


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[Recorded]:
    """Takes wandb's place."""
    kind = type("Fresh", (Recorded,), {"made": []})
    monkeypatch.setitem(trackers.CLASSES, "wandb", kind)
    return kind


def begin(run: Path, *, new: bool = True, **recipe: Any) -> Trackers:
    return Trackers(run, LoggingConfig(trackers=["wandb"], project="p"), recipe, new=new)


def events(run: Path) -> list[dict[str, Any]]:
    return list(read_lines(run / "events.jsonl"))


def test_finite_numbers_of_metrics_and_validation_are_told_with_their_step(
    tmp_path: Path, recorded: type[Recorded]
) -> None:
    journal = Journal(tmp_path, 0, tensorboard=False, trackers=begin(tmp_path))
    journal.metrics({"step": 1, "loss": 2.5, "grad_norm": float("nan"), "rows_digest": "ab"})
    journal.metrics({"step": 2, "loss": 2.0, "sources": {"web": {"loss": 1.0}}})
    journal.validation({"loss": 3.0}, 2)
    event(tmp_path, "done", step=2)
    journal.close()
    (made,) = recorded.made
    assert made.told == [
        ({"loss": 2.5}, 1),
        ({"loss": 2.0, "sources/web/loss": 1.0}, 2),
        ({"validation/loss": 3.0}, 2),
    ]
    assert (made.closed, made.project) == ("done", "p")


def test_a_run_that_goes_on_is_the_same_run_there(tmp_path: Path, recorded: type[Recorded]) -> None:
    begin(tmp_path).close()
    assert orjson.loads((tmp_path / trackers.FILE).read_bytes()) == {"wandb": "made-here"}
    (tmp_path / trackers.FILE).write_text('{"wandb": "kept", "mlflow": "other"}')
    begin(tmp_path, new=False).close()
    assert [made.id for made in recorded.made] == ["made-here", "kept"]
    assert orjson.loads((tmp_path / trackers.FILE).read_bytes()) == {"wandb": "kept", "mlflow": "other"}


def test_a_tracker_that_fails_is_an_event_and_training_goes_on(
    tmp_path: Path, recorded: type[Recorded]
) -> None:
    recorded.fails_at = 2
    told = begin(tmp_path)
    for step in (1, 2, 3):
        told.log({"step": step, "loss": 1.0}, step)
    told.close()
    assert [step for _, step in recorded.made[0].told] == [1]
    (failed,) = events(tmp_path)
    assert (failed["event"], failed["why"]) == ("tracker_failed", "OSError: gone")


def test_a_tracker_that_cannot_be_begun_stops_a_new_run_alone(
    tmp_path: Path, recorded: type[Recorded]
) -> None:
    recorded.fails_to_begin = True
    with pytest.raises(RecipeError, match="wandb cannot be begun: ConnectionError") as error:
        begin(tmp_path)
    begin(tmp_path, new=False).close()
    (failed,) = events(tmp_path)
    for text in (str(error.value), failed["why"]):
        assert "pass" not in text
        assert "abc" not in text


def test_logging_never_waits_and_closing_not_for_ever(
    tmp_path: Path, recorded: type[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "CLOSING_SECONDS", 0.1)
    recorded.closes_in = 2.0
    told = begin(tmp_path)
    began = time.monotonic()
    told.log({"loss": 1.0}, 1)
    told.close()
    assert time.monotonic() - began < 1.5
    assert "did not finish" in events(tmp_path)[-1]["why"]


@pytest.mark.parametrize(
    ("last", "outcome"),
    [("done", "done"), ("signal", "stopped"), ("checkpoint_saved", "stopped"), ("start", "failed")],
)
def test_how_a_run_ended_is_told(tmp_path: Path, recorded: type[Recorded], last: str, outcome: str) -> None:
    event(tmp_path, last)
    begin(tmp_path).close()
    assert recorded.made[0].closed == outcome


def test_a_missing_package_is_named_before_anything_starts(
    write_recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    recipe = read_recipe(write_recipe(), {"logging.trackers": '["mlflow"]'})
    with pytest.raises(RecipeError, match=r'pip install "flame\[mlflow\]"'):
        train_command.start(recipe, 1, StopFlag())
    with pytest.raises(RecipeError, match="expected a list of wandb, mlflow"):
        read_recipe(write_recipe(), {"logging.trackers": "wandbb"})


def test_secrets_in_urls_do_not_reach_a_tracker(tmp_path: Path, recorded: type[Recorded]) -> None:
    files = ["https://me:hunter2@host/a.jsonl?X-Signature=s3cret", "s3://bucket/a b/*.parquet", "data/?.txt"]
    begin(tmp_path, data={"sources": [{"files": files}]}).close()
    told = recorded.made[0].recipe
    assert "hunter2" not in json.dumps(told)
    assert "s3cret" not in json.dumps(told)
    assert told["data"]["sources"][0]["files"] == [
        "https://***@host/a.jsonl?***",
        "s3://bucket/a b/*.parquet",
        "data/?.txt",
    ]


secret = st.text("abcXYZ0123456789", min_size=8, max_size=20).map(lambda text: f"S{text}S")


@given(secret, secret, st.sampled_from(["https", "s3", "hf", "gs"]))
def test_no_url_keeps_its_credentials(user: str, token: str, scheme: str) -> None:
    url = f"{scheme}://{user}:{token}@host.example/data/a.parquet?sig={token}&x=1"
    for nested in (url, [url], {"a": {"b": (url,)}}, f"OSError: {url} is gone"):
        assert user not in str(without_secrets(nested))
        assert token not in str(without_secrets(nested))


# ------------------------------------------------------------------------------- the real ones


def flame_train(recipe: Path, *flags: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flame", "train", str(recipe), "--nproc", "1", *flags],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def trained_twice(recipe: Path, run: Path, **environment: str) -> None:
    """Six steps; then, from the checkpoint after the fourth, on to the ninth."""
    flame_train(recipe, "--run.steps", "6", **environment)
    shutil.rmtree(step_directory(run, saved_steps(run)[-1]))
    assert saved_steps(run) == [4]
    flame_train(recipe, "--run.steps", "9", **environment)


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of an offline run: a log of LevelDB's format behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content = path.read_bytes()
    at, pieces = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        pieces += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            record = Record()
            record.ParseFromString(pieces)
            pieces = b""
            yield record


def test_wandb_offline_has_one_run_with_every_step_and_no_secret(write_recipe, tmp_path: Path) -> None:
    recipe, run = write_recipe(steps=6), tmp_path / "run"
    text = recipe.read_text().replace("tensorboard = false", 'tensorboard = false\ntrackers = ["wandb"]')
    recipe.write_text(text)
    trained_twice(recipe, run, WANDB_MODE="offline", WANDB_API_KEY=KEY, WANDB_PROJECT="from-env")
    name = orjson.loads((run / trackers.FILE).read_bytes())["wandb"]
    files = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [file.name for file in files] == [f"run-{name}.wandb"] * 2
    steps: list[list[int]] = []
    for file in files:
        records = list(wandb_records(file))
        begun = next(r.run for r in records if r.WhichOneof("record_type") == "run")
        assert (begun.project, begun.display_name) == ("from-env", "run")
        rows = [
            {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in r.history.item}
            for r in records
            if r.WhichOneof("record_type") == "history"
        ]
        steps.append([int(row["step"]) for row in rows])
        assert all(row["loss"] > 0 for row in rows)
    assert steps == [[1, 2, 3, 4, 5, 6], [5, 6, 7, 8, 9]]
    written = [file for file in run.rglob("*") if file.is_file()]
    assert [file for file in written if KEY.encode() in file.read_bytes()] == []
    assert [e["event"] for e in events(run)].count("tracker_failed") == 0


@pytest.mark.skipif(
    SITE is None and importlib.util.find_spec("mlflow") is None,
    reason="MLflow is not installed: pip install --target FOLDER mlflow-skinny, and FLAME_MLFLOW=FOLDER",
)
def test_mlflow_in_files_has_one_run_with_every_step(write_recipe, tmp_path: Path) -> None:
    recipe, run = write_recipe(steps=6), tmp_path / "run"
    text = recipe.read_text().replace("tensorboard = false", 'tensorboard = false\ntrackers = ["mlflow"]')
    recipe.write_text(text)
    path = os.pathsep.join(part for part in (os.environ.get("PYTHONPATH"), SITE) if part)
    trained_twice(recipe, run, PYTHONPATH=path, MLFLOW_EXPERIMENT_NAME="trials")
    name = orjson.loads((run / trackers.FILE).read_bytes())["mlflow"]
    (folder,) = [path for path in (run / "mlflow").glob("*/*") if (path / "params").is_dir()]
    assert folder.name == name
    steps = [int(line.split()[2]) for line in (folder / "metrics" / "loss").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 9]
    assert (folder / "params" / "run" / "steps").read_text() == "6"
    assert "status: 3" in (folder / "meta.yaml").read_text()  # FINISHED
    assert "name: trials" in (folder.parent / "meta.yaml").read_text()
    assert [e["event"] for e in events(run)].count("tracker_failed") == 0


def test_the_last_event_decides_though_a_line_is_torn(tmp_path: Path) -> None:
    append_line(tmp_path / "events.jsonl", {"event": "done"})
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'{"event": "st')
    assert trackers.outcome(tmp_path) == "done"

"""Checkpoints copied to an object store beside training, and fetched where the disk is gone."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import fsspec
import pytest
from distributed.ranks import metrics, train_on, wait_for_step
from distributed.supervised import events

from flame.data import remote
from flame.errors import CheckpointError
from flame.train.keeping import MANIFEST, saved_steps, step_directory
from flame.train.mirror import Mirror

EXACT = ("step", "tokens", "rows_digest", "loss", "grad_norm")


def uploading(write_recipe, url: str, **options) -> Path:
    every = 'every = "4 steps"'
    return write_recipe(replaced={every: f'{every}\nupload = "{url}"'}, **options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_run_whose_disk_is_lost_goes_on_from_the_bucket(write_recipe, tmp_path: Path, bucket: str) -> None:
    recipe, run = uploading(write_recipe, f"{bucket}/run", steps=24), tmp_path / "run"
    ranks = train_on(2, recipe)
    wait_for_step(run, 9)
    ranks.signal(signal.SIGTERM)
    assert ranks.codes() == [75, 75]
    stopped = metrics(run)[-1]["step"]
    assert [e["step"] for e in events(run, "checkpoint_uploaded")][-1] == stopped
    shutil.rmtree(run)
    assert train_on(1, recipe).codes() == [0]
    assert [e["step"] for e in events(run, "checkpoint_fetched")] == [stopped]
    assert [e["step"] for e in events(run, "resume")] == [stopped]
    plain = write_recipe("undisturbed", steps=24)
    assert train_on(1, plain).codes() == [0]
    expected = metrics(tmp_path / "undisturbed")[stopped:]
    assert [[r[k] for k in EXACT[:3]] for r in metrics(run)] == [[r[k] for k in EXACT[:3]] for r in expected]
    assert metrics(run)[-1]["loss"] == pytest.approx(expected[-1]["loss"], abs=1e-5)
    system = fsspec.filesystem("s3", skip_instance_cache=True)
    there = {path.split("/")[-2] for path in system.glob(f"{bucket}/run/step-*/{MANIFEST}")}
    assert {step_directory(run, step).name for step in saved_steps(run)} <= there
    other = uploading(write_recipe, f"{bucket}/run", steps=24)
    other.write_text(other.read_text().replace("seed = 7", "seed = 8"))
    shutil.rmtree(run)
    refused = train_on(1, other)
    assert refused.codes() == [1]
    assert "run.seed is 7 there and 8 here" in refused.error()
    assert not (run / "recipe.toml").exists()


@pytest.fixture
def mirrored(write_recipe, tmp_path: Path) -> tuple[Path, Path]:
    """A run and the folder that it was uploaded to."""
    there = tmp_path / "there"
    recipe = uploading(write_recipe, f"file://{there}", steps=12)
    assert train_on(1, recipe).codes() == [0]
    return tmp_path / "run", there


def test_what_is_damaged_on_the_way_or_there_is_not_taken(mirrored: tuple[Path, Path]) -> None:
    run, there = mirrored
    assert saved_steps(run) == sorted(int(p.parent.name[5:]) for p in there.glob(f"step-*/{MANIFEST}"))
    shutil.rmtree(run / "checkpoints")
    newest = there / "step-00000012"
    shard = next(newest.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    mirror = Mirror(run, f"file://{there}")
    mirror.fetch(lambda: None)
    assert saved_steps(run) == [8]
    assert [e["step"] for e in events(run, "checkpoint_rejected")] == [12]
    for folder in there.glob("step-*"):
        next(folder.glob("*.distcp")).unlink()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="none of its checkpoints is whole"):
        mirror.fetch(lambda: None)


def test_a_damaged_local_file_gets_no_manifest_there(mirrored: tuple[Path, Path], tmp_path: Path) -> None:
    run, _ = mirrored
    shard = next(step_directory(run, 12).glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    other = tmp_path / "other"
    with pytest.raises(CheckpointError, match="is damaged"):
        Mirror(run, f"file://{other}").update()
    assert not list(other.glob(f"step-*/{MANIFEST}"))


def test_what_is_deleted_or_set_aside_here_goes_there_too(mirrored: tuple[Path, Path]) -> None:
    run, there = mirrored
    mirror = Mirror(run, f"file://{there}")
    step_directory(run, 12).rename(run / "checkpoints" / "step-00000012.rolled-back")
    shutil.rmtree(step_directory(run, 4))
    mirror.committed([4])
    mirror.wait()
    assert [p.name for p in sorted(there.glob("step-*"))] == ["step-00000008"]


def test_storage_that_fails_is_an_event_and_the_next_checkpoint_tries_again(
    mirrored: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, there = mirrored
    shutil.rmtree(there)
    there.write_text("no folder")
    monkeypatch.setattr(remote, "TRIES", 1)
    mirror = Mirror(run, f"file://{there}")
    mirror.committed()
    mirror.wait()
    (failed,) = events(run, "upload_failed")
    assert "cannot be written" in failed["why"]
    there.unlink()
    mirror = Mirror(run, f"file://{there}")
    mirror.committed()
    mirror.wait()
    assert len(list(there.glob(f"step-*/{MANIFEST}"))) == len(saved_steps(run))

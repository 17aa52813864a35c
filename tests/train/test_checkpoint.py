"""Checkpoints: whole on any number of ranks, or not there at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import torch
import torch.distributed.checkpoint as dcp
from distributed.ranks import Ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from flame.parallel.config import ParallelConfig
from flame.parallel.mesh import build_meshes, resolve_layout
from flame.parallel.world import World, join_world
from flame.train import checkpoint
from flame.train.checkpoint import (
    Checkpointer,
    Records,
    load_tensors,
    problems,
    tensors_of,
)
from flame.train.journal import read_lines
from flame.train.keeping import prune, read_record, remove_leftovers, saved_steps, step_directory
from flame.train.saved_tensors import SavedTensors
from flame.train.shards import Shards

RECORDS = Records(train={"step": 3, "tokens": 2**40}, data={"lanes": [[1, -2]]})


class Trained(NamedTuple):
    """What a checkpoint holds the tensors of."""

    model: nn.Module
    shards: Shards
    optimizer: torch.optim.Optimizer


def trained_model(world: World, seed: int) -> Trained:
    """Sharded unevenly over the ranks, after an update with gradients that the seed gives."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 7), nn.Linear(7, 1), nn.BatchNorm1d(1))  # a buffer, too
    gradients = [torch.randn_like(p) for p in model.parameters()]
    fully_shard(model, mesh=build_meshes(resolve_layout(ParallelConfig(), world.size), "cpu").data)
    shards = Shards(model)
    for piece, gradient in zip(shards.pieces, gradients, strict=True):
        held: Any = piece.parameter
        held.grad = distribute_tensor(gradient, held.device_mesh, held.placements)
    optimizer = torch.optim.AdamW([piece.local for piece in shards.pieces], lr=0.1)
    shards.take_gradients()
    optimizer.step()
    return Trained(model, shards, optimizer)


def whole(trained: Trained) -> dict[str, torch.Tensor]:
    tensors: dict[str, Any] = tensors_of(*trained)
    return {k: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for k, t in tensors.items()}


def save_at(world: World, run: Path, trained: Trained, step: int) -> Checkpointer:
    checkpointer = Checkpointer(run, world.checkpoint, keep=2)
    checkpointer.save(step, tensors_of(*trained), RECORDS)
    checkpointer.wait()
    return checkpointer


def save(run: Path, seed: int, step: int) -> int:
    """Saves a model of the seed, and beside the run what it was."""
    world = join_world()
    trained = trained_model(world, seed)
    checkpointer = save_at(world, run, trained, step)
    assert checkpointer.error is None
    assert checkpointer.last_saved == step
    tensors = whole(trained)
    if world.rank == 0:
        torch.save(tensors, run / "expected.pt")
    return 0


def load_and_save_again(run: Path, step: int, again: int) -> int:
    """Loads a step into another model, compares, and saves it from this layout."""
    world = join_world()
    trained = trained_model(world, seed=99)
    expected = torch.load(run / "expected.pt")
    assert any(not torch.equal(t, expected[k]) for k, t in whole(trained).items())
    trained.optimizer.state.clear()
    load_tensors(*trained, step_directory(run, step), world.checkpoint)
    found = whole(trained)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    save_at(world, run, trained, again)
    return 0


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The checkpoint of step 3 of a run, by two ranks."""
    assert Ranks(2, save, tmp_path, 1, 3).codes() == [0, 0]
    return step_directory(tmp_path, 3)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_tensors_come_back_equal_on_any_number_of_ranks(saved: Path, tmp_path: Path) -> None:
    assert Ranks(3, load_and_save_again, tmp_path, 3, 6).codes() == [0, 0, 0]
    assert Ranks(1, load_and_save_again, tmp_path, 6, 9).codes() == [0]
    expected = torch.load(tmp_path / "expected.pt")
    alone = dict(SavedTensors(step_directory(tmp_path, 9)))
    assert {f"model.{name}" for name in alone} == {k for k in expected if k.startswith("model.")}
    assert all(torch.equal(tensor, expected[f"model.{name}"]) for name, tensor in alone.items())
    one_by_one = SavedTensors(step_directory(tmp_path, 6))
    assert {name: one_by_one.shape(name) for name in one_by_one} == {
        n: tuple(t.shape) for n, t in alone.items()
    }
    assert all(torch.equal(one_by_one[name], tensor) for name, tensor in alone.items())


def test_a_checkpoint_holds_what_its_manifest_lists_and_its_records(saved: Path, tmp_path: Path) -> None:
    listed = json.loads((saved / "manifest.json").read_text())
    assert listed["step"] == 3
    assert sorted([*listed["files"], "manifest.json"]) == names(saved)
    assert {"train.json", "data.json", ".metadata", "__0_0.distcp", "__1_0.distcp"} <= set(listed["files"])
    assert read_record(tmp_path, 3, "train.json") == RECORDS.train
    assert read_record(tmp_path, 3, "data.json") == RECORDS.data
    assert list(problems(saved)) == []
    (event,) = read_lines(tmp_path / "events.jsonl")
    assert (event["event"], event["step"]) == ("checkpoint_saved", 3)


# ------------------------------------------------------------------------------------ failures


def full_disk(*args: Any, **kwargs: Any) -> NoReturn:
    raise OSError(28, "No space left on device")


def save_on_a_full_disk(run: Path, place: str) -> int:
    """The disk of rank 1 is full at the first of two saves."""
    world = join_world()
    trained = trained_model(world, seed=1)
    before = whole(trained)
    checkpointer = Checkpointer(run, world.checkpoint, keep=2)
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:
            owner = dcp.FileSystemWriter if place == "write_data" else checkpoint
            patch.setattr(owner, place, full_disk)
        checkpointer.save(4, tensors_of(*trained), RECORDS)
        checkpointer.wait()
    assert "No space left on device" in str(checkpointer.error)
    assert checkpointer.last_saved is None
    torch.distributed.barrier()
    assert names(run / "checkpoints") == []
    assert saved_steps(run) == []
    assert all(torch.equal(tensor, before[key]) for key, tensor in whole(trained).items())
    torch.distributed.barrier()
    checkpointer.save(8, tensors_of(*trained), RECORDS)
    checkpointer.wait()
    assert checkpointer.error is None
    assert checkpointer.last_saved == 8
    return 0


@pytest.mark.parametrize("place", ["write_data", "file_seal"])
def test_a_full_disk_of_one_rank_is_an_event_and_the_next_save_works(tmp_path: Path, place: str) -> None:
    assert Ranks(2, save_on_a_full_disk, tmp_path, place).codes() == [0, 0]
    assert names(tmp_path / "checkpoints") == ["step-00000008"]
    assert list(problems(step_directory(tmp_path, 8))) == []
    failed, saved = read_lines(tmp_path / "events.jsonl")
    assert (failed["event"], failed["step"]) == ("checkpoint_failed", 4)
    assert "No space left on device" in failed["why"]
    assert "rank 1" in failed["why"]
    assert (saved["event"], saved["step"]) == ("checkpoint_saved", 8)


def crash_before_the_manifest(run: Path) -> int:
    world = join_world()
    trained = trained_model(world, seed=1)
    Checkpointer._commit = lambda *_: os._exit(9)  # type: ignore[method-assign]
    save_at(world, run, trained, 6)
    return 0


def test_a_crash_before_the_manifest_leaves_the_checkpoint_before_it(saved: Path, tmp_path: Path) -> None:
    assert Ranks(2, crash_before_the_manifest, tmp_path).codes() == [9, 9]
    (partial,) = (tmp_path / "checkpoints").glob("*.partial")
    assert {"__0_0.distcp", "__1_0.distcp"} <= set(names(partial))
    assert saved_steps(tmp_path) == [3]
    remove_leftovers(tmp_path)
    assert names(tmp_path / "checkpoints") == [saved.name]
    assert Ranks(2, save, tmp_path, 1, 6).codes() == [0, 0]
    assert saved_steps(tmp_path) == [3, 6]


def test_a_step_that_is_saved_again_takes_the_place_of_the_old(saved: Path, tmp_path: Path) -> None:
    old = dict(SavedTensors(saved))
    assert Ranks(3, save, tmp_path, 2, 3).codes() == [0, 0, 0]
    assert names(tmp_path / "checkpoints") == [saved.name]
    assert list(problems(saved)) == []
    new = dict(SavedTensors(saved))
    assert all(not torch.equal(old[name], new[name]) for name in old if name.endswith("weight"))


# ---------------------------------------------------------------------------- kept and verified


def test_the_newest_checkpoints_are_kept(saved: Path, tmp_path: Path) -> None:
    for step in (5, 40, 100_000_000):
        shutil.copytree(saved, step_directory(tmp_path, step))
    shutil.copytree(saved, tmp_path / "checkpoints" / "step-00000005.replaced-17")
    (tmp_path / "checkpoints" / "step-00000050.partial").mkdir()  # under way: not pruning's
    assert saved_steps(tmp_path) == [3, 5, 40, 100_000_000]
    prune(tmp_path, 2)
    assert names(tmp_path / "checkpoints") == ["step-00000040", "step-00000050.partial", "step-100000000"]
    prune(tmp_path, 0)
    assert saved_steps(tmp_path) == [40, 100_000_000], "the newest always stays, and one for a rollback"


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def other_format(path: Path) -> None:
    manifest = json.loads((path.parent / "manifest.json").read_text())
    (path.parent / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (Path.unlink, "__1_0.distcp is missing"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "__1_0.distcp holds"),
        (flip_a_bit, "__1_0.distcp is corrupt"),
        (other_format, "its format is 99"),
        (lambda p: (p.parent / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda p: (p.parent / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    ],
    ids=["missing", "short", "flipped bit", "format", "torn manifest", "other manifest"],
)
def test_a_damaged_checkpoint_is_found_by_one_of_the_ranks(
    whole_checkpoint: Path, tmp_path: Path, damage: Any, says: str
) -> None:
    path = tmp_path / "damaged"
    shutil.copytree(whole_checkpoint, path)
    damage(path / "__1_0.distcp")
    assert says in next(problems(path))
    found = [list(problems(path, part, 3)) for part in range(3)]
    finders = sum(says in " ".join(listed) for listed in found)
    assert finders == (1 if says.startswith("__1_0") else 3), "the manifest is read by all, a file by one"


@pytest.fixture(scope="module")
def whole_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    assert Ranks(2, save, run, 1, 3).codes() == [0, 0]
    return step_directory(run, 3)

"""Checkpoints: sharded files written in the background, and a manifest that makes them count.

RUN/checkpoints/step-00001000/
    __0_0.distcp, __1_0.distcp, ..., .metadata    parameters and optimizer (torch.distributed.checkpoint)
    train.json    step, tokens and other counters     data.json   where every lane of the data stands
    manifest.json the size and hash of each file above; written last, so without it there is no checkpoint
"""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import orjson
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from flame.errors import CheckpointError
from flame.schema import Duration
from flame.train.exporter import Exporter
from flame.train.journal import event, replace_file, sync_directory
from flame.train.keeping import MANIFEST, prune, saved_steps, step_directory
from flame.train.mirror import Mirror
from flame.train.safe_reader import Reader
from flame.train.shards import Shards

FORMAT = 1  # of the files above; older ones are brought up by named migrations

T = TypeVar("T")
Tensors = dict[str, Any]  # a state dict: names to tensors, sharded or plain


# ------------------------------------------------------------------------------------- tensors


def tensors_of(model: nn.Module, shards: Shards, optimizer: torch.optim.Optimizer) -> Tensors:
    """Parameters, buffers and optimizer state by fully qualified name; the memory itself, no copies."""
    masters = {id(piece.parameter): piece.master() for piece in shards.pieces}
    held = model.state_dict(keep_vars=True)  # tied parameters under each of their names
    state: Tensors = {f"model.{name}": masters.get(id(t), t.detach()) for name, t in held.items()}
    for piece in shards.pieces:
        for key, value in optimizer.state.get(piece.local, {}).items():
            state[f"optimizer.{piece.name}.{key}"] = piece.as_shard(value)
    return state


def load_tensors(
    model: nn.Module,
    shards: Shards,
    optimizer: torch.optim.Optimizer,
    path: Path,
    group: dist.ProcessGroup,
    *,
    with_optimizer: bool = True,
    exclude: Collection[str] = (),
) -> None:
    """Fills model and optimizer in place from a checkpoint written under any layout; what belongs to a
    parameter in `exclude` stays as it is."""
    reader = Reader(path)
    saved = reader.read_metadata().state_dict_metadata
    chosen = [p for p in shards.pieces if with_optimizer and p.name not in exclude]
    for piece in chosen:
        prefix = f"optimizer.{piece.name}."
        state: dict[str, Any] = {}
        for key, meta in saved.items():
            if not key.startswith(prefix) or "." in key[len(prefix) :]:
                continue
            assert isinstance(meta, TensorStorageMetadata)
            shape = piece.local.shape if meta.size == piece.parameter.shape else meta.size
            state[key[len(prefix) :]] = torch.zeros(
                shape, dtype=meta.properties.dtype, device=piece.local.device
            )
        if state:
            optimizer.state[piece.local] = state
    tensors = tensors_of(model, shards, optimizer)
    wanted = {key: tensor for key, tensor in tensors.items() if key.removeprefix("model.") not in exclude}
    dcp.load(wanted, storage_reader=reader, process_group=group)
    shards.updated()


# -------------------------------------------------------------------------------------- saving


@dataclass(frozen=True, slots=True)
class Records:
    """The JSON files of a checkpoint; only rank 0's are written."""

    train: dict[str, Any]
    data: dict[str, Any]


class Checkpointer:
    """Saves in the background. All ranks call `save` and `wait` at the same steps.

    `save` returns once the tensors are copied to host memory. A save that fails (a full disk) is an
    event; nothing half-written stays, and training goes on.
    """

    def __init__(
        self,
        run: Path,
        group: dist.ProcessGroup,
        keep: int,
        keep_every: Duration | None = None,
        exporter: Exporter | None = None,
        mirror: Mirror | None = None,
    ) -> None:
        """`exporter` and `mirror` (on rank 0): are told of what was saved, and keep what they need from being
        deleted."""
        self.run = run
        self._exporter = exporter
        self._mirror = mirror
        self._group = group  # gloo, used for checkpoints alone: a save runs beside the training's collectives
        self._rank = dist.get_rank(group)
        self._keep = keep, keep_every
        self._thread: threading.Thread | None = None
        self._on_gpu = torch.cuda.is_available()
        # torch's DefaultStager has one of these, which torch 2.11 closes after each save and cannot use again
        self._stager = StateDictStager(pin_memory=self._on_gpu)
        self.last_saved: int | None = None
        self.error: str | None = None

    def save(self, step: int, tensors: Tensors, records: Records) -> None:
        """Begins a checkpoint of `step`. Waits for the one before it."""
        self.wait()
        began = time.monotonic()
        staged = cast("Tensors", self._stager.stage(tensors, non_blocking=self._on_gpu))
        if self._on_gpu:
            torch.cuda.synchronize()
        pause = time.monotonic() - began
        self._thread = threading.Thread(
            target=self._write, args=(step, staged, records, pause), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Waits for the save under way; afterwards `error` says why the last one failed, or is None."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def uploaded(self, seconds: float | None = None) -> None:
        """Waits for the upload under way, so many seconds at most."""
        if self._mirror is not None:
            self._mirror.wait(seconds)

    def _write(self, step: int, staged: Tensors, records: Records, pause: float) -> None:
        began = time.monotonic()
        final = step_directory(self.run, step)
        partial = final.with_name(final.name + ".partial")
        try:
            self._together(lambda: self._prepare(partial, records))
            self._together(lambda: self._write_shards(partial, staged))
            seals = self._together(lambda: self._seal(partial))
            self._together(lambda: self._commit(partial, final, step, seals))
        except CheckpointError as error:
            self.error = str(error)
            if self._rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                event(self.run, "checkpoint_failed", step=step, why=self.error)
                if self._exporter is not None:
                    self._exporter.lost(step, self.error)
            return
        except RuntimeError as error:  # a peer is gone: the training's own exchange will say so, too
            self.error = str(error)
            return
        self.error, self.last_saved = None, step
        if self._rank == 0:
            seconds = round(time.monotonic() - began, 3)
            event(self.run, "checkpoint_saved", step=step, seconds=seconds, pause_seconds=round(pause, 4))
            if self._exporter is not None:
                self._exporter.committed(step)
            users = [user for user in (self._exporter, self._mirror) if user is not None]
            gone = prune(self.run, *self._keep, spare=set[int]().union(*(user.held() for user in users)))
            if self._mirror is not None:
                self._mirror.committed(gone)

    def _together(self, act: Callable[[], T]) -> list[T]:
        """What `act` gives on every rank; CheckpointError on all where it fails on any."""
        result: T | None = None
        failure: str | None = None
        try:
            result = act()
        except CheckpointException as error:  # no Exception, but a BaseException; of any of the ranks
            failure = "; ".join(described(rank, wrapped[0]) for rank, wrapped in error.failures.items())
        except Exception as error:  # whatever it is, the other ranks must hear of it
            failure = described(self._rank, error)
        outcomes: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(outcomes, (failure, result), group=self._group)
        failure = next((f for f, _ in outcomes if f), None)
        if failure:
            raise CheckpointError(failure)
        return [result for _, result in outcomes]

    def _prepare(self, partial: Path, records: Records) -> None:
        if self._rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            replace_file(partial / "train.json", orjson.dumps(records.train))
            replace_file(partial / "data.json", orjson.dumps(records.data))

    def _write_shards(self, partial: Path, staged: Tensors) -> None:
        writer = dcp.FileSystemWriter(partial, single_file_per_rank=True, sync_files=True)
        dcp.save(staged, storage_writer=writer, process_group=self._group)

    def _seal(self, partial: Path) -> dict[str, Any]:
        """The seals of this rank's own files."""
        return {p.name: file_seal(p) for p in partial.iterdir() if self._owns(p.name)}

    def _commit(self, partial: Path, final: Path, step: int, seals: list[dict[str, Any]]) -> None:
        """Rank 0 writes the manifest, then the directory gets its name."""
        if self._rank != 0:
            return
        files = {name: seal for part in seals for name, seal in sorted(part.items())}
        manifest = {"format": FORMAT, "step": step, "files": files}
        replace_file(partial / MANIFEST, orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
        if final.exists():
            final.rename(final.with_name(f"{final.name}.replaced-{time.time_ns()}"))
        partial.rename(final)
        sync_directory(final.parent)

    def _owns(self, name: str) -> bool:
        return name.startswith(f"__{self._rank}_") or (self._rank == 0 and not name.startswith("__"))


def described(rank: int, error: BaseException) -> str:
    return f"rank {rank}: {type(error).__name__}: {error}"


def file_seal(path: Path) -> dict[str, Any]:
    """A file's size and hash."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "blake2b": digest.hexdigest()}


# ------------------------------------------------------------------------------------- loading


def newest_sound(run: Path, group: dist.ProcessGroup) -> int | None:
    """The newest checkpoint that every rank finds whole, or None where there is none at all.

    Each rank verifies its part of the files. A broken checkpoint is passed over with an event;
    CheckpointError where all are broken: a run is never begun again silently.
    """
    rank = dist.get_rank(group)
    box: list[Any] = [saved_steps(run) if rank == 0 else None]
    dist.broadcast_object_list(box, group_src=0, group=group)
    steps = cast("list[int]", box[0])
    broken: dict[int, str] = {}
    for step in reversed(steps):
        problem = shared_problem(step_directory(run, step), group)
        if problem is None:
            return step
        broken[step] = problem
        if rank == 0:
            event(run, "checkpoint_rejected", step=step, why=problem)
    if broken:
        listed = "; ".join(f"step {step}: {why}" for step, why in broken.items())
        raise CheckpointError(
            f"{run}: none of its checkpoints is whole ({listed}); restore one of them, "
            "or start anew in another run directory"
        )
    return None


def shared_problem(path: Path, group: dist.ProcessGroup) -> str | None:
    """What is wrong with a checkpoint, on every rank the same; each verifies its part of the files."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    found: list[str | None] = [None] * world
    dist.all_gather_object(found, next(problems(path, rank, world), None), group=group)
    return next((problem for problem in found if problem), None)


def problems(path: Path, part: int = 0, parts: int = 1) -> Iterator[str]:
    """What is wrong with a checkpoint's files i where i = part (mod parts)."""
    try:
        manifest = cast("dict[str, Any]", orjson.loads((path / MANIFEST).read_bytes()))
        files = cast("dict[str, dict[str, Any]]", manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"{MANIFEST} cannot be read ({type(error).__name__}); do all nodes see {path}?"
        return
    if manifest.get("format") != FORMAT:
        yield f"its format is {manifest.get('format')}, this flame reads {FORMAT}"
    for name in sorted(files)[part::parts]:
        file = path / name
        if not file.exists():
            yield f"{name} is missing"
        elif file.stat().st_size != files[name]["bytes"]:
            yield f"{name} holds {file.stat().st_size} bytes, not {files[name]['bytes']}"
        elif file_seal(file) != files[name]:
            yield f"{name} is corrupt: its hash differs from the manifest's"

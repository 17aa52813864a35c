"""Whether the copies of a model are still equal: a bit that flipped in one is found, and not trained on.

Copies get the same gradients and make the same updates, so they stay equal to the last bit. What one holds
that the others do not comes from a device or a memory that has failed without a word.
"""

from __future__ import annotations

import hashlib
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard

from flame.errors import TrainingError
from flame.schema import Duration
from flame.train.journal import event, read_lines
from flame.train.rollback import RolledBack
from flame.train.shards import Piece, Shards

CHUNK_WORDS = 1 << 24  # hashed at a time, so that a large parameter needs little more memory
MIXING = 0x9E3779B97F4A7C15 - (1 << 64)  # an odd number whose bits are spread, as int64
NAMED = 8  # parameters that an event names
EVENT = "replicas_differ"

Digests = dict[str, int]  # of this rank's parts, by parameter and place in it


@dataclass(frozen=True, slots=True)
class Difference:
    """What all ranks find where copies are not equal."""

    ranks: list[int]  # the odd ones out; all that differ, where no majority says which those are
    parameters: list[str]


class Replicas:
    """Compares the copies. All ranks call `check` at the same steps."""

    def __init__(
        self,
        run: Path,
        shards: Shards,
        group: dist.ProcessGroup,
        *,
        every: Duration,
        most: int,
        wait: Callable[[], None],
        place: tuple[int, ...] = (),
    ) -> None:
        """`most`: times that the run goes back for this. `wait`: for the save under way. `place`: what tells
        this rank's parameters from those of ranks that hold other ones under the same names."""
        self.every = every
        self._run, self._shards, self._group = run, shards, group
        self._most, self._wait, self._place = most, wait, place
        self._equal_at: int | None = None  # the step after which they were last compared

    def check(self, step: int) -> None:
        """Compares the parameters after a step; before a save, too, so that no checkpoint holds a damage.

        Raises RolledBack where copies differ, TrainingError where they have differed too often.
        """
        if step == self._equal_at:
            return
        mine = digests(self._shards.pieces, self._place)
        if self._all_equal(mine):
            self._equal_at = step
            return
        everyone: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(everyone, (mine, socket.gethostname()), group=self._group)
        found = difference([digest for digest, _ in everyone])
        hosts = sorted({everyone[rank][1] for rank in found.ranks})
        self._wait()
        self._go_back(step, found, hosts)

    def _all_equal(self, mine: Digests) -> bool:
        """Whether those that hold the same parts hold the same values: by two numbers of each rank."""
        held, values = (_hash(repr(part)) for part in (list(mine), list(mine.values())))
        table = torch.zeros(dist.get_world_size(self._group), 2, dtype=torch.int64)
        table[dist.get_rank(self._group)] = torch.tensor([held, values])
        dist.all_reduce(table, group=self._group)
        rows = {(h, v) for h, v in table.tolist()}
        return len(rows) == len({h for h, _ in rows})

    def _go_back(self, step: int, found: Difference, hosts: list[str]) -> None:
        rank = dist.get_rank(self._group)
        before = [
            sum(e["event"] == EVENT for e in read_lines(self._run / "events.jsonl")) if rank == 0 else 0
        ]
        dist.broadcast_object_list(before, group_src=0, group=self._group)
        why = (
            f"the copies of the parameters differ after step {step}: "
            f"{'rank' if len(found.ranks) == 1 else 'ranks'} {', '.join(map(str, found.ranks))} on "
            f"{', '.join(hosts)}, in {', '.join(found.parameters[:NAMED])}"
        )
        if rank == 0:
            told = {"ranks": found.ranks, "hosts": hosts, "parameters": found.parameters[:NAMED]}
            event(self._run, EVENT, step=step, **told, equal_at=self._equal_at)
        if before[0] >= self._most:
            raise TrainingError(
                f"{self._run}: {why}. The run has gone back {before[0]} time(s) for this already, as often "
                "as recovery.max_rollbacks allows: a device or its memory is failing. Take the machines of "
                "those ranks out, and go on with flame resume"
            )
        if rank == 0:
            event(self._run, "rollback", step=step, rows=[], steps=[], why=why)
            print(f"{why}; going back to the newest checkpoint", flush=True)
        raise RolledBack


def digests(pieces: list[Piece], place: tuple[int, ...] = ()) -> Digests:
    """64 bits of each part that this rank holds; any one word that is another gives other bits."""
    sums = torch.stack([digest(piece.local.detach()) for piece in pieces])
    names = [f"{piece.name}{[*_coordinate(piece), *place]}" for piece in pieces]
    return dict(zip(names, sums.tolist(), strict=True))


def digest(tensor: torch.Tensor) -> torch.Tensor:
    """Of a float32 tensor: int64, on its device. Each word counts times an odd number of its place."""
    words = tensor.contiguous().view(-1).view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(words), CHUNK_WORDS):
        part = words[start : start + CHUNK_WORDS].to(torch.int64)
        places = torch.arange(start, start + len(part), device=tensor.device)
        total += (part * ((2 * places + 1) * MIXING)).sum()
    return total


def _coordinate(piece: Piece) -> list[int]:
    """Where this rank's part lies in the parameter; equal for copies."""
    parameter = piece.parameter
    if not isinstance(parameter, DTensor):
        return []
    mesh = parameter.device_mesh
    kinds = enumerate(parameter.placements)
    return [mesh.get_local_rank(d) for d, placement in kinds if isinstance(placement, Shard)]


def difference(everyone: list[Digests]) -> Difference:
    """Which ranks hold something else than the most of those that should hold the same; by rank."""
    ranks: set[int] = set()
    parameters: list[str] = []
    for name in sorted(set[str]().union(*everyone)):
        held = {rank: found[name] for rank, found in enumerate(everyone) if name in found}
        counted = Counter(held.values())
        if len(counted) == 1:
            continue
        (usual, most), *_ = counted.most_common(1)
        majority = 2 * most > len(held)
        ranks |= {rank for rank, value in held.items() if not majority or value != usual}
        parameter = name.partition("[")[0]
        if parameter not in parameters:
            parameters.append(parameter)
    return Difference(sorted(ranks), parameters)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)

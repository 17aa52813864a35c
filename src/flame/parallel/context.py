"""Context parallelism: the tokens of each micro-batch lie over the ranks of the context mesh.

The flattened b * L tokens are cut into equal runs, one a rank, in the order of the ranks. All that looks at
one token at a time needs nothing more. What mixes tokens finds out here how the documents are cut
(`part_of`), and exchanges what it has to (`to_heads`, `preceding`, `receive_states`); `context_mixers.py`
says which functions do.

The `cu_seqlens` that a model is called with are those of this rank's run, and it is by them that the
functions inside find their part: they are handed through every layer as they are, also when activations are
computed again, and several micro-batches may be on their way at once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import lcm, prod
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from flame.batch import Batch, HeldOutBatch, RowSet, StepRows

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """How one micro-batch is cut, and which run of it this rank has."""

    group: dist.ProcessGroup
    rank: int
    ranks: int
    method: str  # [parallel] context_method
    length: int  # tokens of each rank
    bounds: Tensor  # int32 [documents + 1], on the CPU: of the whole micro-batch
    cu_seqlens: Tensor  # the same on the device
    longest: int  # tokens of its longest segment, or more
    before: tuple[int, ...]  # for each rank: tokens of its first document that lie on earlier ranks

    @property
    def continues(self) -> bool:
        """Whether this rank's first document began on an earlier rank."""
        return self.before[self.rank] > 0

    @property
    def is_continued(self) -> bool:
        """Whether this rank's last document goes on on the next rank."""
        return self.rank + 1 < self.ranks and self.before[self.rank + 1] > 0

    def exchanges_heads(self, heads: int) -> bool:
        """Whether a mixer of so many heads exchanges its tokens for heads."""
        return self.method != "state" and heads % self.ranks == 0


# by identity; a part goes when its tensor does
_PARTS: Any = WeakIdKeyDictionary()


def part_of(cu_seqlens: Any) -> Part | None:
    """The part whose run has these `cu_seqlens`; None where rows are whole."""
    return _PARTS.get(cu_seqlens) if isinstance(cu_seqlens, Tensor) else None


# ------------------------------------------------------------------------------------- batches


@dataclass(frozen=True, slots=True)
class PartialBatch(Batch):
    """One rank's run of a micro-batch: tokens, labels and positions [1, b * L / ranks], and its own
    `cu_seqlens`, which `part_of` knows. Labels and positions are those of the whole."""

    part: Part | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`, as `Batch.to`."""
        assert self.part is not None
        moved = cast("PartialBatch", Batch.to(self, device))
        whole = self.part.bounds
        if device.type != "cpu":
            whole = whole.pin_memory().to(device, non_blocking=True)
        part = replace(self.part, cu_seqlens=whole)
        _PARTS[moved.cu_seqlens] = part
        return replace(moved, part=part)


def split_batch(batch: Batch, group: dist.ProcessGroup, method: str = "auto") -> Batch:
    """This rank's run of a micro-batch on the CPU, whose tokens the ranks of `group` divide."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    length, rest = divmod(batch.tokens.numel(), ranks)
    assert not rest, f"{batch.tokens.numel()} tokens over {ranks} context ranks: check_lengths lets none in"
    bounds: list[int] = batch.cu_seqlens.tolist()
    starts = [length * r for r in range(ranks)]
    # the last bound at or before a run's start is where its first document begins
    before = [start - bounds[bisect_right(bounds, start) - 1] for start in starts]
    start, end = starts[rank], starts[rank] + length
    inner = [bound - start for bound in bounds if start < bound < end]
    local = torch.tensor([0, *inner, length], dtype=torch.int32)
    part = Part(
        group=group,
        rank=rank,
        ranks=ranks,
        method=method,
        length=length,
        bounds=batch.cu_seqlens,
        cu_seqlens=batch.cu_seqlens,
        longest=1 << (batch.longest_segment - 1).bit_length(),
        before=tuple(before),
    )
    _PARTS[local] = part
    run: dict[str, Tensor] = {
        name: getattr(batch, name).flatten()[start:end][None] for name in ("tokens", "labels", "positions")
    }
    longest = int(local.diff().max())
    return PartialBatch(
        **run, cu_seqlens=local, longest_segment=longest, first_row=batch.first_row, part=part
    )


class Rows(Protocol):
    """Where whole rows come from."""

    def next_step(self) -> StepRows: ...


class PartOfRows:
    """A reader of rows that gives this rank's run of each micro-batch, and counts as the whole does."""

    def __init__(self, rows: Rows, mesh: DeviceMesh, method: str) -> None:
        self._rows = rows
        self._group = mesh.get_group()
        self._method = method

    def next_step(self) -> StepRows:
        """As the reader's own; raises what it raises."""
        step = self._rows.next_step()
        parts = tuple(split_batch(batch, self._group, self._method) for batch in step.micro_batches)
        return replace(step, micro_batches=parts)


class PartOfHeldOutRows:
    """A set of validation rows that gives this rank's run of each micro-batch; its counts are the whole's."""

    def __init__(self, rows: RowSet, mesh: DeviceMesh, method: str) -> None:
        self._rows, self._group, self._method = rows, mesh.get_group(), method
        self.sources, self.counts, self.total_rows = rows.sources, rows.counts, rows.total_rows

    def batches(self) -> Iterator[HeldOutBatch]:
        """As the set's own."""
        for whole in self._rows.batches():
            run = split_batch(whole.batch, self._group, self._method)
            first = dist.get_rank(self._group) * run.tokens.numel()
            yield whole._replace(batch=run, first=first)


# ----------------------------------------------------------------------------------- exchanges


class _Exchange(torch.autograd.Function):
    """All-to-all over the first dimension, in pieces of `sent[r]` to rank r; gradients go the way back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.way = sent, received, group
        return _all_to_all(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received, group = ctx.way
        return _all_to_all(grads[0], received, sent, group), None, None, None


def _all_to_all(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out


def _exchange(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    apply: Any = _Exchange.apply
    return apply(x, sent, received, group)


def to_heads(tensors: Sequence[Tensor], part: Part) -> list[Tensor]:
    """From all heads of this rank's tokens to this rank's heads of all tokens.

    Each tensor is [1, m * T / ranks, H, ...] with its own m and H, to [1, m * T, H / ranks, ...]. Where
    `ranks` does not divide H, a head is sent more than once, as the key head of several heads of queries has
    to be. Tensors of one dtype travel together.
    """
    flat = [_by_rank(tensor, part) for tensor in tensors]  # [n, m, ranks, heads and channels]
    whole: list[Tensor | None] = [None] * len(flat)
    for dtype in dict.fromkeys(x.dtype for x in flat):
        chosen = [i for i, x in enumerate(flat) if x.dtype == dtype]
        sent = torch.cat([flat[i].permute(2, 0, 1, 3).flatten(2) for i in chosen], -1)  # [ranks, n, width]
        ones = [1] * part.ranks
        received = _exchange(sent, ones, ones, part.group).flatten(0, 1)  # runs follow each other as ranks do
        widths = [flat[i].shape[1] * flat[i].shape[3] for i in chosen]
        for i, piece in zip(chosen, received.split(widths, -1), strict=True):
            shape = tensors[i].shape
            many = flat[i].shape[1]
            heads = flat[i].shape[3] // prod(shape[3:])
            whole[i] = piece.reshape(1, piece.shape[0] * many, heads, *shape[3:]).contiguous()
    return [x for x in whole if x is not None]


def _by_rank(x: Tensor, part: Part) -> Tensor:
    heads = x.shape[2]
    if heads % part.ranks:
        x = x.repeat_interleave(lcm(heads, part.ranks) // heads, 2)
    return x.reshape(part.length, x.shape[1] // part.length, part.ranks, -1)


def from_heads(x: Tensor, part: Part) -> Tensor:
    """From this rank's heads of all tokens to all heads of its own: [1, T, H / ranks, ...] to
    [1, T / ranks, H, ...]."""
    sent = x.reshape(part.ranks, part.length, -1)
    ones = [1] * part.ranks
    received = _exchange(sent, ones, ones, part.group)  # [heads of each rank, T / ranks, ...]
    return received.transpose(0, 1).reshape(1, part.length, part.ranks * x.shape[2], *x.shape[3:])


def own_heads(parameter: Tensor, part: Part) -> Tensor:
    """This rank's heads of a tensor whose first dimension is made of heads."""
    size = parameter.shape[0] // part.ranks
    return parameter.narrow(0, part.rank * size, size)


def preceding(x: Tensor, part: Part, limit: int | None = None) -> Tensor:
    """The tokens of this rank's first document that lie before its run, the last `limit` of them at most.

    x: [T / ranks, ...], this rank's. Returns [tokens, ...]: none where a document begins with the run. Only
    what is asked for travels.
    """
    wanted = [before if limit is None else min(before, limit) for before in part.before]
    if not any(wanted):  # on every rank alike
        return x[:0]

    def overlap(source: int, reader: int) -> tuple[int, int]:
        """What `reader` wants of the run of `source`, counted from that run's start."""
        end = reader * part.length
        first = max(end - wanted[reader], source * part.length)
        last = min(end, (source + 1) * part.length)
        return first - source * part.length, max(first, last) - source * part.length

    mine = [overlap(part.rank, reader) for reader in range(part.ranks)]
    received = [end - start for start, end in (overlap(source, part.rank) for source in range(part.ranks))]
    pieces = [x[start:end] for start, end in mine]
    return _exchange(torch.cat(pieces), [len(piece) for piece in pieces], received, part.group)


# -------------------------------------------------------------------------------------- states


class _Receive(torch.autograd.Function):
    """States from the rank before; their gradients go back to it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, shapes: list[tuple[int, ...]], part: Part) -> tuple[Tensor, ...]:
        ctx.part = part
        states = tuple(anchor.new_empty(shape, dtype=torch.float32) for shape in shapes)
        for state in states:
            dist.recv(state, group=part.group, group_src=part.rank - 1)
        return states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        for grad in grads:
            dist.send(grad.contiguous(), group=ctx.part.group, group_dst=ctx.part.rank - 1)
        return None, None, None


class _Send(torch.autograd.Function):
    """Sends states to the next rank; passes `out` on, so that backward waits here for their gradients."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, part: Part, *states: Tensor) -> Tensor:
        ctx.part = part
        ctx.like = [(state.shape, state.device) for state in states]
        for state in states:
            dist.send(state.float().contiguous(), group=part.group, group_dst=part.rank + 1)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        states = [torch.empty(shape, device=device) for shape, device in ctx.like]
        for state in states:
            dist.recv(state, group=ctx.part.group, group_src=ctx.part.rank + 1)
        return grads[0], None, *states


def receive_states(anchor: Tensor, shapes: list[tuple[int, ...]], part: Part) -> tuple[Tensor, ...]:
    """The states, float32 of these shapes, that the rank before hands on. `anchor` is any tensor that needs a
    gradient where the states do: it puts them on the way back."""
    apply: Any = _Receive.apply
    return apply(anchor, shapes, part)


def send_states(out: Tensor, states: Sequence[Tensor], part: Part) -> Tensor:
    """Hands states on to the next rank. Returns `out`, which the rest has to use."""
    apply: Any = _Send.apply
    return apply(out, part, *states)

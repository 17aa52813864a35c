"""Tensor and sequence parallel: a family's plan, applied to its model.

Every parameter becomes a DTensor on the tensor mesh, sharded or replicated, which is how FSDP2, initial
weights, norms and checkpoints know it. The layers' own code and kernels see plain tensors: reading a
parameter in a forward pass gives this rank's part.

What is replicated works on a part of the tokens, heads or channels on each rank, so its gradient is the sum
over the ranks: `train.shards` adds it up once a step.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from math import gcd
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.pytorch_utils import Conv1D

from flame.models.family import Family
from flame.models.tensor_plan import UNITS, Part, Unit
from flame.parallel.exchange import Exchange
from flame.parallel.wide import headed, widen

Reader = Callable[[Tensor], Tensor]


def units(model: nn.Module) -> Iterator[tuple[str, Any, Unit]]:
    """Names, modules and plans of a model's layers that are divided."""
    for name, module in model.named_modules():
        unit = UNITS.get(type(module).__name__)
        if unit is not None:
            yield name, module, unit


def divide(model: nn.Module, family: Family, exchange: Exchange) -> None:
    """Divides a model on meta over the ranks of `exchange`, in place; its parameters keep their names and
    global shapes. The plan must fit (`parallel.support`)."""
    plan = family.tensor
    assert plan is not None
    dims: dict[int, int] = {}  # the dimension that a parameter is sharded on, by its id
    readers: dict[int, Reader] = {}  # how this rank reads its part, where that is not simply the part
    for _, module, unit in units(model):
        _plan_unit(module, unit, exchange, dims, readers)
    for name, dim in plan.tables:
        table = getattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], None)
        if table is not None:
            dims[id(table)] = dim
    for module in (family.embedding(model), family.head(model)):
        dims[id(module.weight)] = 0
    if family.head(model).bias is not None:  # type: ignore[redundant-expr]
        dims[id(family.head(model).bias)] = 0
    _distribute(model, exchange, dims, readers)

    for _, module, unit in units(model):
        _adapt_unit(module, unit, exchange)
    _adapt_embedding(family.embedding(model), exchange)
    _after(model.get_submodule(plan.norm), exchange.whole)
    if plan.positions is not None:
        _after(model.get_submodule(plan.positions), exchange.mine)


# ----------------------------------------------------------------------------------- parameters


def _plan_unit(
    module: nn.Module, unit: Unit, exchange: Exchange, dims: dict[int, int], readers: dict[int, Reader]
) -> None:
    for name, owner, parameter in named(module, unit.columns):
        dims[id(parameter)] = parameter.ndim - 1 if _is_transposed(owner, name) else 0
    for name, owner, parameter in named(module, unit.rows):
        if name == "bias":  # added to the sum once
            readers[id(parameter)] = functools.partial(_on_one, exchange.rank == 0)
        else:
            dims[id(parameter)] = 0 if _is_transposed(owner, name) else 1
    for name, parts in unit.stacked:
        sizes = parts(module, exchange.size)
        for own_name, owner, parameter in named(module, (name,)):
            dim = parameter.ndim - 1 if _is_transposed(owner, own_name) else 0
            rows = local_rows(sizes, exchange.rank, exchange.size)
            matrix = parameter.ndim == 2 and parameter.shape[dim] % exchange.size == 0
            if matrix:  # large: each rank keeps a part, and gathers it to read its rows
                dims[id(parameter)] = dim
            readers[id(parameter)] = _Rows(rows, dim, exchange if matrix else None)


def named(module: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[str, Any, nn.Parameter]]:
    """Parameters of `module` that `names` mean, each with its own name and its owner: a parameter itself, or
    all in a submodule. What a model of this config does not have is left out."""
    for name in names:
        parent, _, last = name.rpartition(".")
        owner: Any = _submodule(module, parent)
        found = getattr(owner, last, None) if owner is not None else None
        if isinstance(found, nn.Parameter):
            yield last, owner, found
        elif isinstance(found, nn.Module):
            for inner in found.modules():
                yield from ((n, inner, p) for n, p in inner.named_parameters(recurse=False))


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _is_transposed(owner: nn.Module, name: str) -> bool:
    """Whether a matrix is [inputs, outputs]: GPT-2's."""
    return isinstance(owner, Conv1D) and name == "weight"


def local_rows(sizes: list[Part], rank: int, ranks: int) -> Tensor:
    """int64: which rows of stacked matrices are a rank's."""
    rows: list[Tensor] = []
    start = 0
    for size, divided in sizes:
        own = size // ranks if divided else size
        first = start + own * rank if divided else start
        rows.append(torch.arange(first, first + own))
        start += size
    return torch.cat(rows)


class _Rows:
    """Reads a rank's rows of stacked matrices: from its replica, or from all ranks' parts."""

    def __init__(self, rows: Tensor, dim: int, gather: Exchange | None) -> None:
        self._rows, self._dim, self._gather = rows, dim, gather
        self._there: Tensor | None = None  # on the device

    def __call__(self, part: Tensor) -> Tensor:
        if self._there is None or self._there.device != part.device:
            self._there = self._rows.to(part.device)
        whole = part if self._gather is None else self._gather.whole(part, self._dim)
        return whole.index_select(self._dim, self._there)

    def __len__(self) -> int:
        return len(self._rows)


def _on_one(mine: bool, whole: Tensor) -> Tensor:
    return whole * float(mine)


def _distribute(
    model: nn.Module, exchange: Exchange, dims: dict[int, int], readers: dict[int, Reader]
) -> None:
    """Makes every parameter a DTensor, ties kept, and lets its module read plain tensors."""
    made: dict[int, nn.Parameter] = {}
    for module in cast("Iterator[Any]", model.modules()):
        own: dict[str, Reader | None] = {}
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = _sharded(parameter, dims.get(id(parameter)), exchange)
            module._parameters[name] = made[id(parameter)]
            own[name] = readers.get(id(parameter))
        if own:
            _read_plain(module, own)


def _sharded(parameter: nn.Parameter, dim: int | None, exchange: Exchange) -> nn.Parameter:
    assert parameter.is_meta, "only a model on meta is divided"
    shape = list(parameter.shape)
    if dim is not None:
        step = -(-shape[dim] // exchange.size)
        shape[dim] = max(0, min(step, shape[dim] - step * exchange.rank))
    if exchange.mesh is None:
        return nn.Parameter(parameter.new_empty(shape), requires_grad=parameter.requires_grad)
    tensor = DTensor.from_local(
        parameter.new_empty(shape),
        exchange.mesh,
        [Replicate() if dim is None else Shard(dim)],
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return nn.Parameter(tensor, requires_grad=parameter.requires_grad)


def _read_plain(module: nn.Module, readers: dict[str, Reader | None]) -> None:
    """Makes `module.weight` and the like this rank's part, as a plain tensor with its gradient, while FSDP2
    has the parameter gathered; else they stay what they are."""
    held: Any = module
    held.__dict__["_readers"] = readers
    held.__class__ = _reading(type(module), tuple(readers))


@functools.cache
def _reading(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    def reading(name: str) -> property:
        return property(functools.partial(_read, name=name), functools.partial(_give, name=name))

    return type(kind.__name__, (kind,), {name: reading(name) for name in names})


def _give(module: Any, value: Tensor, name: str) -> None:
    """In place of a parameter that lies on another stage of a pipeline (`parallel.pipeline`)."""
    module.__dict__[name] = value


def _read(module: Any, name: str) -> Tensor:
    if name not in module._parameters:
        return module.__dict__[name]
    parameter = module._parameters[name]
    if isinstance(parameter, DTensor) and parameter.device_mesh.ndim > 1:  # sharded over data ranks, too
        return parameter
    part = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    reader = module._readers[name]
    return part if reader is None else reader(part)


# --------------------------------------------------------------------------------------- layers


def _adapt_unit(module: Any, unit: Unit, exchange: Exchange) -> None:
    """Gives a layer this rank's sizes, and puts the exchanges around it."""
    ranks = exchange.size
    for name, stacked in unit.lengths:
        setattr(module, name, len(module.get_submodule(stacked)._readers["weight"]))
    if any(name.startswith("config.") for name in unit.counts):
        module.config = copy.copy(module.config)
    for name in (*unit.counts, *unit.divided):
        owner, _, last = name.rpartition(".")
        holder = getattr(module, owner, None) if owner else module
        if isinstance(getattr(holder, last, None), int):
            setattr(holder, last, max(1, getattr(holder, last) // ranks))
    if unit.counts_heads is not None:
        headed(module, unit.counts_heads, exchange)
    for name in unit.wide:
        if getattr(module, name, None) is not None:
            widen(module, name, exchange)
    _surround(module, exchange)


def _surround(module: Any, exchange: Exchange) -> None:
    """Before a layer the sequence is gathered; after it the ranks' outputs are summed and parted again."""
    forward = module.forward

    @functools.wraps(forward)
    def on_whole_sequence(*args: Any, **kwargs: Any) -> Any:
        if args:
            args = (exchange.whole(args[0]), *args[1:])
        else:
            kwargs["hidden_states"] = exchange.whole(kwargs["hidden_states"])
        out = forward(*args, **kwargs)
        return (exchange.parts(out[0]), *out[1:]) if isinstance(out, tuple) else exchange.parts(out)

    module.forward = on_whole_sequence


def _after(module: Any, exchange: Callable[[Tensor], Tensor]) -> None:
    forward = module.forward
    module.forward = lambda *args, **kwargs: exchange(forward(*args, **kwargs))  # pyright: ignore


def _adapt_embedding(embedding: Any, exchange: Exchange) -> None:
    """Each rank looks up the tokens of its part of the vocabulary; the sum is parted along the sequence."""
    step = -(-embedding.num_embeddings // exchange.size)
    first = step * exchange.rank
    padding: int | None = embedding.padding_idx  # its gradient stays zero
    embedding.padding_idx = padding - first if padding is not None and 0 <= padding - first < step else None
    forward = embedding.forward
    rows = max(0, min(step, embedding.num_embeddings - first))

    def look_up(tokens: Tensor) -> Tensor:
        own = tokens - first
        others = (own < 0) | (own >= rows)
        states = cast("Tensor", forward(own.masked_fill(others, 0)))
        return exchange.parts(states.masked_fill(others.unsqueeze(-1), 0.0))

    embedding.forward = look_up


# ---------------------------------------------------------------------------------------- check


def plan_problem(model: nn.Module, family: Family, ranks: int) -> str | None:
    """Why a model on meta cannot be divided over `ranks`, and what can be done; None where it can."""
    common = 0
    undivided: str | None = None
    for name, module, unit in units(model):
        for count in unit.counts:
            value: int = functools.reduce(getattr, count.split("."), module)
            common = gcd(common, value)
            if value % ranks and undivided is None:
                undivided = f"{count.rpartition('.')[2]} is {value} in {name} ({type(module).__name__})"
        reason = unit.refuses(module, ranks)
        if reason is not None:
            return f"{name} has {reason}; use parallel.shard"
    if undivided is not None:
        sizes = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        return f"{undivided}, which does not divide; sizes that do: {sizes}"
    vocabulary = family.head(model).out_features
    if -(-vocabulary // ranks) * (ranks - 1) >= vocabulary:
        return f"vocab_size is {vocabulary}, which leaves a rank without a part; use fewer ranks"
    strange = next(_unknown(model, family), None)
    if strange is not None:
        return f"the plan for {family.name} models does not know {strange}; use parallel.shard"
    return None


def _unknown(model: nn.Module, family: Family) -> Iterator[str]:
    """Parameters of layers that their plan does not name, and matrices outside of all layers."""
    plan = family.tensor
    assert plan is not None
    known = {id(family.embedding(model).weight), id(family.head(model).weight)}
    inside: set[int] = set()
    for _, module, unit in units(model):
        stacked = tuple(name for name, _ in unit.stacked)
        names = (*unit.columns, *unit.rows, *unit.shared, *stacked)
        known |= {id(parameter) for _, _, parameter in named(module, names)}
        inside |= {id(parameter) for parameter in module.parameters()}
    tables = {name for name, _ in plan.tables} | {f"{plan.positions}.weight"}
    for name, parameter in model.named_parameters():
        free = id(parameter) not in inside and (parameter.ndim < 2 or name in tables)
        if id(parameter) not in known and not free:
            yield name

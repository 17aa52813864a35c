"""Models built on meta, and initialised bitwise equally however their parameters are sharded."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig

from flame.errors import ModelError
from flame.models.family import Family
from flame.models.registry import family_of

# what torch.compile and activation checkpointing put into the names of wrapped modules
_WRAPPERS = re.compile(r"(_orig_mod|_checkpoint_wrapped_module)\.")


def build_on_meta(config: PretrainedConfig) -> nn.Module:
    """The model of `config` on the meta device, float32, for training: no cache, no loss of its own.

    `config` stays as it is. Raises ModelError where no family trains it.
    """
    return family_of(config).build(config)


def initialize(model: nn.Module, config: PretrainedConfig, seed: int, device: torch.device | str) -> None:
    """Materialise a model built on meta, possibly sharded there, and give it its initial weights.

    One unit at a time (a block, or a module outside the blocks) is made at full shape on `device`,
    initialised by the model's own rule, children first, with the generators seeded by (seed, module
    name) before each module; this rank's shards are copied and the rest freed. The result depends on
    the seed and the kind of device alone; there is no communication. The generators are left as they
    were. Raises ModelError naming a parameter that the model's rule leaves unset.
    """
    device = torch.device(device)
    blueprint = build_on_meta(config)
    family = family_of(config)
    units = _units(blueprint, {name for name, _ in family.blocks(blueprint)})
    _materialize(model, device)
    wanted = _wanted(model)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        for prefix, unit in units:
            names = [_join(prefix, name) for name, _ in _tensors(unit)]
            if not any(name in wanted for name in names):
                continue  # another pipeline stage's
            _fill(unit, device)
            _initialize_unit(blueprint, family, prefix, unit, seed)
            for name, value in _tensors(unit):
                full_name = _join(prefix, name)
                if value.is_floating_point() and bool(value.isnan().any()):
                    raise ModelError(
                        f"{full_name}: the {config.model_type} model's own initialisation leaves it unset"
                    )
                if full_name in wanted:
                    _copy_shard(wanted.pop(full_name), value)
            unit.to("meta")
    if wanted:
        raise ModelError(f"{', '.join(wanted)}: not in a {config.model_type} model of this config")


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _units(module: nn.Module, blocks: set[str], prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Blocks whole, and outside them the modules that hold no block. What holds both blocks and
    parameters of its own (HGRN's lower bounds) is a unit of those parameters alone."""
    if prefix in blocks or not any(_inside(prefix, block) for block in blocks):
        yield prefix, module
        return
    if next(module.parameters(recurse=False), None) is not None:
        yield prefix, _bare(module)
    for name, child in module.named_children():
        yield from _units(child, blocks, _join(prefix, name))


def _bare(module: nn.Module) -> nn.Module:
    """The module without its children, its own parameters shared with it."""
    bare: Any = copy.copy(module)
    bare._modules, bare._parameters = {}, dict(bare._parameters)
    return bare


def _inside(prefix: str, block: str) -> bool:
    return not prefix or block.startswith(f"{prefix}.")


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, each name of a tied parameter included."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _wanted(model: nn.Module) -> dict[str, Tensor]:
    """What is to be filled, by name without wrappers, a tied parameter by its first name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {_WRAPPERS.sub("", name): tensor for name, tensor in named}


def _materialize(model: nn.Module, device: torch.device) -> None:
    """Empty storage for all parameters and buffers. Sharded parameters go through `Module._apply`,
    which FSDP2 listens to; it makes a tied parameter anew in each place, so ties are made again."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in cast("Any", module)._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    model.to_empty(device=device)
    for (first, first_name), *others in places.values():
        for module, name in others:
            cast("Any", module)._parameters[name] = getattr(first, first_name)


def _fill(unit: nn.Module, device: torch.device) -> None:
    """The unit's own tensors at full shape on `device`, NaN until something sets them."""
    _materialize(unit, device)
    for _, tensor in _tensors(unit):
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))


def _initialize_unit(model: nn.Module, family: Family, prefix: str, unit: nn.Module, seed: int) -> None:
    ordered = list(unit.named_modules())
    for name, module in sorted(ordered, key=lambda pair: -_depth(pair[0])):
        full_name = _join(prefix, name)
        digest = hashlib.blake2b(f"{seed}\0{full_name}".encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest, "little") >> 1)
        family.initialize(model, full_name, module)


def _depth(name: str) -> int:
    return len(name.split(".")) if name else 0


def _copy_shard(target: Tensor, full: Tensor) -> None:
    if not isinstance(target, DTensor):
        target.copy_(full)
        return
    local = cast("Any", target).to_local()
    local.copy_(full[local_slices(target)])


def local_slices(target: Tensor) -> tuple[slice, ...]:
    """Which part of the whole tensor this rank holds, a slice a dimension: cut as DTensor cuts, in
    ceil(n / ranks) steps, mesh dimension after mesh dimension. FSDP over tensor parallelism marks its own,
    later cut as strided."""
    bounds = [(0, size) for size in target.shape]
    if isinstance(target, DTensor):
        mesh = target.device_mesh
        placements = list(enumerate(cast("tuple[Any, ...]", target.placements)))
        strided = [pair for pair in placements if hasattr(pair[1], "split_factor")]
        for mesh_dim, placement in [p for p in placements if p not in strided] + strided:
            if placement.is_replicate():
                continue
            if not (placement.is_shard() or hasattr(placement, "split_factor")):
                raise ModelError(f"a parameter placed as {placement} cannot be filled")
            first, length = bounds[placement.dim]
            step = -(-length // mesh.size(mesh_dim))
            start = min(step * mesh.get_local_rank(mesh_dim), length)
            bounds[placement.dim] = (first + start, min(step, length - start))
    return tuple(slice(first, first + length) for first, length in bounds)

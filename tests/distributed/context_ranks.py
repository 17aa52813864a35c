"""Ranks that run a model on rows that are cut among them, and compare with the same on whole rows."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpu.untuned import leave_untuned
from models.small_models import SMALL, initialized, larger, packed
from torch import Tensor, nn

from flame.batch import Batch
from flame.models.family import Family
from flame.models.registry import family_of
from flame.parallel import context_mixers
from flame.parallel.context import split_batch
from flame.train.journal import read_lines


@dataclass(frozen=True, slots=True)
class Difference:
    """Of a cut run from the whole one, the worst over all ranks and tensors."""

    name: str
    hidden: float  # in parts of the largest value
    gradients: float  # each parameter's, in parts of its own norm
    leaked: float  # absolute gradients of one document's states in other documents' tokens, summed
    ahead: float  # and of states in later tokens of their own document


def compare(names: list[str], rows: list[list[int]], method: str, to: Path, gpu: bool = False) -> int:
    """Work for `Ranks`: rank 0 writes a `Difference` for each model into the file `to`, one after another."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
        leave_untuned()
    dist.init_process_group("nccl" if gpu else "gloo", rank=rank, world_size=ranks)
    context_mixers.install()
    for name in names:
        found = _compared(name, rows, method, device)
        if rank == 0:
            with to.open("a") as file:
                file.write(json.dumps(asdict(found)) + "\n")
    dist.destroy_process_group()
    return 0


def differences(path: Path) -> list[Difference]:
    return [Difference(**record) for record in read_lines(path)]


def _compared(name: str, rows: list[list[int]], method: str, device: torch.device) -> Difference:
    on_gpu = device.type == "cuda"
    config = larger(name) if on_gpu else SMALL[name]
    family, model = family_of(config), initialized(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # weights that make every path count
        for parameter in model.parameters():
            if parameter.ndim > 1:
                noise = 0.05 * torch.randn(parameter.shape, generator=generator)
                _ = parameter.mul_(1 if on_gpu else 4).add_(noise)
    model = model.to(device, torch.bfloat16 if on_gpu else torch.float32)
    tokens, positions, cu_seqlens, longest = packed(rows)
    batch = Batch(tokens, tokens, positions, cu_seqlens, longest, 0)
    cut = split_batch(copy.copy(batch), _world(), method).to(device)
    batch = batch.to(device)
    start = dist.get_rank() * cut.tokens.numel()
    end = start + cut.tokens.numel()

    # all states, weighed at random: every gradient takes part
    hidden = _states(family, model, batch)[0]
    weights = torch.randn(hidden.shape, generator=generator).to(device)
    wanted = _gradients(model, (hidden.float() * weights).sum())
    part = _states(family, model, cut)[0]
    got = _gradients(model, (part.float() * weights[start:end]).sum())
    worst = 0.0
    for parameter, gradient in wanted.items():
        total = got[parameter].float()
        dist.all_reduce(total)
        size = float(gradient.float().norm())
        if size:
            worst = max(worst, float((total - gradient.float()).norm()) / size)
    apart = float((part - hidden[start:end]).detach().abs().max() / hidden.detach().abs().max())
    unseen = [_unseen(family, model, cut, document) for document in _documents(cu_seqlens)]
    largest = torch.tensor([apart, worst, *map(max, zip(*unseen, strict=True))], device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return Difference(name, *largest.tolist())


def _world() -> Any:
    return dist.group.WORLD


def _documents(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    bounds = cu_seqlens.tolist()
    return list(pairwise(bounds))


def _states(family: Family, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Hidden states and embedded tokens, [tokens, ...]."""
    embedded: list[Tensor] = []
    hook = family.embedding(model).register_forward_hook(lambda _m, _i, out: embedded.append(out))
    hidden = family.hidden(model, batch.tokens, batch.positions, batch.cu_seqlens, batch.longest_segment)
    hook.remove()
    return hidden.flatten(0, 1), embedded[0]


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def _unseen(family: Family, model: nn.Module, cut: Batch, document: tuple[int, int]) -> tuple[float, float]:
    """What the states of a document's first half have of absolute gradients, summed, in other documents and
    in its second half. Raises AssertionError where they have none in what they see."""
    start, end = document
    middle = (start + end + 1) // 2
    hidden, embedded = _states(family, model, cut)
    size = hidden.shape[0]
    places = torch.arange(size, device=hidden.device) + dist.get_rank() * size
    inside = (places >= start) & (places < middle)
    ahead = (places >= middle) & (places < end)
    (gradient,) = torch.autograd.grad((hidden.float().square() * inside[:, None]).sum(), embedded)
    by_token = gradient.float().abs().reshape(size, -1).sum(-1)
    assert bool((by_token[inside] > 0).all()), "a token has no gradient in its own document"
    return float(by_token[~(inside | ahead)].sum()), float(by_token[ahead].sum())

"""What a step costs the host beside the model's own work, for a model of many small matrices.

    python benchmarks/host.py [--parameters 288] [--steps 15]

One rank, one thread, CPU. Milliseconds a step (medians) of forward, backward, and of all that follows:
gradient norm, clipping and AdamW. `dtensors`: FSDP2, everything on its DTensors, as torch's own utilities
do it; `shards`: FSDP2, with the optimizer on plain local tensors; `whole`: a rank alone, without FSDP2.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

import torch
from torch import nn

from flame.environment import processor_name
from flame.parallel.config import ParallelConfig
from flame.parallel.fsdp import shard
from flame.parallel.mesh import data_mesh, resolve_layout
from flame.parallel.world import join_world
from flame.train.config import OptimizerConfig
from flame.train.groups import group_parameters
from flame.train.optimizer import build_optimizer
from flame.train.shards import Shards, WholeModel, clip
from flame.train.step import update

WIDTH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parameters", type=int, default=288)
    parser.add_argument("--steps", type=int, default=15)
    options = parser.parse_args()
    world = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29761"}
    os.environ.update(world)
    torch.set_num_threads(1)
    join_world()
    result = {way: measure(way, options) for way in ("dtensors", "shards", "whole")}
    print(json.dumps({"milliseconds": result, "parameters": options.parameters, "device": processor_name()}))
    os._exit(0)


def measure(way: str, options: argparse.Namespace) -> dict[str, float]:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(options.parameters)))
    if way != "whole":
        shard(model, [], data_mesh(resolve_layout(ParallelConfig(), 1), "cpu"), torch.float32)
    shards = WholeModel(model, torch.float32) if way == "whole" else Shards(model)
    shapes = {piece.name: tuple(piece.parameter.shape) for piece in shards.pieces}
    groups = group_parameters(OptimizerConfig(), shapes, undecayed=())
    optimizer = build_optimizer(shards, OptimizerConfig(), groups, fused=True)
    if way == "dtensors":
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    times: dict[str, list[float]] = {"forward": [], "backward": [], "update": []}
    for _ in range(options.steps):
        marks = [time.perf_counter()]
        loss = model(torch.randn(4, WIDTH)).sum()
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        if way == "dtensors":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        else:
            shards.collect()
            gradients = shards.take_gradients()
            norm = shards.gradient_norm()
            clip(gradients, norm, 1.0)
            update(optimizer, norm)
            shards.updated()
            shards.drop_gradients()
        marks.append(time.perf_counter())
        for name, begin, end in zip(times, marks, marks[1:], strict=False):
            times[name].append(1000 * (end - begin))
    return {name: round(statistics.median(found), 2) for name, found in times.items()}


if __name__ == "__main__":
    main()

"""When gradients are reduced and gathered parameters are freed changes memory and traffic, and not what is
trained."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed.layouts import ALONE, assert_same, assert_trains_the_same, named, recipes, trained
from distributed.ranks import Ranks
from torch import nn
from torch.distributed.fsdp._fully_shard._fsdp_param_group import foreach_all_gather

from flame.parallel.fsdp import settle, shard
from flame.parallel.mesh import Layout, build_meshes
from flame.parallel.world import join_world
from flame.train.shards import Shards

recipe_of = pytest.fixture(recipes)

# a step of 12 rows has 12, 6, 4 or 6 micro-batches of a row on each of these ranks
EACH = {"reduce": "micro_batch"}
LLAMA_RANKS: list[dict[str, Any]] = [{"shard": 2}, {"shard": 3}, {"replicate": 2}]
SLOW: list[dict[str, Any]] = [{"replicate": 2, "shard": 2}, {"shard": 2, "tensor": 2}]


@pytest.mark.parametrize(
    "parallel", [*LLAMA_RANKS, *(pytest.param(ways, marks=pytest.mark.slow) for ways in SLOW)], ids=named
)
def test_gradients_reduced_with_every_micro_batch_train_the_same(parallel, recipe_of) -> None:
    assert_trains_the_same(recipe_of, "llama", parallel | EACH)


def test_one_rank_has_nothing_to_reduce(recipe_of) -> None:
    found = trained(recipe_of("one", "llama", EACH), EACH)
    if "llama" not in ALONE:
        ALONE["llama"] = trained(recipe_of("alone", "llama", {}), {})
    assert [r["loss"] for r in found] == [r["loss"] for r in ALONE["llama"]]


@pytest.mark.slow
def test_a_recurrent_model_trains_the_same(recipe_of) -> None:
    assert_trains_the_same(recipe_of, "gla", {"shard": 2} | EACH)


VALIDATION = {"[checkpoint]": '[validation]\nevery = "2 steps"\nfraction = 0.2\n[checkpoint]'}
KEPT: list[dict[str, Any]] = [
    {"shard": 2, "reshard": "micro_batch"},
    {"shard": 2, "reshard": "step"},
    {"replicate": 2, "shard": 2, "reshard": "step", "reduce": "micro_batch"},
]


@pytest.mark.parametrize("parallel", KEPT, ids=named)
def test_parameters_that_stay_gathered_train_the_same(parallel, recipe_of) -> None:
    """With a validation pass between steps, which has to see new values."""
    if "validated" not in ALONE:
        ALONE["validated"] = trained(recipe_of("alone", "llama", {}, replaced=VALIDATION), {})
    found = trained(recipe_of("kept", "llama", parallel, replaced=VALIDATION), parallel)
    assert_same(ALONE["validated"], found, parallel)


GROUP = "torch.distributed.fsdp._fully_shard._fsdp_param_group"


def gathers(reshard: str, batches: int) -> int:
    """Counts what is gathered in a step of `batches` micro-batches, with two blocks and the rest."""
    join_world()
    torch.manual_seed(1)
    blocks = [nn.Linear(6, 6), nn.Linear(6, 6)]
    model = nn.Sequential(nn.Linear(6, 6), *blocks)
    shard(
        model,
        blocks,
        build_meshes(Layout(shard=2), "cpu").data,
        torch.float32,
        keep_gathered=reshard != "forward",
    )
    shards = Shards(model, gather_once=reshard == "step")
    settle(model)
    with mock.patch(f"{GROUP}.foreach_all_gather", side_effect=foreach_all_gather) as gather:
        for number in range(batches):
            shards.begin(model, last=number == batches - 1)
            model(torch.randn(3, 6)).sum().backward()
    dist.destroy_process_group()
    return gather.call_count


def assert_gathers(reshard: str, batches: int, wanted: int) -> int:
    found = gathers(reshard, batches)
    assert found == wanted, found
    return 0


@pytest.mark.parametrize(
    ("reshard", "wanted"),
    [("forward", 3 * (2 * 2 + 1)), ("micro_batch", 3 * 3), ("step", 3)],
)
def test_parameters_are_gathered_as_often_as_the_plan_counts(reshard: str, wanted: int) -> None:
    assert Ranks(2, assert_gathers, reshard, 3, wanted).codes() == [0, 0]

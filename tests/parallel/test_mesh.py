"""Which layouts are possible, and what is said of the others."""

from __future__ import annotations

import pytest

from flame.errors import RecipeError
from flame.parallel.config import ParallelConfig
from flame.parallel.mesh import Layout, Place, ranks_around, resolve_layout
from flame.parallel.world import first_host


@pytest.mark.parametrize(
    ("sizes", "world", "layout"),
    [
        ({}, 8, Layout(shard=8)),
        ({"replicate": 2}, 8, Layout(2, 4)),
        ({"replicate": 4, "shard": 2}, 8, Layout(4, 2)),
        ({"shard": 1}, 1, Layout()),
        ({"tensor": 2, "context": 2, "pipeline": 2}, 16, Layout(shard=2, context=2, tensor=2, pipeline=2)),
        ({"tensor": 8}, 8, Layout(tensor=8)),
    ],
)
def test_minus_one_fills(sizes: dict[str, int], world: int, layout: Layout) -> None:
    assert resolve_layout(ParallelConfig(**sizes), world) == layout
    assert layout.ranks == world


@pytest.mark.parametrize(
    ("sizes", "world", "words"),
    [
        ({"replicate": 3}, 8, ["replicate 3", "1, 2, 4, 8", "--nproc 3"]),
        ({"replicate": 0}, 8, ["parallel.replicate", "at least 1"]),
        ({"shard": 3}, 8, ["3 ranks", "there are 8", "shard = 8", "--nproc 3"]),
        ({"replicate": 2, "shard": 0}, 4, ["parallel.shard", "or -1"]),
        ({"tensor": 2, "pipeline": 3}, 8, ["tensor 2 x pipeline 3", "--nproc 6"]),
        ({"tensor": 4, "shard": 4}, 8, ["tensor 4 x shard 4", "shard = 2", "--nproc 16"]),
        ({"tensor": 16}, 8, ["tensor 16", "--nproc 16"]),
    ],
)
def test_other_layouts_are_refused_with_sizes_that_work(
    sizes: dict[str, int], world: int, words: list[str]
) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve_layout(ParallelConfig(**sizes), world)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"), [("reduce", "micro_batch"), ("reshard", "forward"), ("reshard", "micro_batch")]
)
def test_a_pipeline_gathers_and_reduces_once_a_step(name: str, value: str) -> None:
    config = ParallelConfig(pipeline=2, **{name: value})
    with pytest.raises(RecipeError, match=f'parallel.{name}: "{value}".*pipeline = 2.*once a step'):
        resolve_layout(config, 2)
    assert resolve_layout(ParallelConfig(pipeline=2, reshard="step"), 2) == Layout(pipeline=2)
    assert ParallelConfig(pipeline=2).freed_after == "step"
    assert ParallelConfig().freed_after == "forward"


def test_every_rank_has_a_place_of_its_own_and_each_data_rank_one_that_speaks() -> None:
    layout = Layout(replicate=2, shard=3, context=2, tensor=2, pipeline=2)
    places = [layout.place(rank) for rank in range(layout.ranks)]
    assert len(set(places)) == layout.ranks == 48
    assert sorted(place.data for place in places if place.speaks) == list(range(6))
    # neighbours share a row's matrices, then its length; stages are farthest apart
    assert [places[1], places[2], places[4], places[24]] == [
        Place(tensor=1),
        Place(context=1),
        Place(data=1),
        Place(pipeline=1),
    ]


def test_ranks_of_torchrun_and_srun_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert ranks_around() is None
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert ranks_around() == 4
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ranks_around() == 2


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu[03-05,9],login1", "gpu03"), ("a1,b2", "a1"), ("node7", "node7"), ("x[12]", "x12")],
)
def test_the_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host

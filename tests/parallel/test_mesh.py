"""Which layouts are possible, and what is said of the others."""

from __future__ import annotations

import pytest

from flame.errors import RecipeError
from flame.parallel.config import ParallelConfig
from flame.parallel.mesh import Layout, ranks_around, resolve_layout
from flame.parallel.world import first_host


@pytest.mark.parametrize(
    ("replicate", "shard", "world", "layout"),
    [(1, -1, 8, Layout(1, 8)), (2, -1, 8, Layout(2, 4)), (4, 2, 8, Layout(4, 2)), (1, 1, 1, Layout(1, 1))],
)
def test_minus_one_fills(replicate: int, shard: int, world: int, layout: Layout) -> None:
    assert resolve_layout(ParallelConfig(replicate, shard), world) == layout
    assert layout.data_ranks == world


@pytest.mark.parametrize(
    ("replicate", "shard", "world", "words"),
    [
        (3, -1, 8, ["parallel.replicate", "1, 2, 4, 8"]),
        (0, -1, 8, ["parallel.replicate"]),
        (1, 3, 8, ["3 ranks", "there are 8", "shard = 8", "--nproc 3"]),
        (2, 0, 4, ["shard = 2"]),
    ],
)
def test_other_layouts_are_refused_with_sizes_that_work(
    replicate: int, shard: int, world: int, words: list[str]
) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve_layout(ParallelConfig(replicate, shard), world)
    for word in words:
        assert word in str(caught.value)


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

"""How blocks are shared out over the stages of a pipeline, and what is refused."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models.small_models import SMALL, initialized, packed, untied

from flame.errors import RecipeError
from flame.models.build import build_on_meta, initialize
from flame.models.registry import families, family_of
from flame.parallel.config import SCHEDULES, ParallelConfig
from flame.parallel.mesh import Layout
from flame.parallel.pipeline import (
    ORDERS,
    Part,
    Parts,
    Stages,
    balanced,
    check_micro_batches,
    plan_stages,
    present_blocks,
    split_blocks,
)

LLAMA = SMALL["llama"]


def largest(counts: tuple[int, ...], costs: list[float], first: float, last: float) -> float:
    sums, start = [], 0
    for count in counts:
        sums.append(sum(costs[start : start + count]))
        start += count
    sums[0] += first
    sums[-1] += last
    return max(sums)


cost = st.floats(0, 10)


@given(st.lists(cost, min_size=1, max_size=9), cost, cost, st.data())
def test_no_split_has_a_smaller_largest_stage(costs, first, last, data) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    counts = balanced(costs, first, last, stages)
    assert len(counts) == stages
    assert sum(counts) == len(costs)
    assert min(counts) >= 1
    cuts = [(0, *inner, len(costs)) for inner in combinations(range(1, len(costs)), stages - 1)]
    every = [tuple(b - a for a, b in pairwise(cut)) for cut in cuts]
    best = min(largest(other, costs, first, last) for other in every)
    assert largest(tuple(counts), costs, first, last) == pytest.approx(best)


def test_equal_blocks_are_shared_evenly_and_a_large_head_counts() -> None:
    assert balanced([1.0] * 8, 0, 0, 4) == [2, 2, 2, 2]
    assert balanced([1.0] * 8, 1.0, 3.0, 4) == [1, 3, 3, 1]
    config = untied("llama", 12)
    config.vocab_size = 600  # the head has FLOPs and parameters, the embedding parameters alone
    family, stages = family_of(config), Stages("1f1b", 3, 1)
    assert split_blocks(family, build_on_meta(config), stages, None) == [4, 5, 3]
    assert split_blocks(family, build_on_meta(config), stages, [1, 10, 1]) == [1, 10, 1]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_stage_is_on_one_rank(schedule: str) -> None:
    order = ORDERS[schedule]
    stages = Stages(schedule, 4, order.stages_per_rank)
    held = [stage for rank in range(4) for stage in stages.of(rank)]
    assert sorted(held) == list(range(stages.count))


def test_what_zbv_puts_on_a_rank() -> None:
    assert [Stages("zbv", 3, 2).of(rank) for rank in range(3)] == [[0, 5], [1, 4], [2, 3]]
    assert [Stages("interleaved", 2, 3).of(rank) for rank in range(2)] == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize("family", [f for f in families() if f.pipeline], ids=lambda f: f.name)
def test_stages_hold_each_parameter_once_under_its_own_name(family) -> None:
    config = untied(family.name, 3)
    whole = {name: p.shape for name, p in build_on_meta(config).named_parameters()}
    models = []
    for stage in range(3):
        model = build_on_meta(config)
        Part(model, family, config, [1, 1, 1], stage)
        assert len(present_blocks(family, model)) == 1
        models.append(model)
    held = [(name, p.shape) for model in models for name, p in model.named_parameters()]
    assert sorted(held) == sorted(whole.items())
    parts = Parts(models)
    assert {name for name, _ in parts.named_parameters()} == set(whole)
    assert set(parts.state_dict(keep_vars=True)) == set(build_on_meta(config).state_dict())
    assert sum(p.numel() for p in parts.parameters()) == sum(torch.Size(s).numel() for s in whole.values())


@pytest.mark.parametrize("name", [name for name in SMALL if not name.endswith("-tied")])
def test_stages_in_a_row_compute_what_the_whole_model_does(name: str) -> None:
    """States bit for bit, and the gradient of every parameter, of packed rows."""
    config = untied(name, 3)
    family = family_of(config)
    arguments = packed([[3, 20, 1], [11, 13]])
    whole = initialized(config)
    wanted = family.hidden(whole, *arguments)
    wanted.square().sum().backward()

    received: tuple[torch.Tensor, ...] = ()
    gradients: dict[str, torch.Tensor | None] = {}
    models = []
    for stage in range(3):
        model = build_on_meta(config)
        part = Part(model, family, config, [1, 1, 1], stage)
        initialize(model, config, 1, "cpu")
        part.enter(received)
        states = family.hidden(model, *arguments)
        if not part.last:
            received = part.leave(torch.float32, 2)
            assert [tensor.shape for tensor in received] == [torch.Size(s) for s in part.shapes(2, 24)]
        models.append(model)
    torch.testing.assert_close(states, wanted, rtol=0, atol=0)
    states.square().sum().backward()
    for model in models:
        gradients |= {name: parameter.grad for name, parameter in model.named_parameters()}
    for parameter_name, parameter in whole.named_parameters():
        found = gradients[parameter_name]
        assert (found is None) == (parameter.grad is None), parameter_name
        if found is not None:
            torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-6, msg=parameter_name)


@pytest.mark.parametrize(
    ("parallel", "config", "words"),
    [
        ({}, SMALL["llama-tied"], ["parallel.pipeline: 2", "tie_word_embeddings", "parallel.shard"]),
        ({"pipeline_schedule": "interleaved"}, LLAMA, ["2 ranks x 2 stages", "4 stages", "2 blocks"]),
        ({"pipeline_schedule": "zbv", "pipeline_stages_per_rank": 3}, LLAMA, ["found 3", "zbv takes 2"]),
        ({"pipeline_stages_per_rank": 2}, LLAMA, ["found 2", "1f1b takes 1"]),
        (
            {"pipeline_schedule": "interleaved", "pipeline_stages_per_rank": 1},
            LLAMA,
            ["found 1", "interleaved takes at least 2"],
        ),
        ({"pipeline_split": [1, 2]}, LLAMA, ["[1, 2]", "3 blocks on 2 stages", "the model's 2 blocks"]),
        ({"pipeline_split": [2]}, LLAMA, ["[2]", "expected 2 numbers"]),
        ({"pipeline_split": [0, 2]}, LLAMA, ["[0, 2]", "at least 1"]),
    ],
)
def test_what_cannot_be_cut_is_refused(parallel, config, words) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_stages(ParallelConfig(pipeline=2, **parallel), family_of(config), config, Layout(pipeline=2))
    for word in words:
        assert word in str(caught.value)


def test_stages_as_the_recipe_says() -> None:
    family = family_of(LLAMA)
    assert plan_stages(ParallelConfig(), family, LLAMA, Layout(shard=2)) is None
    for split in (None, [1, 1]):
        parallel = ParallelConfig(pipeline=2, pipeline_split=split)
        assert plan_stages(parallel, family, LLAMA, Layout(pipeline=2)) == Stages("1f1b", 2, 1)


def test_numbers_of_micro_batches_that_a_schedule_cannot_take_are_refused() -> None:
    assert check_micro_batches(Stages("1f1b", 4, 1), [4, 5, 64]) is None
    note = check_micro_batches(Stages("1f1b", 4, 1), [64, 3])
    assert note is not None
    assert note.startswith("3 micro-batches a step on 4 pipeline stages")
    assert check_micro_batches(Stages("interleaved", 4, 2), [8, 10]) is None
    with pytest.raises(RecipeError, match="interleaved on 4 ranks takes a multiple of 2, such as 10 micro"):
        check_micro_batches(Stages("interleaved", 4, 2), [8, 11])
    with pytest.raises(RecipeError, match="zbv on 4 ranks takes at least 7 micro-batches a step, but has 6"):
        check_micro_batches(Stages("zbv", 4, 2), [8, 6])


@given(
    st.sampled_from(list(SCHEDULES)),
    st.integers(2, 8),
    st.integers(1, 4),
    st.integers(1, 40),
)
def test_without_a_way_back_no_rank_has_two_stages_at_work_at_once(
    schedule: str, ranks: int, per_rank: int, batches: int
) -> None:
    order = ORDERS[schedule]
    per_rank = min(max(per_rank, order.fewest), order.most or per_rank)
    stages = Stages(schedule, ranks, per_rank)
    assert [stages.rank_of(stage) for rank in range(ranks) for stage in stages.of(rank)] == [
        rank for rank in range(ranks) for _ in range(per_rank)
    ]
    begins = [stages.begins(number) for number in range(batches)]
    assert begins[0] == 0 and all(first < second for first, second in pairwise(begins))
    at_work = [(begin + stage, stages.rank_of(stage)) for begin in begins for stage in range(stages.count)]
    assert len(set(at_work)) == len(at_work)
    # there is always one on its way until the last has come through, and in the long run nobody waits
    assert all(second - first <= stages.count for first, second in pairwise(begins))
    assert begins[-1] <= per_rank * batches + stages.count

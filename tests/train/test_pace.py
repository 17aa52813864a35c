"""Which ranks count as slow, and what of a step is counted."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn

from flame.train.pace import BlockClock, Slow, slow_ranks, usually


def test_a_rank_far_above_the_others_is_slow_and_the_larger_loss_is_named() -> None:
    usual = [0.0, 1.0, 0.2, 0.01]
    assert slow_ranks([usual] * 4, 1.5) == []
    assert slow_ranks([usual, [0.0, 1.0, 0.4, 0.01], usual], 1.5) == [
        Slow(1, "computing", pytest.approx(0.41), pytest.approx(0.21), 1.0)
    ]
    (slow,) = slow_ranks([usual, usual, usual, [0.0, 1.0, 0.21, 0.5]], 1.5)
    assert (slow.rank, slow.kind) == (3, "data")
    assert slow_ranks([usual, [0.0, 1.0, 0.25, 0.01], usual], 1.5) == []  # not by so much


def test_what_hardly_lengthens_a_step_is_no_matter() -> None:
    assert slow_ranks([[0.0, 1.0, 0.01, 0.0], [0.0, 1.0, 0.02, 0.0]], 1.5) == []
    assert slow_ranks([[0.0, 1.0, 0.0, 0.01], [0.0, 1.0, 0.0, 0.04]], 1.5) == []
    assert len(slow_ranks([[0.0, 1.0, 0.01, 0.0], [0.0, 1.0, 0.04, 0.0]], 1.5)) == 1  # and its backward pass


def test_a_pause_for_once_makes_no_rank_slow_and_many_do() -> None:
    assert usually([0.1] * 9 + [5.0]) == pytest.approx(0.1)
    assert usually([0.1] * 7 + [0.5] * 3) > 0.15


def test_ranks_are_compared_with_those_that_do_the_same_work() -> None:
    first, last = [0.0, 1.0, 0.2, 0.0], [1.0, 1.0, 0.6, 0.0]
    assert slow_ranks([first, last, first, last], 1.5) == []
    assert slow_ranks([first, last], 1.5) == []  # with nobody
    assert [slow.rank for slow in slow_ranks([first, last, first, [1.0, 1.0, 0.2, 0.0]], 1.5)] == [1]


class Sleeper(nn.Module):
    def forward(self, x: Any) -> Any:
        time.sleep(0.02)
        return x


def test_the_first_forward_pass_of_each_block_and_step_is_timed_without_what_comes_before_it() -> None:
    blocks = [Sleeper(), Sleeper()]
    for block in blocks:  # as FSDP waits for parameters
        block.register_forward_pre_hook(lambda *_: time.sleep(0.05), prepend=True)
        block.register_forward_hook(lambda *_: time.sleep(0.05))
    clock = BlockClock(blocks, torch.device("cpu"))
    model = nn.Sequential(*blocks)
    for micro_batches in (1, 3):
        for _ in range(micro_batches):
            model(0)
        clock.next_step()
    model.eval()
    model(0)  # a validation
    clock.next_step()
    one, three, none = clock.take()
    assert 0.04 <= one < 0.09
    assert 0.04 <= three < 0.09
    assert none == 0
    assert clock.take() == []

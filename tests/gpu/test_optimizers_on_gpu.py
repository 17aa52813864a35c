"""Optimizers on a GPU: torch's Muon, updates left out without asking the host, z-loss in bfloat16."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from train.test_muon import MOMENTUM, RATE, SHAPES, STEPS, gradients, matrices
from train.test_optimizers import CONFIGS, optimizer_of, state_of
from train.test_step import guest

from flame.batch import IGNORED
from flame.train.loss import cross_entropy_and_squares, fused_cross_entropy
from flame.train.muon import Muon
from flame.train.shards import Shards
from flame.train.step import update

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),  # triton and dynamo warn as they compile
]


@contextmanager
def no_waiting() -> Iterator[None]:
    """What makes the host wait for the device is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_muon_on_a_gpu_is_torchs() -> None:
    ours, torchs = matrices().cuda(), matrices().cuda()
    shards = Shards(ours)
    group = {"params": [p.local for p in shards.pieces], "lr": RATE, "weight_decay": 0.1}
    optimizer = Muon([group], shards.pieces, momentum=MOMENTUM, adjust_lr_fn="original")
    wanted = torch.optim.Muon(
        torchs.parameters(), lr=RATE, weight_decay=0.1, momentum=MOMENTUM, adjust_lr_fn="original"
    )
    for step in range(STEPS):
        for piece, other, gradient in zip(shards.pieces, torchs, gradients(step), strict=True):
            piece.local.grad, other.grad = gradient.cuda(), gradient.cuda()
        update(optimizer, torch.ones((), device="cuda"))
        wanted.step()
    for parameter, other in zip(ours, torchs, strict=True):
        torch.testing.assert_close(parameter, other, rtol=0, atol=1e-6)
    assert len(list(ours)) == len(SHAPES)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_update_is_left_out_without_waiting_for_the_device(name: str) -> None:
    shards = Shards(guest().cuda())
    optimizer = optimizer_of(shards, CONFIGS[name], fused=True)
    for norm in (1.0, math.nan, 1.0, math.inf):
        for piece in shards.pieces:
            piece.local.grad = torch.randn_like(piece.local)
            if not math.isfinite(norm):
                piece.local.grad.fill_(norm)
        before, value = state_of(shards, optimizer), torch.tensor(norm, device="cuda")
        with no_waiting():
            update(optimizer, value)
        after = state_of(shards, optimizer)
        same = [torch.equal(tensor, after[key]) for key, tensor in before.items()]
        assert all(same) if not math.isfinite(norm) else not any(same[: len(shards.pieces)])


def test_the_z_loss_in_bfloat16_is_near_float32_and_its_loss_is_that_of_the_fused_kernel() -> None:
    torch.manual_seed(0)
    states = torch.randn(5000, 64, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(1000, 64, device="cuda") / 8).bfloat16().requires_grad_()
    labels = torch.randint(0, 1000, (5000,), device="cuda")
    labels[::7] = IGNORED
    loss, squares = cross_entropy_and_squares(states, weight, None, labels)
    fused = fused_cross_entropy(states, weight, None, labels)
    torch.testing.assert_close(loss, fused, rtol=1e-3, atol=0)
    found = torch.autograd.grad(squares, [states, weight])
    exact = [t.detach().float().requires_grad_() for t in (states, weight)]
    logits = F.linear(exact[0], exact[1])[labels != IGNORED]
    plain = logits.logsumexp(-1).square().sum()
    torch.testing.assert_close(squares, plain, rtol=1e-3, atol=0)
    for a, b in zip(found, torch.autograd.grad(plain, exact), strict=True):
        assert (a.float() - b).norm() < 0.02 * b.norm()

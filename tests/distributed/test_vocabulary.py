"""The loss over a divided vocabulary, and what tensor ranks tell each other, with their gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed.ranks import Ranks
from torch.distributed.device_mesh import init_device_mesh

from flame.batch import IGNORED
from flame.parallel import vocabulary
from flame.parallel.exchange import Exchange
from flame.parallel.vocabulary import token_losses, vocabulary_cross_entropy, vocabulary_token_losses


def join() -> Exchange:
    dist.init_process_group("gloo")
    return Exchange(init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",)))


def compare_losses() -> int:
    exchange = join()
    vocabulary.CHUNK_TOKENS = 16  # so that 50 tokens are four chunks
    for size, bias, tokens in ((40, True, 50), (41, False, 50), (40, False, 7)):
        torch.manual_seed(size)
        states = torch.randn(tokens, 8, requires_grad=True)
        head = torch.nn.Linear(8, size, bias=bias)
        head.weight.data *= 30  # logits that overflow without their maxima
        labels = torch.randint(0, size, (tokens,))
        labels[::7] = IGNORED
        plain = F.cross_entropy(head(states), labels, ignore_index=IGNORED, reduction="sum")
        wanted = torch.autograd.grad(plain / 3, [states, *head.parameters()])

        step = -(-size // exchange.size)
        rows = slice(step * exchange.rank, step * (exchange.rank + 1))
        parts = [p.detach()[rows].clone().requires_grad_() for p in head.parameters()]
        loss = vocabulary_cross_entropy(
            exchange, rows.start, states, parts[0], parts[1] if bias else None, labels
        )
        torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-5)
        of_tokens = vocabulary_token_losses(
            exchange, rows.start, states, parts[0], parts[1] if bias else None, labels
        )
        each = F.cross_entropy(head(states), labels, ignore_index=IGNORED, reduction="none")
        torch.testing.assert_close(of_tokens, each, rtol=1e-6, atol=1e-5)
        got = torch.autograd.grad(loss / 3, [states, *parts])
        of_states = got[0].clone()
        dist.all_reduce(of_states)  # what the gather's backward does
        torch.testing.assert_close(of_states, wanted[0], rtol=1e-5, atol=1e-5)
        for a, b in zip(got[1:], wanted[1:], strict=True):
            torch.testing.assert_close(a, b[rows], rtol=1e-5, atol=1e-5)
    return leave()


def compare_normalisers() -> int:
    exchange = join()
    torch.manual_seed(3)
    logits = torch.randn(12, 10, requires_grad=True)
    labels = torch.randint(0, 10, (12,))
    mine = exchange.mine(logits).detach().requires_grad_()
    losses, normalisers = token_losses(exchange, 5 * exchange.rank, mine, labels)
    torch.testing.assert_close(losses, F.cross_entropy(logits, labels, reduction="none"))
    torch.testing.assert_close(normalisers, logits.logsumexp(-1))
    wanted = F.cross_entropy(logits, labels, reduction="sum") + 0.1 * logits.logsumexp(-1).square().sum()
    (gradient,) = torch.autograd.grad(wanted, [logits])
    (own,) = torch.autograd.grad(losses.sum() + 0.1 * normalisers.square().sum(), [mine])
    torch.testing.assert_close(own, exchange.mine(gradient))
    return leave()


def compare_exchanges() -> int:
    exchange = join()
    torch.manual_seed(5)
    everyone = torch.randn(exchange.size, 2, 8, 3)
    weights = torch.randn(exchange.size, 2, 8, 3)
    own = everyone[exchange.rank].clone().requires_grad_()
    # gathering and its gradient
    whole = exchange.whole(own)
    assert torch.equal(whole, torch.cat(list(everyone), 1))
    heavy = torch.cat([weights, weights.flip(0)], 2)  # a gradient of each rank's own
    (gradient,) = torch.autograd.grad((whole * heavy[exchange.rank]).sum(), [own])
    torch.testing.assert_close(gradient, exchange.mine(heavy.sum(0)))
    # summing parts and its gradient
    part = exchange.parts(own)
    torch.testing.assert_close(part, exchange.mine(everyone.sum(0)))
    of_parts = weights[:, :, : part.shape[1]]
    (gradient,) = torch.autograd.grad((part * of_parts[exchange.rank]).sum(), [own])
    assert torch.equal(gradient, torch.cat(list(of_parts), 1))
    # a sum that each goes on with
    total = exchange.total(own)
    torch.testing.assert_close(total, everyone.sum(0))
    (gradient,) = torch.autograd.grad((total * weights[exchange.rank]).sum(), [own])
    torch.testing.assert_close(gradient, weights.sum(0))
    try:
        exchange.parts(own[:, :7])
    except ValueError as error:
        assert "7 along dimension 1" in str(error)
        return leave()
    return 3


def leave() -> int:
    dist.destroy_process_group()
    return 0


def test_the_loss_over_a_divided_vocabulary_is_the_plain_one_with_its_gradients() -> None:
    assert Ranks(2, compare_losses).codes() == [0, 0]


def test_losses_and_normalisers_of_tokens_have_their_gradients() -> None:
    assert Ranks(2, compare_normalisers).codes() == [0, 0]


def test_exchanges_have_the_gradients_of_what_they_compute() -> None:
    assert Ranks(2, compare_exchanges).codes() == [0, 0]

"""The loss equals torch's own cross-entropy over the whole batch, whatever the chunks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from train.test_step import guest, hidden, rows

from flame.batch import IGNORED
from flame.train import loss


def states_head_and_labels(tokens: int, bias: bool) -> tuple[torch.Tensor, torch.nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    states = torch.randn(tokens, 16, requires_grad=True)
    head = torch.nn.Linear(16, 40, bias=bias)
    labels = torch.randint(0, 40, (tokens,))
    labels[::7] = IGNORED
    return states, head, labels


@pytest.mark.parametrize("tokens", [5, 64, 200])
@pytest.mark.parametrize("bias", [True, False])
def test_chunked_cross_entropy_and_its_gradients_equal_the_plain_one(
    tokens: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 64)
    states, head, labels = states_head_and_labels(tokens, bias)
    plain = F.cross_entropy(head(states), labels, ignore_index=IGNORED, reduction="sum")
    wanted = torch.autograd.grad(plain, [states, *head.parameters()])
    chunked = loss.chunked_cross_entropy(states, head.weight, head.bias, labels)
    got = torch.autograd.grad(chunked, [states, *head.parameters()])
    torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-4)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_batch_without_labels_has_no_loss_and_no_gradient() -> None:
    states = torch.randn(8, 16, requires_grad=True)
    head = torch.nn.Linear(16, 40)
    labels = torch.full((8,), IGNORED)
    total = loss.chunked_cross_entropy(states, head.weight, head.bias, labels)
    assert total.item() == 0.0
    (gradient,) = torch.autograd.grad(total, [states])
    assert torch.equal(gradient, torch.zeros_like(gradient))


# -------------------------------------------------------------------------------------- z-loss


@pytest.mark.parametrize("tokens", [5, 200])
@pytest.mark.parametrize("bias", [True, False])
def test_squares_of_logsumexp_and_their_gradients_equal_the_plain_ones(
    tokens: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 64)
    states, head, labels = states_head_and_labels(tokens, bias)
    logits = head(states)
    plain = torch.stack(
        [
            F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"),
            logits[labels != IGNORED].logsumexp(-1).square().sum(),
        ]
    )
    got = loss.cross_entropy_and_squares(states, head.weight, head.bias, labels)
    torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-4)
    for part in range(2):
        wanted = torch.autograd.grad(plain[part], [states, *head.parameters()], retain_graph=True)
        found = torch.autograd.grad(got[part], [states, *head.parameters()], retain_graph=True)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_z_loss_is_in_the_gradient_and_beside_the_loss() -> None:
    batch, coefficient = rows(1, 3), 0.01
    labels = batch.labels.flatten()
    found: dict[float, tuple[float, list[torch.Tensor]]] = {}
    for z_loss in (0.0, coefficient):
        model = guest()
        module = loss.LossModule(model, hidden, model.head, z_loss)
        value = module(batch)
        value.backward()
        penalty = module.take_penalty()
        assert (penalty is None) == (z_loss == 0)
        found[z_loss] = value.item(), [p.grad for p in model.parameters() if p.grad is not None]
    assert found[coefficient][0] == pytest.approx(found[0.0][0], rel=1e-6), "cross-entropy alone"

    model = guest()
    logits = model.head(hidden(model, batch.tokens)).flatten(0, 1)
    squares = logits[labels != IGNORED].logsumexp(-1).square().sum()
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") + coefficient * squares
    wanted = torch.autograd.grad(total, list(model.parameters()))
    for a, b, without in zip(found[coefficient][1], wanted, found[0.0][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(a, without, rtol=1e-3, atol=1e-4)
    assert penalty is not None
    assert penalty.item() == pytest.approx(coefficient * squares.item(), rel=1e-5)
    assert module.take_penalty() is None, "it was taken"


def test_without_gradients_there_is_no_penalty() -> None:
    model = guest()
    module = loss.LossModule(model, hidden, model.head, 0.01)
    with torch.no_grad():
        value = module(rows(1, 3))
    assert value.item() == loss.LossModule(model, hidden, model.head)(rows(1, 3)).item()
    assert module.take_penalty() is None

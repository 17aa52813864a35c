import pytest
import torch
from models.small_models import SMALL, VOCABULARY, initialized, packed

from flame.batch import IGNORED, Batch
from flame.models.registry import family_of
from flame.train.loss import LossModule


def _batch() -> Batch:
    """Two rows of 60 tokens that repeat a pattern of seven."""
    _, positions, cu_seqlens, longest = packed([[23, 37], [60]])
    tokens = (torch.arange(7) * 11 % VOCABULARY).repeat(18)[:120].view(2, 60)
    labels = tokens.flatten().roll(-1)
    labels[cu_seqlens[1:].long() - 1] = IGNORED
    return Batch(tokens, labels.view(2, 60), positions, cu_seqlens, longest, 0)


@pytest.mark.parametrize("name", SMALL)
def test_five_steps_lower_the_loss_and_every_parameter_gets_a_gradient(name):
    config = SMALL[name]
    model, family = initialized(config), family_of(config)
    with_loss = LossModule(model, family.hidden, family.head(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses, without = [], {n for n, _ in model.named_parameters()}
    for _ in range(6):
        optimizer.zero_grad()
        loss = with_loss(_batch())
        (loss / 117).backward()
        without -= {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
        optimizer.step()
        losses.append(float(loss.detach()) / 117)
    assert losses[-1] < 0.9 * losses[0]
    # HGRN's first layer has no lower bound, and in the hybrids the second is attention
    assert without <= ({"model.lower_bounds"} if "hybrid" in name else set())

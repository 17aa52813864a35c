import pytest
import torch
from models.small_models import SMALL, initialized, packed
from torch.utils.flop_counter import FlopCounterMode

from flame.models.flops import peak_flops
from flame.models.registry import family_of

LENGTH = 48


def _measured(name: str, length: int) -> int:
    """Forward and backward of one document, as torch counts the products that are run."""
    config = SMALL[name]
    model, family = initialized(config), family_of(config)
    tokens, positions, cu_seqlens, longest = packed([[length]])
    embedded = family.embedding(model)(tokens).detach().requires_grad_()
    family.embedding(model).register_forward_hook(lambda _m, _i, _o: embedded)
    with FlopCounterMode(display=False) as counter:
        hidden = family.hidden(model, tokens, positions, cu_seqlens, longest)
        family.head(model)(hidden).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_flops_equal_what_torch_counts(name, monkeypatch):
    # torch counts matrix products: attention written as two of them, over the whole square
    def attention(q, k, v, **_):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return (q @ k.mT).tril().softmax(-1) @ v

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", attention)
    count = family_of(SMALL[name]).flops(SMALL[name])
    # transformers 5.17 makes its rotary table by a matrix product, 384 FLOPs of seven million
    assert _measured(name, LENGTH) == pytest.approx(count.total(LENGTH, LENGTH**2), rel=1e-4)


def test_attention_counts_pairs_and_linear_attention_counts_states():
    counts = {name: family_of(config).flops(config) for name, config in SMALL.items()}
    assert counts["transformer"].per_pair == 12 * 2 * 32
    assert counts["transformer-gqa"].per_pair == 12 * 2 * 32
    assert counts["gla"].per_pair == 0
    assert counts["gla-hybrid"].per_pair == 12 * 1 * 32
    layer = 32 * (16 + 16 + 32 + 32 + 32 + 16) + 16 * 16 + 3 * 32 * 48
    assert counts["gla"].per_token == 6 * (2 * layer + 97 * 32) + 2 * 12 * 2 * 8 * 16
    delta = counts["gated_deltanet"].per_token - counts["gated_deltanet-plain"].per_token
    assert delta == 6 * 2 * 32 * 36


def test_peaks_are_those_of_the_device_named_or_none():
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.bfloat16) == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe", torch.bfloat16) == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float16) == 312e12
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.float32) is None
    assert peak_flops("a toaster", torch.bfloat16) is None

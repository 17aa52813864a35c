import pytest
import torch
from models.small_models import SMALL, initialized, packed
from torch.utils.flop_counter import FlopCounterMode

from flame.models.build import build_on_meta
from flame.models.flops import matrix_flops, peak_flops
from flame.models.registry import families, family_of

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


@pytest.mark.parametrize("name", [n for n in SMALL if family_of(SMALL[n]).source == "transformers"])
def test_flops_equal_what_torch_counts(name, monkeypatch):
    # torch counts matrix products: attention written as two of them, over the whole square
    def attention(q, k, v, **_):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return (q @ k.mT).tril().softmax(-1) @ v

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", attention)
    count = family_of(SMALL[name]).flops(SMALL[name])
    # transformers makes its rotary tables by matrix products, 384 to 1,536 FLOPs of seven to ten million
    assert _measured(name, LENGTH) == pytest.approx(count.total(LENGTH, LENGTH**2), rel=2e-4)


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


def _elementwise(q, k, v, *others):
    """In place of a recurrence: no product of matrices, and something for every input's gradient."""
    inputs = [q, k, *(x for x in others if isinstance(x, torch.Tensor) and x.is_floating_point())]
    return v.float() + 0 * sum(x.float().sum() for x in inputs), None


RECURRENCES = {
    "cpu_linear": ("gated_linear_attention", "value_gated_attention", "diagonal_plus_low_rank"),
    "cpu_delta": ("gated_delta_rule", "diagonal_plus_low_rank"),
}
_RECURRENT = [
    n for n in SMALL if "hybrid" not in n and family_of(SMALL[n]).source == "fla" and "transformer" not in n
]


@pytest.mark.parametrize("name", _RECURRENT)
def test_matrix_products_outside_the_recurrence_are_those_that_torch_counts(name, monkeypatch):
    for module, names in RECURRENCES.items():
        for function in names:
            monkeypatch.setattr(f"flame.models.{module}.{function}", _elementwise)
    config = SMALL[name]
    model = build_on_meta(config)
    # depthwise convolutions are products too, but on the CPU they are sums of shifted rows
    convolved = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Conv1d))
    assert _measured(name, LENGTH) == LENGTH * (matrix_flops(model) - 6 * convolved + _repeated(config))


def _repeated(config):
    """What linear_attn's feature maps do in their second head: 4 layers of 16 x 16 in each of 2 blocks."""
    return 6 * 2 * 4 * 16 * 16 if config.model_type == "linear_attn" and not config.norm_feature_map else 0


# by hand, a token's in one layer: 2 heads of 16 x 16 unless the small model has other sizes
MIXING = {
    "gla": 12 * 2 * 8 * 16,
    "gated_deltanet": 18 * 2 * 12 * 18,
    "gated_deltanet-gva": 18 * 4 * 12 * 18,
    "delta_net": 18 * 2 * 16 * 16,
    "gated_deltaproduct": 30 * 2 * 12 * 18,
    "kda": 18 * 2 * 12 * 18,
    "kda-bounded": 18 * 4 * 12 * 18,
    "comba": 18 * 2 * 12 * 18,
    "mamba2": 12 * 4 * 12 * 16,
    "retnet": 12 * 2 * 16 * 32,
    "linear_attn": 12 * 2 * 16 * 16 + 6 * 4 * 16 * 16,
    "linear_attn-normed": 12 * 2 * 16 * 16,
    "hgrn": 6 * 32,
    "hgrn2": 12 * 2 * 16 * 16,
    "gsa": 12 * 2 * 8 * (16 + 16),
    "rwkv6": 12 * 2 * 8 * 16,
    "rwkv7": 24 * 2 * 16 * 16,
    "lightnet": 12 * 2 * 16 * 16,
    "forgetting_transformer": 0,
    "transformer": 0,
}


def test_every_family_of_flas_has_its_mixing_counted_by_hand():
    assert {name.partition("-")[0] for name in MIXING} == {f.name for f in families() if f.source == "fla"}


@pytest.mark.parametrize("name", MIXING)
def test_the_mixing_of_tokens_is_counted_as_by_hand(name):
    model = build_on_meta(SMALL[name])
    count = family_of(SMALL[name]).flops(SMALL[name])
    assert count.per_token - matrix_flops(model) == 2 * MIXING[name]
    assert count.per_pair == (2 * 12 * 32 if "transformer" in name else 0)


def test_peaks_are_those_of_the_device_named_or_none():
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.bfloat16) == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe", torch.bfloat16) == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float16) == 312e12
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.float32) is None
    assert peak_flops("a toaster", torch.bfloat16) is None

"""FLOPs of a layer's mixing of tokens, beside its matrix products, for the layers of fla's models.

Forward and backward together are three times the forward. For H heads with K key and V value channels, a
multiplication and its addition being two FLOPs, the forward takes for each token

- softmax attention, for each pair: q k^T and p v: 4 H D
- linear attention with or without decay: k v^T into the state, q S out of it: 4 H K V
- the delta rule: S^T k, its outer product with k, q S: 6 H K V; with n steps a token 2 (2 n + 1) H K V
- a diagonal plus a rank-one transition (RWKV7): S^T a, b u^T, k v^T, q S: 8 H K V
- gated slot attention, M slots: keys into and out of the slots, then values: 4 H M (K + V)
- a decaying sum (HGRN), element by element: 2 D

These are the recurrences' own operations; what a chunked kernel does beside them is not counted, nor are
decays, norms and activations. A sliding window is not subtracted: with one, the count is an upper bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import nn

from flame.models.flops import FlopCount, matrix_flops
from flame.models.zoo import fla_module

Count = Callable[[Any], float]


def _heads(layer: Any) -> float:
    """H K V."""
    return float(layer.num_heads * layer.head_k_dim * layer.head_v_dim)


def _linear_attention(layer: Any) -> float:
    maps = {id(m): m for m in (layer.feature_map_q, layer.feature_map_k) if isinstance(m, nn.Module)}
    inner = sum(
        linear.weight.numel()
        for linear in cast("Any", [x for m in maps.values() for x in m.modules()])
        if isinstance(linear, nn.Linear)
    )
    # a feature map's own layers run once a head; matrix_flops has counted them once
    return 12 * _heads(layer) + 6.0 * inner * (layer.num_heads - 1)


def _gsa(layer: Any) -> float:
    return 12.0 * layer.num_heads * layer.num_slots * (layer.head_k_dim + layer.head_v_dim)


# module of fla, its layer, FLOPs a token, forward and backward
_PER_TOKEN: tuple[tuple[str, str, Count], ...] = (
    ("layers.gla", "GatedLinearAttention", lambda m: 12 * _heads(m)),
    ("layers.multiscale_retention", "MultiScaleRetention", lambda m: 12 * _heads(m)),
    ("layers.linear_attn", "LinearAttention", _linear_attention),
    ("layers.rwkv6", "RWKV6Attention", lambda m: 12 * _heads(m)),
    ("layers.hgrn2", "HGRN2Attention", lambda m: 12.0 * m.num_heads * m.head_f_dim * m.head_i_dim),
    ("layers.lightnet", "LightNetAttention", lambda m: 12.0 * m.num_heads * m.head_f_dim * m.head_i_dim),
    ("layers.mamba2", "Mamba2", lambda m: 12.0 * m.num_heads * m.ssm_state_size * m.head_dim),
    ("layers.hgrn", "HGRNAttention", lambda m: 6.0 * m.input_dim),
    ("layers.gsa", "GatedSlotAttention", _gsa),
    ("layers.delta_net", "DeltaNet", lambda m: 18 * _heads(m)),
    ("layers.gated_deltanet", "GatedDeltaNet", lambda m: 18.0 * m.num_v_heads * m.head_k_dim * m.head_v_dim),
    ("layers.comba", "Comba", lambda m: 18.0 * m.num_heads * m.head_k_dim * m.head_v_dim),
    ("layers.kda", "KimiDeltaAttention", lambda m: 18.0 * m.num_v_heads * m.head_k_dim * m.head_v_dim),
    (
        "layers.gated_deltaproduct",
        "GatedDeltaProduct",
        lambda m: 6.0 * (2 * m.num_householder + 1) * m.num_v_heads * m.head_k_dim * m.head_v_dim,
    ),
    ("layers.rwkv7", "RWKV7Attention", lambda m: 24.0 * m.num_heads * m.head_dim * m.head_v_dim),
)
_PER_PAIR: tuple[tuple[str, str], ...] = (
    ("layers.attn", "Attention"),
    ("layers.forgetting_attn", "ForgettingAttention"),
)


def layer_flops(model: nn.Module) -> FlopCount:
    """FLOPs of a model of fla's: matrix products, and each layer's by its kind."""
    kinds = {getattr(fla_module(module), name): count for module, name, count in _PER_TOKEN}
    attention = {getattr(fla_module(module), name) for module, name in _PER_PAIR}
    per_token, per_pair = matrix_flops(model), 0.0
    for layer in cast("Any", model.modules()):
        if type(layer) in kinds:
            per_token += kinds[type(layer)](layer)
        elif type(layer) in attention:
            per_pair += 12.0 * layer.num_heads * layer.head_dim
    return FlopCount(per_token, per_pair)

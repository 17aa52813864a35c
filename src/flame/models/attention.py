"""Attention over packed documents: `varlen_attn` of torch on GPUs, SDPA per document elsewhere.

Both guests reach it: fla's `Attention` layer, which was written for flash-attn 2 (`install` puts these
functions where flash-attn's would be), and transformers' models through the attention implementation
named `PACKED`.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from flame.errors import ModelError
from flame.models.zoo import fla_module

PACKED = "flame_packed"  # the name of the attention implementation in transformers

_kernel: Any = varlen_attn
# torch 2.11 takes fewer key heads without being told, later versions want to be
_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(_kernel).parameters else {}


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    scale: float | None = None,
    window: int | None = None,
    before: int = 0,
) -> Tensor:
    """Causal attention within segments.

    query: [T, H, D]; key, value: [before + T, G, D] where G divides H; cu_seqlens: int32 [segments + 1];
    longest: tokens of the longest segment, or more; window: how many keys a query sees, itself
    included (None: all before it); before: keys of the first segment that lie before its queries.
    Returns [T, H, D].
    """
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        grouped = _GROUPED if query.shape[1] != key.shape[1] else {}
        cu_seqlens = cu_seqlens.to(torch.int32)
        left = -1 if window is None else window - 1
        options = {"scale": scale, "window_size": (left, 0), **grouped}
        bounds = torch.cat([cu_seqlens[:1], cu_seqlens[1:] + before]) if before else cu_seqlens
        return _kernel(query, key, value, cu_seqlens, bounds, longest, longest + before, **options)
    lengths = cast("list[int]", cu_seqlens.diff().tolist())
    keys = [lengths[0] + before, *lengths[1:]]
    parts = zip(query.split(lengths), key.split(keys), value.split(keys), strict=True)
    return torch.cat([_causal(q[None], k[None], v[None], scale, window)[0] for q, k, v in parts])


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
    """SDPA on [B, L, H, D]; the last query sits at the last key, as in decoding with a cache."""
    length, keys = query.shape[1], key.shape[1]
    mask = None
    if window is not None or 1 < length < keys:
        ones = torch.ones(length, keys, dtype=torch.bool, device=query.device)
        mask = ones.tril(keys - length)
        if window is not None:
            mask &= ones.triu(keys - length - window + 1)
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None and length > 1,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return out.transpose(1, 2)


# --------------------------------------------------------------------------------- transformers


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [b, H, L, D], key and value [b, G, L, D] to [b, L, H, D].

    `cu_seq_lens_q` and `max_length_q` come from the model's own keyword arguments; without them rows are
    whole documents, or what a mask says. `sliding_window` counts the keys that a query sees, itself
    included. Raises ModelError for scores that are capped or attention sinks.
    """
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ModelError(f"attention with {name} is not supported over packed rows")
    window: int | None = kwargs.get("sliding_window")
    cu_seqlens: Tensor | None = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is None and attention_mask is None:
        whole = [x.transpose(1, 2) for x in (query, key, value)]
        return _causal(whole[0], whole[1], whole[2], scaling, window), None
    if cu_seqlens is None:
        sdpa: Any = sdpa_attention_forward
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    rows, _, length, _ = query.shape
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    longest = int(kwargs["max_length_q"])
    out = varlen_attention(flat[0], flat[1], flat[2], cu_seqlens, longest, scaling, window)
    return out.unflatten(0, (rows, length)), None


AttentionInterface.register(PACKED, packed_attention)


# ------------------------------------------------------------------------------------------ fla


def _window(window_size: tuple[int, int]) -> int | None:
    return None if window_size[0] < 0 else window_size[0] + 1


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = True, window_size: tuple[int, int] = (-1, -1)
) -> Tensor:
    """flash-attn's function of this name, for whole rows: q [B, L, H, D]; k, v [B, M, G, D], M >= L."""
    assert causal
    return _causal(q, k, v, None, _window(window_size))


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """flash-attn's function of this name: q [T, H, D]; k, v [S, G, D]; one segment's queries sit at the
    end of its keys."""
    assert causal
    if cu_seqlens_q is cu_seqlens_k:
        return varlen_attention(q, k, v, cu_seqlens_q, max_seqlen_q, window=_window(window_size))
    queries = cast("list[int]", cu_seqlens_q.diff().tolist())
    keys = cast("list[int]", cu_seqlens_k.diff().tolist())
    parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    window = _window(window_size)
    return torch.cat([_causal(a[None], b[None], c[None], None, window)[0] for a, b, c in parts])


def _packed_forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None, Any]:
    """fla's `Attention.forward`. Training passes `longest_segment` along with `cu_seqlens`; the layer's
    own code takes the whole row for the longest segment, and the kernel launches as many blocks for
    every segment."""
    longest: int | None = kwargs.get("longest_segment")
    if longest is None:
        return _layer_forward(self, hidden_states, **kwargs)
    cu_seqlens: Tensor = kwargs["cu_seqlens"]
    projections = (self.q_proj, self.k_proj, self.v_proj)
    q, k, v = (project(hidden_states).unflatten(-1, (-1, self.head_dim)) for project in projections)
    if self.qk_norm:
        q, k = self.q_norm(q), self.k_norm(k)
    # the layer's own rule for the rotary table, so that it is made once and not for each batch
    table = max(q.shape[1], self.max_position_embeddings or 0)
    q, k = self.rotary(q, k, max_seqlen=table, cu_seqlens=cu_seqlens)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    out = varlen_attention(flat[0], flat[1], flat[2], cu_seqlens, longest, window=self.window_size)
    return self.o_proj(out.flatten(-2).view(*hidden_states.shape[:2], -1)), None, None


_layer = fla_module("layers.attn")
_layer_forward = _layer.Attention.forward


def install() -> None:
    """Put these functions where fla's attention layer looks for flash-attn. Idempotent."""
    module: Any = _layer
    module.flash_attn_func = flash_attn_func
    module.flash_attn_varlen_func = flash_attn_varlen_func
    module.Attention.forward = _packed_forward


install()

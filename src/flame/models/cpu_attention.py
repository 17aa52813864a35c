"""fla's softmax attention with decaying scores in plain PyTorch, document by document.

Each function has the name and the arguments of fla's; `cpu.py` puts them in its place.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.models.cpu_linear import bounds_of, flat


def parallel_forgetting_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    window_size: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """fla's function of this name: scores fall by the log decays between key and query.

    q: [B, T, H, D]; k, v: [B, T, G, D] where G divides H; g: [B, T, H]; a query sees `window_size` keys,
    itself included, or all before it. Returns [B, T, H, D].
    """
    lengths = cast("list[int]", bounds_of(q, cu_seqlens).diff().tolist())
    split = [flat(x).split(lengths) for x in (q, k, v, g)]
    parts = zip(split[0], split[1], split[2], split[3], strict=True)
    return torch.cat([_forgetting(*part, scale, window_size) for part in parts]).view(q.shape)


def _forgetting(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float | None, window: int | None
) -> Tensor:
    """One document; fewer queries than keys sit at the end of the keys."""
    queries, keys = len(q), len(k)
    total = g.float().cumsum(0).mT  # [H, keys]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    if window is not None:
        seen &= seen.new_ones(queries, keys).triu(keys - queries - window + 1)
    bias = total[:, keys - queries :, None] - total[:, None]
    return F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=bias.masked_fill(~seen, float("-inf")).to(q.dtype)[None],
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )[0].transpose(0, 1)


def attn_decoding_one_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """fla's function of this name, as its forgetting attention calls it: one query, the last token's, of
    each of N sequences. q: [1, N, H, D]; k, v: [1, T, G, D]; g: [1, T, H]; cu_seqlens bounds the T keys."""
    assert g is not None
    assert cu_seqlens is not None
    lengths = cast("list[int]", cu_seqlens.diff().tolist())
    split = [x[0].split(lengths) for x in (k, v, g)]
    parts = zip(q[0].split(1), split[0], split[1], split[2], strict=True)
    return torch.cat([_forgetting(*part, scale, None) for part in parts])[None]

"""fla's forgetting attention with a cache and no mask, which fla's own forward refuses: without padding a
mask of ones says the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flame.models.zoo import fla_module

_layer: Any = fla_module("layers.forgetting_attn").ForgettingAttention
_layer_forward = _layer.forward


def forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Any:
    """As fla's: hidden_states [B, L, d]; a 0-1 mask [B, keys] marks left padding."""
    if past_key_values is not None and attention_mask is None:
        seen = past_key_values.get_seq_length(self.layer_idx)
        if seen:
            rows, length = hidden_states.shape[:2]
            attention_mask = torch.ones(rows, seen + length, dtype=torch.long, device=hidden_states.device)
    return _layer_forward(self, hidden_states, attention_mask, past_key_values, **kwargs)


def install() -> None:
    """Put this forward in the place of fla's. Idempotent."""
    _layer.forward = forward

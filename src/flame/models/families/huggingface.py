"""transformers' own models, with packed rows through its attention interface."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flame.models.attention import PACKED
from flame.models.family import Family
from flame.models.flops import FlopCount, matrix_flops


def _hidden(
    model: nn.Module, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, longest_segment: int
) -> Tensor:
    out = model.get_submodule("model")(
        input_ids=tokens,
        position_ids=positions,
        use_cache=False,
        cu_seq_lens_q=cu_seqlens,
        cu_seq_lens_k=cu_seqlens,
        max_length_q=longest_segment,
        max_length_k=longest_segment,
    )
    return out.last_hidden_state


def _flops(model: nn.Module) -> FlopCount:
    """Matrix products, and 12 H D per attended pair and layer: q k^T and p v, three times for backward."""
    config: Any = model.config
    width = config.num_attention_heads * config.head_dim
    return FlopCount(matrix_flops(model), 12.0 * config.num_hidden_layers * width)


def _refuses(config: Any) -> str | None:
    if config.attention_dropout:
        return f"attention_dropout: found {config.attention_dropout}, only 0 is supported"
    return None


HUGGINGFACE_FAMILIES: tuple[Family, ...] = (
    Family(
        name="llama",
        model_types=("llama",),
        packing="rows",
        hidden=_hidden,
        count=_flops,
        compiles=True,
        refuses=_refuses,
        embedding_name="model.embed_tokens",
        settings=(("use_cache", False),),
        attention=PACKED,
        source="transformers",
        gpu=True,
    ),
)

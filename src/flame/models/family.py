"""What the framework has to know of a kind of model. Adding a family is adding a record to `FAMILIES`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from flame.models import cpu
from flame.models.attention import PACKED
from flame.models.flops import FlopCount, matrix_flops
from flame.models.zoo import fla_module

Block = tuple[str, nn.Module]


class Hidden(Protocol):
    """The final-normed hidden states before the head, [b, L, d], of tokens int64 [b, L].

    positions: int64 [b, L], restarting in each segment; cu_seqlens: int32 [segments + 1] over the
    flattened b * L; longest_segment: in tokens.
    """

    def __call__(
        self, model: nn.Module, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, longest_segment: int
    ) -> Tensor: ...


@dataclass(frozen=True)
class Family:
    """One kind of model. Functions of a model work on meta, sharded and materialised ones alike."""

    name: str
    model_types: tuple[str, ...]  # `model_type` in config.json
    packing: Literal["flat", "rows"]  # the model runs on [1, b * L] with cu_seqlens, or on [b, L]
    hidden: Hidden
    count: Callable[[nn.Module], FlopCount]  # FLOPs of a built model
    compiles: bool  # torch.compile of each block is known to help
    refuses: Callable[[Any], str | None]  # why this config cannot be trained truly, or None
    layers: str = "model.layers"
    embedding_name: str = "model.embeddings"
    settings: tuple[tuple[str, Any], ...] = ()  # of the config, in training
    attention: str | None = None  # the attention implementation, for models that take it from transformers

    def build(self, config: PretrainedConfig) -> nn.Module:
        """The model of `config` on the meta device, in float32; `config` stays as it is."""
        if not torch.cuda.is_available():
            cpu.install()
        config = copy.deepcopy(config)
        for name, value in self.settings:
            setattr(config, name, value)
        make: Any = AutoModelForCausalLM.from_config
        options = {"attn_implementation": self.attention} if self.attention else {}
        with torch.device("meta"):
            return make(config, dtype=torch.float32, **options)

    def flops(self, config: PretrainedConfig) -> FlopCount:
        """FLOPs of training the model of `config`."""
        return self.count(self.build(config))

    def blocks(self, model: nn.Module) -> list[Block]:
        """The repeated layers, in order, by fully qualified name."""
        stack = cast("nn.ModuleList", model.get_submodule(self.layers))
        return [(f"{self.layers}.{name}", block) for name, block in stack.named_children()]

    def embedding(self, model: nn.Module) -> nn.Embedding:
        """The token embedding."""
        return cast("nn.Embedding", model.get_submodule(self.embedding_name))

    def head(self, model: nn.Module) -> nn.Linear:
        """The layer from hidden states to logits."""
        return cast("nn.Linear", model.get_submodule("lm_head"))

    def no_weight_decay(self, model: nn.Module) -> set[str]:
        """Names of the parameters without weight decay: biases, norms and all others of one dimension,
        and those marked `_no_weight_decay`. Embeddings decay."""
        named = model.named_parameters()
        return {name for name, p in named if p.ndim < 2 or getattr(p, "_no_weight_decay", False)}


# ----------------------------------------------------------------------------------------- fla


def _flat_hidden(
    model: nn.Module, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, longest_segment: int
) -> Tensor:
    out = model.get_submodule("model")(
        input_ids=tokens.reshape(1, -1),
        cu_seqlens=cu_seqlens,
        longest_segment=longest_segment,
        use_cache=False,
    )
    return out.last_hidden_state.view(*tokens.shape, -1)


def _layer_flops(model: nn.Module) -> FlopCount:
    """Matrix products, and of each layer, for H heads with K key and V value channels:

    - softmax attention, per pair: q k^T and p v, 4 H D forward, three times that with backward: 12 H D
    - gated linear attention, per token: k v^T into the state and q S out of it, 4 H K V forward: 12 H K V
    - gated delta rule, per token: S^T k, its outer product with k, q S, 6 H K V forward: 18 H K V

    The recurrent formulas are the recurrences' own; what a chunked kernel adds is not counted.
    """
    per_token, per_pair = matrix_flops(model), 0.0
    attention: Any = fla_module("layers.attn").Attention
    gla: Any = fla_module("layers.gla").GatedLinearAttention
    delta: Any = fla_module("layers.gated_deltanet").GatedDeltaNet
    for layer in cast("Any", model.modules()):
        if isinstance(layer, attention):
            per_pair += 12 * layer.num_heads * layer.head_dim
        elif isinstance(layer, gla):
            per_token += 12 * layer.num_heads * layer.head_k_dim * layer.head_v_dim
        elif isinstance(layer, delta):
            per_token += 18 * layer.num_v_heads * layer.head_k_dim * layer.head_v_dim
    return FlopCount(per_token, per_pair)


def _fla_refuses(config: Any) -> str | None:
    if config.attnres_block_size is not None:
        return "attnres_block_size: attention residuals are not supported"
    if config.hidden_act != "swish":
        return f'hidden_act: found "{config.hidden_act}", only "swish" is supported'
    if getattr(config, "attn_mode", "chunk") != "chunk":
        return f'attn_mode: found "{config.attn_mode}", only "chunk" keeps packed documents apart in training'
    return None


# the trainer computes the loss from hidden states, so fla's fused losses are off
_FLA_SETTINGS = (
    ("fuse_cross_entropy", False),
    ("fuse_linear_cross_entropy", False),
    ("use_l2warp", False),
    ("use_cache", False),
)


def _fla_family(model_type: str, compiles: bool) -> Family:
    return Family(
        name=model_type,
        model_types=(model_type,),
        packing="flat",
        hidden=_flat_hidden,
        count=_layer_flops,
        compiles=compiles,
        refuses=_fla_refuses,
        settings=_FLA_SETTINGS,
    )


# --------------------------------------------------------------------------------- transformers


def _row_hidden(
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


def _llama_flops(model: nn.Module) -> FlopCount:
    """Matrix products, and 12 H D per attended pair and layer: q k^T and p v, three times for backward."""
    config: Any = model.config
    width = config.num_attention_heads * config.head_dim
    return FlopCount(matrix_flops(model), 12.0 * config.num_hidden_layers * width)


def _llama_refuses(config: Any) -> str | None:
    if config.attention_dropout:
        return f"attention_dropout: found {config.attention_dropout}, only 0 is supported"
    return None


FAMILIES: tuple[Family, ...] = (
    _fla_family("gla", compiles=False),
    _fla_family("gated_deltanet", compiles=False),
    _fla_family("transformer", compiles=True),
    Family(
        name="llama",
        model_types=("llama",),
        packing="rows",
        hidden=_row_hidden,
        count=_llama_flops,
        compiles=True,
        refuses=_llama_refuses,
        embedding_name="model.embed_tokens",
        settings=(("use_cache", False),),
        attention=PACKED,
    ),
)

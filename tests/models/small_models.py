"""Small models of every family, and a packed batch to run them on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PretrainedConfig

from flame.models import cpu
from flame.models.build import build_on_meta, initialize
from flame.models.zoo import fla_models

cpu.install()  # also where there is a GPU: most tests here run beside it

VOCABULARY = 97
_SHARED = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCABULARY}


def _gla(**kwargs) -> PretrainedConfig:
    return fla_models.GLAConfig(num_heads=2, intermediate_size=48, **{**_SHARED, **kwargs})


def _delta(**kwargs) -> PretrainedConfig:
    settings = {"num_heads": 2, "head_dim": 12, "expand_v": 1.5, "intermediate_size": 48, **_SHARED}
    return fla_models.GatedDeltaNetConfig(**{**settings, **kwargs})


def _transformer(**kwargs) -> PretrainedConfig:
    return fla_models.TransformerConfig(num_heads=4, intermediate_size=48, **{**_SHARED, **kwargs})


def _llama(**kwargs) -> PretrainedConfig:
    settings = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, **_SHARED}
    return LlamaConfig(**{**settings, **kwargs})


SMALL = {
    "gla": _gla(),
    "gla-conv-mqa": _gla(use_short_conv=True, num_kv_heads=1, fuse_norm=False, fuse_swiglu=False),
    "gla-hybrid": _gla(attn={"layers": [1], "num_heads": 2}),
    "gated_deltanet": _delta(),
    "gated_deltanet-gva": _delta(num_v_heads=4, allow_neg_eigval=True, output_gate_activation="sigmoid"),
    "gated_deltanet-plain": _delta(use_gate=False),
    "transformer": _transformer(),
    "transformer-gqa": _transformer(num_kv_heads=2, qk_norm=True, qkv_bias=True, window_size=7),
    "llama": _llama(),
    "llama-tied": _llama(tie_word_embeddings=True),
}


def initialized(config: PretrainedConfig, seed: int = 1) -> nn.Module:
    model = build_on_meta(config)
    initialize(model, config, seed, "cpu")
    return model


def packed(rows: list[list[int]], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, int]:
    """Random tokens [b, L] of rows with such segments, their positions, bounds and longest."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [n for row in rows for n in row]
    tokens = torch.randint(0, VOCABULARY, (len(rows), sum(rows[0])), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths]).view_as(tokens)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return tokens, positions, cu_seqlens, max(lengths)

"""Small models of every family, and a packed batch to run them on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from flame.models import cpu
from flame.models.build import build_on_meta, initialize
from flame.models.zoo import fla_models

cpu.install()  # also where there is a GPU: most tests here run beside it

VOCABULARY = 97
_SHARED: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
_WITH_MLP = {"intermediate_size": 48, **_SHARED}
_HYBRID = {"attn": {"layers": [1], "num_heads": 2}}


def _of(kind: str, **settings) -> PretrainedConfig:
    return getattr(fla_models, f"{kind}Config")(**{**_WITH_MLP, **settings})


def _gla(**kwargs) -> PretrainedConfig:
    return _of("GLA", **{"num_heads": 2, **kwargs})


def _delta(**kwargs) -> PretrainedConfig:
    return _of("GatedDeltaNet", **{"num_heads": 2, "head_dim": 12, "expand_v": 1.5, **kwargs})


def _product(**kwargs) -> PretrainedConfig:
    settings = {"num_heads": 2, "head_dim": 12, "expand_v": 1.5, "num_householder": 2}
    return _of("GatedDeltaProduct", **{**settings, **kwargs})


def _kda(**kwargs) -> PretrainedConfig:
    return _of("KDA", **{"num_heads": 2, "head_dim": 12, "expand_v": 1.5, **kwargs})


def _mamba2(**kwargs) -> PretrainedConfig:
    settings = {"head_dim": 16, "num_heads": 4, "state_size": 12, **_SHARED}
    return fla_models.Mamba2Config(**{**settings, **kwargs})


def _rwkv6(**kwargs) -> PretrainedConfig:
    return _of("RWKV6", **{"num_heads": 2, "proj_low_rank_dim": 8, "gate_low_rank_dim": 8, **kwargs})


def _rwkv7(**kwargs) -> PretrainedConfig:
    ranks = {f"{name}_low_rank_dim": 8 for name in ("decay", "gate", "a", "v")}
    return _of("RWKV7", **{"num_heads": 2, "head_dim": 16, **ranks, **kwargs})


def _transformer(**kwargs) -> PretrainedConfig:
    return _of("Transformer", **{"num_heads": 4, **kwargs})


def _causal(kind: type[PretrainedConfig], **kwargs) -> PretrainedConfig:
    settings = {"num_attention_heads": 4, "num_key_value_heads": 2, **_WITH_MLP}
    tokens = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}
    return kind(**{**settings, **tokens, **kwargs})


def _llama(**kwargs) -> PretrainedConfig:
    return _causal(LlamaConfig, **kwargs)


# every registered family has one at least, which a test checks
SMALL = {
    "gla": _gla(),
    "gla-conv-mqa": _gla(use_short_conv=True, num_kv_heads=1, fuse_norm=False, fuse_swiglu=False),
    "gla-hybrid": _gla(**_HYBRID),
    "gated_deltanet": _delta(),
    "gated_deltanet-gva": _delta(num_v_heads=4, allow_neg_eigval=True, output_gate_activation="sigmoid"),
    "gated_deltanet-plain": _delta(use_gate=False),
    "gated_deltanet-hybrid": _delta(attn={"layers": [0], "num_heads": 2, "window_size": 9}),
    "delta_net": _of("DeltaNet", num_heads=2),
    "delta_net-sum": _of("DeltaNet", num_heads=2, qk_norm="sum", qk_activation="elu", use_gate=True),
    "delta_net-hybrid": _of("DeltaNet", num_heads=2, allow_neg_eigval=True, **_HYBRID),
    "gated_deltaproduct": _product(),
    "gated_deltaproduct-gated": _product(use_forget_gate=True, allow_neg_eigval=True, num_v_heads=4),
    "kda": _kda(),
    "kda-bounded": _kda(safe_gate=True, lower_bound=-5.0, num_v_heads=4, allow_neg_eigval=True),
    "kda-hybrid": _kda(**_HYBRID),
    "comba": _of("Comba", num_heads=2, head_dim=12, expand_v=1.5),
    "mamba2": _mamba2(),
    "mamba2-groups": _mamba2(n_groups=2, rmsnorm=False, D_has_hdim=True, use_conv_bias=False),
    "retnet": _of("RetNet", num_heads=2),
    "retnet-hybrid": _of("RetNet", num_heads=2, num_kv_heads=1, use_short_conv=True, **_HYBRID),
    "linear_attn": _of("LinearAttention", num_heads=2),
    "linear_attn-normed": _of("LinearAttention", num_heads=2, feature_map="elu", norm_feature_map=True),
    "linear_attn-hybrid": _of("LinearAttention", num_heads=2, num_kv_heads=1, **_HYBRID),
    "hgrn": _of("HGRN"),
    "hgrn-hybrid": _of("HGRN", use_short_conv=True, **_HYBRID),
    "hgrn2": _of("HGRN2", num_heads=2, expand_ratio=16),
    "hgrn2-unbounded": _of("HGRN2", num_heads=2, expand_ratio=16, use_lower_bound=False),
    "gsa": _of("GSA", num_heads=2, num_slots=8),
    "gsa-conv": _of("GSA", num_heads=2, num_kv_heads=1, num_slots=8, use_short_conv=True),
    "rwkv6": _rwkv6(),
    "rwkv6-hybrid": _rwkv6(**_HYBRID),
    "rwkv7": _rwkv7(),
    "rwkv7-plain": _rwkv7(fuse_norm=False),
    "gsa-hybrid": _of("GSA", num_heads=2, num_slots=8, **_HYBRID),
    "hgrn2-hybrid": _of("HGRN2", num_heads=2, expand_ratio=16, **_HYBRID),
    "lightnet": _of("LightNet", num_heads=2, expand_ratio=16, gate_low_rank_dim=8),
    "forgetting_transformer": _of("ForgettingTransformer", num_heads=4),
    "forgetting_transformer-gqa": _of(
        "ForgettingTransformer", num_heads=4, num_kv_heads=2, qk_norm=True, use_output_gate=True
    ),
    "transformer": _transformer(),
    "transformer-gqa": _transformer(num_kv_heads=2, qk_norm=True, qkv_bias=True, window_size=7),
    "llama": _llama(),
    "llama-tied": _llama(tie_word_embeddings=True),
    "mistral": _causal(MistralConfig, sliding_window=9),
    "qwen2": _causal(Qwen2Config),
    "qwen2-window": _causal(
        Qwen2Config, use_sliding_window=True, sliding_window=9, max_window_layers=1, tie_word_embeddings=True
    ),
    "qwen3": _causal(Qwen3Config, head_dim=16),
    "gemma": _causal(GemmaConfig, head_dim=16),
    "gemma3_text": _causal(
        Gemma3TextConfig, head_dim=16, sliding_window=9, layer_types=["sliding_attention", "full_attention"]
    ),
    "olmo2": _causal(Olmo2Config),
    "phi3": _causal(Phi3Config, sliding_window=9),
    "smollm3": _causal(SmolLM3Config, no_rope_layers=[1, 0]),
    "gpt2": GPT2Config(
        n_embd=32,
        n_head=2,
        n_layer=2,
        n_inner=48,
        n_positions=256,
        vocab_size=VOCABULARY,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    ),
}


def larger(name: str) -> PretrainedConfig:
    """The small model with sizes that fla's kernels take: heads of 64 channels."""
    values = SMALL[name].to_dict()
    values.pop("value_dim", None)  # RWKV7's, which follows from the rest
    heads = values.get("num_heads", values.get("num_attention_heads", 2))
    hidden = 64 * (heads or 2)
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "head_dim": 64, "num_slots": 32}
    sizes |= {"state_size": 64, "expand_v": 1.0, "expand_k": 1.0}
    if values["model_type"] == "mamba2":
        sizes |= {"hidden_size": 128, "num_heads": 4}
    if values["model_type"] in ("hgrn2", "lightnet"):
        sizes["expand_ratio"] = 64
    return type(SMALL[name])(**{**values, **{k: v for k, v in sizes.items() if k in values}})


def untied(name: str, blocks: int, **settings) -> PretrainedConfig:
    """The small model with so many blocks, whose embedding and head share nothing."""
    values = {**SMALL[name].to_dict(), "tie_word_embeddings": False, **settings}
    values["n_layer" if name == "gpt2" else "num_hidden_layers"] = blocks
    for of_each_block in ("layer_types", "value_dim", "no_rope_layers"):
        if isinstance(values.get(of_each_block), list) and len(values[of_each_block]) != blocks:
            del values[of_each_block]
    return type(SMALL[name])(**values)


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

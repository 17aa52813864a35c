"""What a family says of tensor parallelism: how its layers' matrices are divided over ranks.

A model is a chain of units, attention or feed-forward layers, with norms between them. A unit gets the whole
sequence, works on its heads or channels, and gives its part of a sum; what lies between units works on a
part of the sequence. The classes here are names and numbers alone; `parallel.tensor` does the work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Part = tuple[int, bool]  # rows of a matrix, and whether they are divided over the ranks or all needed by each
Parts = Callable[[Any, int], list[Part]]  # of a module and the number of ranks


@dataclass(frozen=True)
class Unit:
    """One layer. Names are of submodules or parameters in it, those of settings that a model lacks included.

    A parameter that is in none of the lists is unknown, and its model is refused.
    """

    counts: tuple[str, ...]  # attributes that the number of ranks must divide: heads, channels
    columns: tuple[str, ...] = ()  # matrices whose outputs are divided, and vectors over heads or channels
    rows: tuple[str, ...] = ()  # matrices whose inputs are divided
    shared: tuple[str, ...] = ()  # what every rank needs whole
    stacked: tuple[tuple[str, Parts], ...] = ()  # several matrices in one, each to be divided by itself
    wide: tuple[str, ...] = ()  # RMS norms over a width that is divided: of `columns`
    divided: tuple[str, ...] = ()  # further attributes that are divided, to 1 at least
    lengths: tuple[tuple[str, str], ...] = ()  # attributes that are the length of one of `stacked`
    counts_heads: str | None = None  # the name of a function for which it matters which heads it gets
    refuses: Callable[[Any, int], str | None] = lambda module, ranks: None


@dataclass(frozen=True)
class TensorPlan:
    """A family's plan."""

    norm: str = "model.norm"  # the last norm: behind it the sequence is whole again
    tables: tuple[
        tuple[str, int], ...
    ] = ()  # parameters outside units, and the dimension they are divided on
    positions: str | None = None  # an embedding of positions, added to that of tokens


_HEADS = ("num_heads", "num_kv_heads")
_WIDTHS = ("key_dim", "value_dim", "key_dim_per_group", "value_dim_per_group")
_QKV = ("q_proj", "k_proj", "v_proj")
_CONVOLUTIONS = ("q_conv1d", "k_conv1d", "v_conv1d")
_DELTA = (*_QKV, *_CONVOLUTIONS, "b_proj", "g_proj")
_GATES = ("a_proj", "A_log", "dt_bias")


def _products(module: Any, size: int) -> list[Part]:
    return [(size, True)] * module.num_householder


def _mamba2_parts(module: Any, ranks: int, first: tuple[int, ...], last: tuple[int, ...]) -> list[Part]:
    group = (module.n_groups * module.ssm_state_size, module.n_groups % ranks == 0)
    return [*((n, True) for n in first), group, group, *((n, True) for n in last)]


def _mamba2_projection(module: Any, ranks: int) -> list[Part]:
    width = module.intermediate_size
    return _mamba2_parts(module, ranks, (width, width), (module.num_heads,))


def _mamba2_convolution(module: Any, ranks: int) -> list[Part]:
    return _mamba2_parts(module, ranks, (module.intermediate_size,), ())


def _mamba2_refuses(module: Any, ranks: int) -> str | None:
    groups = module.n_groups
    if groups == 1 or groups % ranks == 0:
        return None
    return f"n_groups = {groups}: one group, or a multiple of the ranks, can be divided"


def _phi3_projection(module: Any, ranks: int) -> list[Part]:
    config, head = module.config, module.head_dim
    keys = config.num_key_value_heads * head
    return [(config.num_attention_heads * head, True), (keys, True), (keys, True)]


_CAUSAL_HEADS = ("config.num_attention_heads", "config.num_key_value_heads")
_CAUSAL = Unit(counts=_CAUSAL_HEADS, columns=_QKV, rows=("o_proj",), shared=("q_norm", "k_norm"))
_GATED_MLP = Unit(counts=("intermediate_size",), columns=("gate_proj", "up_proj"), rows=("down_proj",))

# by the class of the module; the tests train every family's on two ranks against one
UNITS: dict[str, Unit] = {
    "GatedLinearAttention": Unit(
        counts=_HEADS,
        columns=(*_QKV, *_CONVOLUTIONS, "gk_proj.1", "g_proj"),
        rows=("o_proj",),
        shared=("gk_proj.0", "g_norm_swish_gate", "g_norm"),
        divided=_WIDTHS,
    ),
    "GatedDeltaNet": Unit(
        counts=("num_heads", "num_v_heads"),
        columns=(*_DELTA, *_GATES),
        rows=("o_proj",),
        shared=("o_norm",),
        divided=("key_dim", "value_dim"),
    ),
    "DeltaNet": Unit(
        counts=("num_heads",),
        columns=_DELTA,
        rows=("o_proj",),
        shared=("o_norm",),
        divided=("key_dim", "value_dim"),
    ),
    "GatedDeltaProduct": Unit(
        counts=("num_heads", "num_v_heads"),
        columns=("q_proj", "q_conv1d", "g_proj", *_GATES),
        rows=("o_proj",),
        shared=("o_norm",),
        stacked=(
            ("k_proj", lambda m, ranks: _products(m, m.key_dim)),
            ("k_conv1d", lambda m, ranks: _products(m, m.key_dim)),
            ("v_proj", lambda m, ranks: _products(m, m.value_dim)),
            ("v_conv1d", lambda m, ranks: _products(m, m.value_dim)),
            ("b_proj", lambda m, ranks: _products(m, m.num_v_heads)),
        ),
        divided=("key_dim", "value_dim"),
    ),
    "KimiDeltaAttention": Unit(
        counts=("num_heads", "num_v_heads"),
        columns=(*_QKV, *_CONVOLUTIONS, "f_proj.1", "b_proj", "g_proj.1", "A_log", "dt_bias"),
        rows=("o_proj",),
        shared=("f_proj.0", "g_proj.0", "o_norm"),
        divided=("key_dim", "value_dim", "gate_dim"),
    ),
    "Comba": Unit(
        counts=("num_heads", "num_v_heads"),
        columns=(*_DELTA, *_GATES, "decay", "D"),
        rows=("o_proj",),
        shared=("o_norm",),
        divided=("key_dim", "value_dim"),
    ),
    "Mamba2": Unit(
        counts=("num_heads",),
        columns=("A_log", "dt_bias", "D", "norm"),
        rows=("out_proj",),
        stacked=(("in_proj", _mamba2_projection), ("conv1d", _mamba2_convolution)),
        wide=("norm",),
        divided=("intermediate_size", "n_groups"),
        lengths=(("conv_dim", "conv1d"),),
        refuses=_mamba2_refuses,
    ),
    "MultiScaleRetention": Unit(
        counts=_HEADS,
        columns=(*_QKV, *_CONVOLUTIONS, "g_proj"),
        rows=("o_proj",),
        shared=("g_norm_swish_gate", "g_norm"),
        divided=_WIDTHS,
        counts_heads="chunk_retention",
    ),
    "LinearAttention": Unit(
        counts=_HEADS,
        columns=_QKV,
        rows=("o_proj",),
        shared=("norm", "feature_map_q", "feature_map_k"),
        divided=_WIDTHS,
    ),
    "HGRNAttention": Unit(
        counts=("input_dim",),
        columns=("i_proj", "f_proj", "g_proj", "i_conv1d", "f_conv1d", "g_norm"),
        rows=("o_proj",),
        wide=("g_norm",),
    ),
    "HGRN2Attention": Unit(
        counts=("num_heads",),
        columns=("q_proj", "f_proj", "i_proj", "q_conv1d", "f_conv1d", "i_conv1d", "g_norm"),
        rows=("o_proj",),
        wide=("g_norm",),
        divided=("forget_dim", "input_dim"),
    ),
    "GatedSlotAttention": Unit(
        counts=_HEADS,
        columns=(*_QKV, *_CONVOLUTIONS, "f_proj", "g_norm"),
        rows=("o_proj",),
        shared=("feature_map",),
        wide=("g_norm",),
        divided=_WIDTHS,
    ),
    "LightNetAttention": Unit(
        counts=("num_heads",),
        columns=(*_QKV, *_CONVOLUTIONS, "g_proj.1", "g_norm"),
        rows=("o_proj",),
        shared=("g_proj.0",),
        wide=("g_norm",),
        divided=("key_dim", "value_dim"),
    ),
    "RWKV6Attention": Unit(
        counts=("num_heads",),
        columns=(
            *(f"{name}_proj.linear.weight" for name in "rkvg"),
            "w_proj.linear.lora.2",
            "bonus",
            "g_norm",
        ),
        rows=("o_proj",),
        shared=("x_proj", "x_bias", "w_proj.linear.lora.0"),
        divided=("key_dim", "value_dim", "g_norm.num_groups", "g_norm.hidden_size"),
    ),
    "RWKV6FeedForward": Unit(
        counts=("intermediate_size",),
        columns=("key.linear",),
        rows=("value",),
        shared=("key.mu", "receptance"),  # the gate of the sum: each rank's part of it takes the whole gate
    ),
    "RWKV7Attention": Unit(
        counts=("num_heads",),
        columns=(
            *("r_proj", "k_proj", "v_proj", "k_k", "k_a", "r_k", "g_norm"),
            *(f"{name}_lora.lora.2" for name in "wvag"),
        ),
        rows=("o_proj",),
        shared=(*(f"x_{name}" for name in "rwkvag"), *(f"{name}_lora.lora.0" for name in "wvag")),
        divided=("key_dim", "value_dim", "g_norm.num_groups"),
    ),
    "RWKV7FeedForward": Unit(
        counts=("intermediate_size",), columns=("key",), rows=("value",), shared=("x_k",)
    ),
    "ForgettingAttention": Unit(
        counts=_HEADS,
        columns=(*_QKV, "f_proj", "g_proj", "q_norm", "k_norm"),
        rows=("o_proj",),
        divided=("kv_dim", "q_norm.num_groups", "k_norm.num_groups"),
    ),
    "Attention": Unit(
        counts=_HEADS, columns=_QKV, rows=("o_proj",), shared=("q_norm", "k_norm"), divided=("kv_dim",)
    ),
    "GatedMLP": _GATED_MLP,
    **{
        f"{name}Attention": _CAUSAL
        for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma3", "SmolLM3")
    },
    **{
        f"{name}MLP": _GATED_MLP
        for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma3", "SmolLM3", "Olmo2")
    },
    "Olmo2Attention": Unit(
        counts=_CAUSAL_HEADS,
        columns=(*_QKV, "q_norm", "k_norm"),
        rows=("o_proj",),
        wide=("q_norm", "k_norm"),
    ),
    "Phi3Attention": Unit(
        counts=_CAUSAL_HEADS,
        rows=("o_proj",),
        stacked=(("qkv_proj", _phi3_projection),),
        divided=("num_key_value_heads",),
    ),
    "Phi3MLP": Unit(
        counts=("config.intermediate_size",),
        rows=("down_proj",),
        stacked=(("gate_up_proj", lambda m, ranks: [(m.config.intermediate_size, True)] * 2),),
    ),
    "GPT2Attention": Unit(
        counts=("num_heads",),
        rows=("c_proj",),
        stacked=(("c_attn", lambda m, ranks: [(m.embed_dim, True)] * 3),),
        divided=("split_size", "c_attn.nf"),
    ),
    "GPT2MLP": Unit(counts=("c_fc.nf",), columns=("c_fc",), rows=("c_proj",)),
}

"""The families of fla that train, and those that are refused."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flame.models.families import forgetting, initial, mamba2
from flame.models.families.recurrent import layer_flops
from flame.models.family import Carried, ContextPlan, Family, Initialize, StagePlan, own_rule
from flame.models.tensor_plan import TensorPlan

# the trainer computes the loss from hidden states, so fla's fused losses are off
_SETTINGS = (
    ("fuse_cross_entropy", False),
    ("fuse_linear_cross_entropy", False),
    ("use_l2warp", False),
    ("use_cache", False),
)


def _hidden(
    model: nn.Module, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, longest_segment: int
) -> Tensor:
    base: Any = next(child for name, child in model.named_children() if name != "lm_head")
    out = base(
        input_ids=tokens.reshape(1, -1),
        cu_seqlens=cu_seqlens,
        longest_segment=longest_segment,
        use_cache=False,
    )
    return out.last_hidden_state.view(*tokens.shape, -1)


def _linear_attn_hidden(
    model: nn.Module, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, longest_segment: int
) -> Tensor:
    """`LinearAttentionModel.forward` does not hand `cu_seqlens` on; its blocks take them."""
    base: Any = model.get_submodule("model")
    states = base.embeddings(tokens.reshape(1, -1))
    for block in base.layers:
        states = block(states, cu_seqlens=cu_seqlens, longest_segment=longest_segment)[0]
    return base.norm(states).view(*tokens.shape, -1)


# ------------------------------------------------------------------------------------- refusals


def _refuses(config: Any) -> str | None:
    return _refuses_but_mode(config) or _refuses_mode(config)


def _refuses_but_mode(config: Any) -> str | None:
    if getattr(config, "attnres_block_size", None) is not None:
        return "attnres_block_size: attention residuals are not supported"
    if config.hidden_act != "swish":
        return f'hidden_act: found "{config.hidden_act}", only "swish" is supported'
    return None


def _refuses_mode(config: Any) -> str | None:
    if getattr(config, "attn_mode", "chunk") != "chunk":
        return f'attn_mode: found "{config.attn_mode}", only "chunk" keeps packed documents apart in training'
    return None


def _hgrn_refuses(config: Any) -> str | None:
    if config.attn_mode != "fused_recurrent":
        return f'attn_mode: found "{config.attn_mode}", only "fused_recurrent" keeps packed documents apart'
    return _refuses_but_mode(config)


def _rwkv_refuses(config: Any) -> str | None:
    if config.hidden_act != "sqrelu":
        return f'hidden_act: found "{config.hidden_act}", only "sqrelu" is supported'
    if config.num_hidden_layers < 2:
        return "num_hidden_layers: found 1; initial weights depend on a layer's place among at least 2"
    if config.model_type == "rwkv7" and config.attn is not None:
        return "attn: fla's RWKV7 block cannot hold an attention layer; for a hybrid use gla or kda"
    return _refuses_mode(config)


def _mamba2_refuses(config: Any) -> str | None:
    if config.hidden_act not in ("silu", "swish"):
        return f'hidden_act: found "{config.hidden_act}", only "silu" is supported'
    return None


def _comba_refuses(config: Any) -> str | None:
    if getattr(config, "num_v_heads", None) not in (None, config.num_heads):
        return f"num_v_heads: found {config.num_v_heads}, only num_heads = {config.num_heads} is supported"
    return _refuses(config)


# --------------------------------------------------------------------------------------- heads


def _heads(config: Any) -> dict[str, int]:
    """Of the family's own layers, and of the attention layers among them."""
    many: int | None = getattr(config, "num_v_heads", None)
    own = {"num_heads": config.num_heads} if many is None else {"num_v_heads": many}
    return own | _attention_heads(config)


def _attention_heads(config: Any) -> dict[str, int]:
    hybrid = getattr(config, "attn", None)
    return {} if hybrid is None else {"attn.num_heads": hybrid["num_heads"]}


def _channels(config: Any) -> dict[str, int]:
    """HGRN has no heads: each channel is one."""
    return {"hidden_size": int(config.hidden_size * config.expand_ratio)} | _attention_heads(config)


def _lightnet_heads(config: Any) -> dict[str, int]:
    return {"num_heads": config.num_heads or config.hidden_size // config.expand_ratio} | _attention_heads(
        config
    )


# --------------------------------------------------------------------------------------- stages


def _passed(fourth: str | None) -> Any:
    """fla's blocks return states, attentions and cache, and most of them one more of their arguments."""

    def passed(states: Tensor, arguments: dict[str, Any]) -> tuple[Any, ...]:
        three = (states, None, arguments.get("past_key_values"))
        return three if fourth is None else (*three, arguments.get(fourth))

    return passed


def _stages(
    norm: str = "model.norm", fourth: str | None = "attnres_states", carried: Carried | None = None
) -> StagePlan:
    return StagePlan(norm, _passed(fourth), carried=carried)


def _first_values(config: Any, rows: int, length: int) -> tuple[int, ...]:
    """RWKV7's later layers mix the first layer's values into theirs."""
    widths = getattr(config, "value_dim", None) or config.hidden_size
    return 1, rows * length, widths[0] if isinstance(widths, list) else widths


def _lower_bounds(config: Any, rows: int, length: int) -> tuple[int, ...]:
    """HGRN's table of bounds, one softmax over all layers."""
    return config.num_hidden_layers, config.hidden_size


_BOUNDED = _stages(carried=Carried("model.lower_bounds", _lower_bounds, parameter=True))
_VALUES = _stages(fourth="v_first", carried=Carried("v_first", _first_values))


# -------------------------------------------------------------------------------------- records


def _family(
    model_type: str,
    *,
    refuses: Any = _refuses,
    initialize: Initialize = initial.constructed,
    hidden: Any = _hidden,
    base: str = "model",
    compiles: bool = False,
    pipeline: StagePlan | None = None,
    gpu: bool = False,
    tables: tuple[tuple[str, int], ...] = (),
    context: ContextPlan | None = None,
) -> Family:
    return Family(
        name=model_type,
        model_types=(model_type,),
        packing="flat",
        hidden=hidden,
        count=layer_flops,
        compiles=compiles,
        refuses=refuses,
        initialize=initialize,
        layers=f"{base}.layers",
        embedding_name=f"{base}.embeddings",
        undecayed=("lower_bounds", "x_bias", "bonus", "r_k"),  # HGRN's and RWKV's
        settings=_SETTINGS,
        context=context or ContextPlan(_heads),
        pipeline=pipeline or _stages(),
        gpu=gpu,
        tensor=TensorPlan(norm=f"{base}.norm_f" if base == "backbone" else f"{base}.norm", tables=tables),
    )


_TABLES = (("model.lower_bounds", 1),)  # a layer's are divided as its channels are

forgetting.install()
mamba2.install()

FLA_FAMILIES: tuple[Family, ...] = (
    _family("gla", gpu=True),
    _family("gated_deltanet", initialize=initial.gates),
    _family("delta_net"),
    _family("gated_deltaproduct", initialize=initial.gates),
    _family("kda", initialize=initial.gates),
    _family("comba", initialize=initial.comba, refuses=_comba_refuses),
    _family(
        "mamba2",
        initialize=own_rule,
        refuses=_mamba2_refuses,
        base="backbone",
        pipeline=_stages("backbone.norm_f", None),
    ),
    _family("retnet"),
    _family("linear_attn", hidden=_linear_attn_hidden, refuses=_refuses_but_mode),
    _family("hgrn", refuses=_hgrn_refuses, tables=_TABLES, context=ContextPlan(_channels), pipeline=_BOUNDED),
    _family("hgrn2", tables=_TABLES, pipeline=_BOUNDED),
    _family("gsa"),
    _family("rwkv6", initialize=initial.rwkv6, refuses=_rwkv_refuses, pipeline=_stages(fourth=None)),
    _family("rwkv7", initialize=initial.rwkv7, refuses=_rwkv_refuses, pipeline=_VALUES),
    _family("lightnet", context=ContextPlan(_lightnet_heads, hands_on=False)),
    _family("forgetting_transformer", initialize=own_rule),
    _family("transformer", compiles=True, gpu=True),
)

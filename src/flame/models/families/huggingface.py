"""transformers' own models, with packed rows through its attention interface.

The families listed here are checked by the tests like all others. Any other model of
`AutoModelForCausalLM` is taken by the same rules where `leak.py` proves on a narrow copy of it, at run time,
that they hold for it.
"""

from __future__ import annotations

import functools
import json
from typing import Any, cast

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from flame.errors import ModelError
from flame.models.attention import PACKED
from flame.models.families.leak import problem
from flame.models.family import ContextPlan, Family, StagePlan
from flame.models.flops import FlopCount, matrix_flops
from flame.models.tensor_plan import TensorPlan

_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def _hidden(
    model: nn.Module, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, longest_segment: int
) -> Tensor:
    out = cast("Any", model).base_model(
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
    """Matrix products, and 12 H D per attended pair and layer: q k^T and p v, three times for backward.

    A sliding window is not subtracted: with one, the count is an upper bound.
    """
    config: Any = model.config
    products = sum(m.weight.numel() for m in model.modules() if isinstance(m, Conv1D))
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head
    return FlopCount(matrix_flops(model) + 6.0 * products, 12.0 * config.num_hidden_layers * width)


def _refuses(config: Any) -> str | None:
    for name in _DROPOUT:
        if getattr(config, name, None):
            return f"{name}: found {getattr(config, name)}, only 0 is supported"
    for name in _EXPERTS:
        if getattr(config, name, None):
            return f"{name}: mixtures of experts are not supported; use a dense model, such as qwen3 or llama"
    return None


def _heads(config: Any) -> dict[str, int]:
    return {"num_attention_heads": config.num_attention_heads}


def _needs_whole_rows(config: Any) -> str | None:
    """Rotary embeddings that look at the largest position of a batch see another one in a part of it."""
    found: Any = getattr(config, "rope_parameters", None) or {}
    for rope in (found, *found.values()):
        kind = cast("dict[str, Any]", rope).get("rope_type") if isinstance(rope, dict) else None
        if kind in ("dynamic", "longrope"):
            return f'rope_type: found "{kind}", whose frequencies depend on the longest document of a batch'
    return None


_CONTEXT = ContextPlan(_heads, refuses=_needs_whole_rows)


def _passed(states: Tensor, arguments: dict[str, Any]) -> Tensor:
    return states


_STAGES = StagePlan(norm="model.norm", passed=_passed)


def _family(
    model_type: str,
    *,
    layers: str = "model.layers",
    embedding: str = "model.embed_tokens",
    refuses: Any = _refuses,
    compiles: bool = False,
    pipeline: StagePlan | None = _STAGES,
    gpu: bool = False,
    tensor: TensorPlan | None = None,
    context: ContextPlan | None = _CONTEXT,
) -> Family:
    return Family(
        name=model_type,
        model_types=(model_type,),
        packing="rows",
        hidden=_hidden,
        count=_flops,
        compiles=compiles,
        refuses=refuses,
        layers=layers,
        embedding_name=embedding,
        settings=(("use_cache", False),),
        attention=PACKED,
        source="transformers",
        context=context,
        pipeline=pipeline,
        gpu=gpu,
        tensor=tensor,
    )


HUGGINGFACE_FAMILIES: tuple[Family, ...] = (
    _family("llama", compiles=True, gpu=True, tensor=TensorPlan()),
    _family("mistral", tensor=TensorPlan()),
    _family("qwen2", tensor=TensorPlan()),
    _family("qwen3", tensor=TensorPlan()),
    _family("gemma", tensor=TensorPlan()),
    _family("gemma3_text", tensor=TensorPlan()),
    _family("olmo2", tensor=TensorPlan()),
    _family("phi3", tensor=TensorPlan()),
    _family("smollm3", tensor=TensorPlan()),
    _family(
        "gpt2",
        layers="transformer.h",
        embedding="transformer.wte",
        tensor=TensorPlan(norm="transformer.ln_f", positions="transformer.wpe"),
        pipeline=StagePlan(norm="transformer.ln_f", passed=_passed, added=("transformer.wpe",)),
    ),
)


def by_default_rules(config: PretrainedConfig) -> Family:
    """A family for a causal language model of transformers that none of the above is.

    Raises ModelError where transformers has no such model, or where the rules do not hold for it.
    """
    refusal = _refuses(config)
    if refusal is not None:
        raise ModelError(f"a {config.model_type} model with {refusal}")
    return _proven(type(config), config.to_json_string(use_diff=False))


@functools.lru_cache(maxsize=8)
def _proven(kind: type[PretrainedConfig], text: str) -> Family:
    """The proof costs a second, and the same config is asked for many times."""
    config = kind.from_dict(json.loads(text))
    model_type = str(config.model_type)
    known = ", ".join(family.name for family in HUGGINGFACE_FAMILIES)
    if kind not in cast("Any", AutoModelForCausalLM)._model_mapping:
        raise ModelError(
            f"transformers has no causal language model of type {model_type}; use one of {known}"
        )
    family = _family(model_type, pipeline=None)
    try:
        model = family.build(config)
        # that tokens are mixed by attention alone has not been shown
        layers, embedding = _stack(model, config), _embedding(model)
        family = _family(model_type, layers=layers, embedding=embedding, context=None, pipeline=None)
        reason = problem(family, config)
    except Exception as error:  # a guest's code raises whatever it likes
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if reason is not None:
        raise ModelError(
            f"a {model_type} model cannot be trained truly by the rules for transformers' models: {reason}; "
            f"use one of {known}"
        )
    return family


def _stack(model: nn.Module, config: PretrainedConfig) -> str:
    """The name of the list of layers."""
    depth = config.num_hidden_layers
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise ModelError(f"no list of {depth} layers is in it")
    return lists[0]


def _embedding(model: nn.Module) -> str:
    wanted = cast("Any", model).get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is wanted)

"""fla's families off the GPU: plain PyTorch in place of its Triton kernels.

`install()` replaces the functions of `REPLACED` in the modules that call them; tensors on a GPU still go
to the kernels. It is called when a model is built or loaded where CUDA is not available; a user of plain
transformers calls it before `from_pretrained`. Training, generation token by token, and left-padded
batches all work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.models import cpu_attention as attention
from flame.models import cpu_delta as delta
from flame.models import cpu_linear as linear
from flame.models import cpu_modules as modules
from flame.models.zoo import fla_module

# module of fla, name in it, what stands there off the GPU
REPLACED: list[tuple[str, str, Callable[..., Any]]] = [
    ("modules.norm.layernorm", "rms_norm", modules.rms_norm),
    ("modules.norm.layernorm", "layer_norm", modules.layer_norm),
    ("modules.norm.layernorm", "group_norm", modules.group_norm),
    ("modules.norm.layernorm_gated", "rmsnorm_fn", modules.rmsnorm_fn),
    ("modules.norm.fused_norm_gate", "rms_norm_gated", modules.rms_norm_gated),
    ("modules.mlp", "swiglu", modules.swiglu),
    ("modules.mlp", "swiglu_linear", modules.swiglu_linear),
    ("modules.feature_map", "swish", F.silu),
    ("modules.rotary.ops", "rotary_embedding", modules.rotary_embedding),
    ("modules.causal_conv1d.ops", "causal_conv1d", modules.causal_conv1d),
    ("modules.causal_conv1d.ops", "causal_conv1d_update", modules.causal_conv1d_update),
    ("layers.gla", "chunk_gla", linear.chunk_gla),
    ("ops.gla", "chunk_gla", linear.chunk_gla),
    ("layers.gla", "fused_recurrent_gla", linear.fused_recurrent_gla),
    ("layers.gated_deltanet", "causal_conv1d", modules.causal_conv1d),
    ("layers.gated_deltanet", "chunk_gated_delta_rule", delta.chunk_gated_delta_rule),
    ("layers.gated_deltanet", "fused_recurrent_gated_delta_rule", delta.chunk_gated_delta_rule),
    ("layers.delta_net", "chunk_delta_rule", delta.chunk_delta_rule),
    ("layers.delta_net", "fused_recurrent_delta_rule", delta.chunk_delta_rule),
    ("layers.delta_net", "elu_p1", modules.elu_p1),
    ("ops.simple_gla", "chunk_simple_gla", linear.chunk_simple_gla),
    ("ops.simple_gla", "fused_recurrent_simple_gla", linear.chunk_simple_gla),
    ("layers.multiscale_retention", "chunk_retention", linear.chunk_retention),
    ("layers.multiscale_retention", "fused_recurrent_retention", linear.chunk_retention),
    ("layers.linear_attn", "elu_p1", modules.elu_p1),
    ("layers.linear_attn", "chunk_linear_attn", linear.chunk_linear_attn),
    ("layers.linear_attn", "fused_chunk_linear_attn", linear.chunk_linear_attn),
    ("layers.linear_attn", "fused_recurrent_linear_attn", linear.chunk_linear_attn),
    ("layers.hgrn", "swiglu", modules.swiglu),
    ("layers.hgrn", "chunk_hgrn", linear.chunk_hgrn),
    ("layers.hgrn", "fused_recurrent_hgrn", linear.chunk_hgrn),
    ("layers.hgrn2", "swish", F.silu),
    ("layers.hgrn2", "chunk_gla", linear.chunk_gla),
    ("layers.hgrn2", "fused_recurrent_gla", linear.fused_recurrent_gla),
    ("layers.hgrn2", "rms_norm_linear", modules.rms_norm_linear),
    ("layers.gsa", "chunk_gsa", linear.chunk_gsa),
    ("layers.gsa", "fused_recurrent_gsa", linear.chunk_gsa),
    ("layers.gsa", "rms_norm_linear", modules.rms_norm_linear),
    ("layers.rwkv6", "token_shift", modules.token_shift),
    ("layers.rwkv6", "chunk_rwkv6", linear.chunk_rwkv6),
    ("layers.rwkv6", "fused_recurrent_rwkv6", linear.chunk_rwkv6),
    ("models.rwkv6.modeling_rwkv6", "token_shift", modules.token_shift),
    ("layers.rwkv7", "token_shift", modules.token_shift),
    ("layers.rwkv7", "l2_norm", modules.l2norm),
    ("layers.rwkv7", "fused_addcmul_rwkv7", modules.fused_addcmul_rwkv7),
    ("layers.rwkv7", "fused_k_rwkv7", modules.fused_k_rwkv7),
    ("layers.rwkv7", "gate_output_correction", modules.gate_output_correction),
    ("layers.rwkv7", "chunk_rwkv7", linear.chunk_rwkv7),
    ("layers.rwkv7", "fused_mul_recurrent_rwkv7", linear.fused_mul_recurrent_rwkv7),
    ("models.rwkv7.modeling_rwkv7", "token_shift", modules.token_shift),
    ("layers.kda", "chunk_kda", delta.chunk_kda),
    ("layers.kda", "fused_recurrent_kda", delta.chunk_kda),
    ("layers.comba", "chunk_comba", delta.chunk_comba),
    ("layers.comba", "fused_recurrent_comba", delta.chunk_comba),
    ("layers.gated_deltaproduct", "chunk_gated_delta_product", delta.chunk_gated_delta_product),
    (
        "layers.gated_deltaproduct",
        "fused_recurrent_gated_delta_rule",
        delta.fused_recurrent_gated_delta_rule,
    ),
    ("layers.forgetting_attn", "parallel_forgetting_attn", attention.parallel_forgetting_attn),
    ("layers.forgetting_attn", "attn_decoding_one_step", attention.attn_decoding_one_step),
    ("ops.lightnet.chunk", "fused_additive_gate", linear.fused_additive_gate),
    ("ops.lightnet.chunk", "chunk_gla", linear.chunk_gla),
    ("ops.lightnet.fused_recurrent", "fused_additive_gate", linear.fused_additive_gate),
    ("ops.lightnet.fused_recurrent", "fused_recurrent_gla", linear.fused_recurrent_gla),
    ("layers.lightnet", "rms_norm_swish_gate_linear", modules.rms_norm_swish_gate_linear),
]
# entries of fla's table of activations by name, which layers read when they are made
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "logsigmoid": F.logsigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "sqrelu": modules.sqrelu,
}


@dataclass(frozen=True, slots=True)
class _ByDevice:
    """fla's kernel for CUDA tensors, the plain function for others."""

    kernel: Callable[..., Any]
    plain: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first: Tensor = args[0] if args else next(iter(kwargs.values()))
        return self.kernel(*args, **kwargs) if first.is_cuda else self.plain(*args, **kwargs)


def _by_device(kernel: Any, plain: Callable[..., Any]) -> Callable[..., Any]:
    return kernel if isinstance(kernel, _ByDevice) else _ByDevice(kernel, plain)


def install() -> None:
    """Make fla's supported families run without a GPU, in this process. Idempotent."""
    for module, name, plain in REPLACED:
        place = fla_module(module)
        setattr(place, name, _by_device(getattr(place, name), plain))
    table: dict[str, Any] = fla_module("modules.activations").ACT2FN
    for name, plain in ACTIVATIONS.items():
        table[name] = _by_device(table[name], plain)

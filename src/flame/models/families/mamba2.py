"""fla's Mamba2 layer over packed rows.

fla's own forward knows no segments: it asks mamba_ssm for a scan without `seq_idx`, or scans the row in
plain PyTorch. Its recurrence is gated linear attention with one decay a head (arXiv 2405.21060, section 3):
C are the queries, B the keys, the step times x the values, the step times A the decay. So it runs on fla's
own kernels for that, which keep segments apart, on the GPU, and on `cpu.py`'s elsewhere.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from flame.models.kernel_platform import gate_per_head_is_wrong
from flame.models.zoo import fla_module

_layer: Any = fla_module("layers.mamba2")
_convolution: Any = fla_module("modules.causal_conv1d.ops")
_ops: Any = fla_module("ops.simple_gla")
_per_channel: Any = fla_module("ops.gla")


def forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    output_attentions: bool | None = False,
    **kwargs: Any,
) -> tuple[Tensor, None, Any]:
    """hidden_states: [B, L, d]; `cu_seqlens` over [1, T, d]; a 0-1 mask [B, L] marks left padding."""
    last = _layer.get_layer_cache(self, past_key_values)
    cu_seqlens: Tensor | None = kwargs.get("cu_seqlens")
    rows, length = hidden_states.shape[:2]
    mask = None
    if attention_mask is not None and cu_seqlens is None:
        mask = attention_mask[:, -length:, None].to(hidden_states.dtype)
        hidden_states = hidden_states * mask
    sizes = [self.intermediate_size, self.conv_dim, self.num_heads]
    gate, mixed, step = self.in_proj(hidden_states).split(sizes, -1)
    if mask is not None:
        mixed = mixed * mask
    mixed, conv_state = _convolution.causal_conv1d(
        x=mixed,
        weight=self.conv1d.weight.squeeze(1),
        bias=self.conv1d.bias,
        initial_state=None if last is None else last["conv_state"],
        output_final_state=use_cache,
        activation=self.activation,
        cu_seqlens=cu_seqlens,
    )
    if mask is not None:
        mixed = mixed * mask
    group = self.n_groups * self.ssm_state_size
    x, b, c = mixed.split([self.intermediate_size, group, group], -1)
    out, state = _scan(self, x, b, c, step, None if last is None else last["recurrent_state"], kwargs)
    _layer.update_layer_cache(
        self, past_key_values, recurrent_state=state, conv_state=conv_state, offset=length
    )
    out = out.reshape(rows, length, -1)
    out = self.norm(out, gate) if self.rmsnorm else out * self.act(gate)
    return self.out_proj(out.to(hidden_states.dtype)), None, past_key_values


def _scan(
    self: Any, x: Tensor, b: Tensor, c: Tensor, step: Tensor, initial: Tensor | None, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """x: [B, L, H P]; b, c: [B, L, G N]; step: [B, L, H] to [B, L, H, P] and the state [B, H, N, P]."""
    step = F.softplus(step.float() + self.dt_bias.float()).clamp(*self.dt_limit)
    x = x.unflatten(-1, (self.num_heads, self.head_dim))
    shared = self.num_heads // self.n_groups
    keys, queries = (
        t.unflatten(-1, (self.n_groups, self.ssm_state_size)).repeat_interleave(shared, 2) for t in (b, c)
    )
    one_token = x.shape[1] == 1 and not torch.is_grad_enabled()
    decay = -self.A_log.float().exp() * step
    scan = _ops.fused_recurrent_simple_gla if one_token else _ops.chunk_simple_gla
    if torch.is_grad_enabled() and spread_decay(x.device):
        scan, decay = _per_channel.chunk_gla, decay[..., None].expand_as(queries).contiguous()
    out, state = scan(
        q=queries.to(x.dtype),
        k=keys.to(x.dtype),
        v=(x * step[..., None]).to(x.dtype),
        g=decay,
        scale=1.0,
        initial_state=initial,
        output_final_state=True,
        cu_seqlens=kwargs.get("cu_seqlens"),
    )
    return out + x * self._get_D(expand_to_head_dim=True), state


@cache
def spread_decay(device: torch.device) -> bool:
    """Whether a head's decay is given to each of its channels: GLA's kernels take it so, where those with
    one decay a head are wrong."""
    return device.type == "cuda" and gate_per_head_is_wrong(
        torch.cuda.get_device_capability(device), triton.__version__
    )


def install() -> None:
    """Put this forward in the place of fla's. Idempotent."""
    _layer.Mamba2.forward = forward

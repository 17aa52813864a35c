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

from flame.models.recurrence import gated_delta_rule, gated_linear_attention
from flame.models.zoo import fla_module

# ------------------------------------------------------------------------ norms and activations


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """fla's function of this name: [..., D]; with `prenorm` also the sum of `x` and `residual`."""
    total = x if residual is None else x + residual
    normed = F.rms_norm(total.float(), total.shape[-1:], None, eps)
    normed = normed if weight is None else normed * weight
    out = (normed if bias is None else normed + bias).to(x.dtype)
    if not prenorm:
        return out
    return out, total.float() if residual_in_fp32 else total


def rms_norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    activation: str = "swish",
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """fla's function of this name: the norm of `x`, times swish or sigmoid of the gate `g`."""
    gate = torch.sigmoid(g) if activation == "sigmoid" else F.silu(g)
    normed = rms_norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32)
    if isinstance(normed, tuple):
        return normed[0] * gate, normed[1]
    return normed * gate


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """swish(x) * y."""
    return F.silu(x) * y


def swiglu_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer on swish(x) * y."""
    return F.linear(F.silu(x) * y, weight, bias)


# ------------------------------------------------------------------------------ rotary embedding


def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
) -> Tensor:
    """fla's function of this name. x: [B, T, H, D]; cos, sin: [positions, D / 2]; positions restart at
    each segment and are moved by the offsets (an int, or one for each segment or row)."""
    at = _positions(x, cu_seqlens)
    if isinstance(seqlen_offsets, Tensor) and cu_seqlens is not None:
        at = at + torch.repeat_interleave(seqlen_offsets, cu_seqlens.diff())
    elif isinstance(seqlen_offsets, Tensor):
        at = at + seqlen_offsets[:, None]
    else:
        at = at + seqlen_offsets
    at = at.clamp(min=0)  # the padding to the left of a short row; nothing reads it
    cos, sin = cos[at][..., None, :], sin[at][..., None, :]
    turned, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], -1)
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


def _positions(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """int64 [T]: the place of each token of x [B, T, ...] in its segment."""
    at = torch.arange(x.shape[1], device=x.device)
    if cu_seqlens is None:
        return at
    bounds = cu_seqlens.to(torch.int64)
    return at - torch.repeat_interleave(bounds[:-1], bounds.diff())


# ----------------------------------------------------------------------------- short convolution


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool | None = False,
    activation: str | None = None,
    backend: str | None = None,
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """fla's function of this name: a depthwise causal convolution within segments.

    x: [B, T, D], B = 1 with cu_seqlens; weight: [D, W]; states: [N, D, W], the last W inputs.
    """
    if cu_seqlens is not None and initial_state is not None:
        parts = [
            _convolved(part, weight, state[None])
            for part, state in zip(x.split(cu_seqlens.diff().tolist(), 1), initial_state, strict=True)
        ]
        out = torch.cat(parts, 1)
    elif cu_seqlens is not None:
        out = _convolved_packed(x, weight, _positions(x, cu_seqlens))
    else:
        out = _convolved(x, weight, initial_state)
    out = _finished(out, bias, activation, residual)
    if not output_final_state:
        return out, None
    rows = x.unbind(0) if cu_seqlens is None else x[0].split(cu_seqlens.diff().tolist())
    width = weight.shape[1]
    before = x.new_zeros(len(rows), x.shape[-1], width) if initial_state is None else initial_state
    states = [torch.cat([s.to(x.dtype), r.mT], 1)[:, -width:] for s, r in zip(before, rows, strict=True)]
    return out, torch.stack(states)


def _finished(out: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None) -> Tensor:
    out = out if bias is None else out + bias
    out = F.silu(out) if activation in ("silu", "swish") else out
    return out if residual is None else out + residual


def _convolved(x: Tensor, weight: Tensor, state: Tensor | None) -> Tensor:
    """Rows x [B, T, D], each after its state [B, D, W] or after zeros."""
    width, length = weight.shape[1], x.shape[1]
    left = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    if state is not None:
        left = state[..., 1:].mT.to(x.dtype)
    extended = torch.cat([left, x], 1)
    taps = [extended[:, i : i + length] * weight[:, i] for i in range(width)]
    return torch.stack(taps).sum(0)


def _convolved_packed(x: Tensor, weight: Tensor, at: Tensor) -> Tensor:
    """x [1, T, D]; a tap that would reach before the token's segment (positions `at`) is left out."""
    width = weight.shape[1]
    out = x * weight[:, -1]
    for back in range(1, min(width, x.shape[1])):
        inside = (at[back:] >= back).unsqueeze(-1)
        tap = x[:, :-back] * weight[:, -1 - back] * inside
        out = out + F.pad(tap, (0, 0, back, 0))
    return out


def causal_conv1d_update(
    x: Tensor,
    cache: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """fla's function of this name: one token of each of N sequences; `cache` [N, D, W] moves on in
    place."""
    assert weight is not None
    cache.copy_(torch.cat([cache[..., 1:], x.reshape(-1, x.shape[-1], 1).to(cache.dtype)], -1))
    out = (cache * weight).sum(-1).view(x.shape).to(x.dtype)
    return _finished(out, bias, activation, residual), cache


# ------------------------------------------------------------------------------ linear attention


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def _bounds(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Segments of the flattened [B, T, ...]: those given, else one a row."""
    if cu_seqlens is not None:
        return cu_seqlens
    return torch.arange(0, x.shape[0] * x.shape[1] + 1, x.shape[1], device=x.device)


def _state_in(state: Tensor | None, v_first: bool) -> Tensor | None:
    return state.mT if state is not None and v_first else state


def _state_out(state: Tensor, wanted: bool, v_first: bool) -> Tensor | None:
    if not wanted:
        return None
    return state.mT.contiguous() if v_first else state


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """fla's function of this name. q, k, g: [B, T, H, K]; v: [B, T, H, V]; states [N, H, K, V]."""
    scale = float(k.shape[-1] ** -0.5) if scale is None else scale
    initial = _state_in(initial_state, state_v_first)
    flat = (_flat(q), _flat(k), _flat(v), _flat(g))
    out, final = gated_linear_attention(*flat, _bounds(q, cu_seqlens), scale, initial)
    return out.view(v.shape).to(v.dtype), _state_out(final, bool(output_final_state), state_v_first)


def fused_recurrent_gla(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """fla's function of this name, as its layer calls it: the same sums as `chunk_gla`."""
    return chunk_gla(q, k, v, gk, **kwargs)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,  # fla's name
    dt_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """fla's function of this name. q, k: [B, T, H, K]; v: [B, T, HV, V]; g, beta: [B, T, HV]."""
    scale = float(k.shape[-1] ** -0.5) if scale is None else scale
    q, k, g, beta = q.float(), k.float(), g.float(), beta.float()
    if use_qk_l2norm_in_kernel:
        q, k = _l2_norm(q), _l2_norm(k)
    if use_beta_sigmoid_in_kernel:
        beta = beta.sigmoid() * (2.0 if allow_neg_eigval else 1.0)
    if use_gate_in_kernel:
        assert A_log is not None
        g = -A_log.float().exp() * F.softplus(g if dt_bias is None else g + dt_bias.float())
    shared = v.shape[2] // q.shape[2]
    if shared > 1:
        q, k = q.repeat_interleave(shared, 2), k.repeat_interleave(shared, 2)
    initial = _state_in(initial_state, state_v_first)
    flat = (_flat(q), _flat(k), _flat(v), _flat(g), _flat(beta))
    out, final = gated_delta_rule(*flat, _bounds(v, cu_seqlens), scale, initial)
    return out.view(v.shape).to(v.dtype), _state_out(final, bool(output_final_state), state_v_first)


def _l2_norm(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


# ---------------------------------------------------------------------------------- installation

# module of fla, name in it, what stands there off the GPU
REPLACED: list[tuple[str, str, Callable[..., Any]]] = [
    ("modules.norm.layernorm", "rms_norm", rms_norm),
    ("modules.norm.fused_norm_gate", "rms_norm_gated", rms_norm_gated),
    ("modules.mlp", "swiglu", swiglu),
    ("modules.mlp", "swiglu_linear", swiglu_linear),
    ("modules.rotary.ops", "rotary_embedding", rotary_embedding),
    ("modules.causal_conv1d.ops", "causal_conv1d", causal_conv1d),
    ("modules.causal_conv1d.ops", "causal_conv1d_update", causal_conv1d_update),
    ("layers.gla", "chunk_gla", chunk_gla),
    ("layers.gla", "fused_recurrent_gla", fused_recurrent_gla),
    ("layers.gated_deltanet", "causal_conv1d", causal_conv1d),
    ("layers.gated_deltanet", "chunk_gated_delta_rule", chunk_gated_delta_rule),
    ("layers.gated_deltanet", "fused_recurrent_gated_delta_rule", chunk_gated_delta_rule),
]
# entries of fla's table of activations by name, which layers read when they are made
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "logsigmoid": F.logsigmoid,
    "silu": F.silu,
    "swish": F.silu,
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

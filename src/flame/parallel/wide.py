"""Parts of layers that are not local to a head: RMS norms over a width that lies on several ranks, and
functions for which it matters which heads they get."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.models.zoo import fla_module
from flame.parallel.exchange import Exchange

_ops: Any = fla_module("ops.simple_gla")


def wide_rms_norm(x: Tensor, weight: Tensor | None, eps: float, exchange: Exchange) -> Tensor:
    """The RMS norm over all ranks' last dimensions, of which each has [..., D]; in float32, to x's dtype.

    One number a token travels, forward and backward.
    """
    wide = x.float()
    squares = exchange.total(wide.square().sum(-1, keepdim=True))
    normed = wide * torch.rsqrt(squares / (x.shape[-1] * exchange.size) + eps)
    return (normed if weight is None else normed * weight).to(x.dtype)


def widen(module: Any, name: str, exchange: Exchange) -> None:
    """Lets the norm `name` of a layer, whose weights are divided already, span all ranks."""
    norm = getattr(module, name)
    group: int | None = getattr(norm, "group_size", None)
    if group is not None and group <= norm.weight.shape[-1]:
        return  # this rank's groups of channels are whole
    norm.forward = functools.partial(_FORWARDS[type(norm).__name__], norm, exchange)
    used = type(module).forward.__code__.co_names  # some layers call the function, not the module
    _with_names(module, {n: functools.partial(f, exchange) for n, f in _FUSED.items() if n in used})


def headed(module: Any, name: str, exchange: Exchange) -> None:
    """Lets the function `name` that a layer calls know that its heads are not the first ones."""
    _with_names(module, {name: functools.partial(_HEADED[name], exchange)})


def _with_names(module: Any, names: dict[str, Callable[..., Any]]) -> None:
    """The layer's own forward, with other functions behind some of the names that it calls."""
    if not names:
        return
    own: Any = getattr(module.forward, "__func__", module.forward)
    forward = types.FunctionType(
        own.__code__, {**own.__globals__, **names}, own.__name__, own.__defaults__, own.__closure__
    )
    forward.__kwdefaults__ = own.__kwdefaults__
    module.forward = types.MethodType(forward, module)


# ---------------------------------------------------------------------------------------- norms


def _rms_norm(norm: Any, exchange: Exchange, x: Tensor) -> Tensor:
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return wide_rms_norm(x, norm.weight, eps, exchange)


def _rms_norm_gated(norm: Any, exchange: Exchange, x: Tensor, g: Tensor) -> Tensor:
    gate = torch.sigmoid(g.float()) if norm.activation == "sigmoid" else F.silu(g.float())
    return (wide_rms_norm(x.float(), norm.weight, norm.eps, exchange) * gate).to(x.dtype)


def _mamba2_norm(norm: Any, exchange: Exchange, x: Tensor, z: Tensor) -> Tensor:
    gate = F.silu(z.float())
    if norm.norm_before_gate:
        return (wide_rms_norm(x.float(), norm.weight, norm.eps, exchange) * gate).to(x.dtype)
    return wide_rms_norm(x.float() * gate, norm.weight, norm.eps, exchange).to(x.dtype)


_FORWARDS: dict[str, Callable[..., Tensor]] = {
    "RMSNorm": _rms_norm,
    "Olmo2RMSNorm": _rms_norm,
    "FusedRMSNormGated": _rms_norm_gated,
    "RMSNormGated": _mamba2_norm,
}


def _rms_norm_linear(
    exchange: Exchange,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    eps: float = 1e-5,
) -> Tensor:
    """fla's function of this name over all ranks' channels; the linear layer gives this rank's part."""
    return F.linear(wide_rms_norm(x, norm_weight, eps, exchange), linear_weight, linear_bias)


def _rms_norm_swish_gate_linear(
    exchange: Exchange,
    x: Tensor,
    g: Tensor,
    norm_weight: Tensor | None,
    norm_bias: None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    eps: float = 1e-6,
) -> Tensor:
    """fla's function of this name, the same way."""
    gated = wide_rms_norm(x.float(), norm_weight, eps, exchange) * F.silu(g.float())
    return F.linear(gated.to(x.dtype), linear_weight, linear_bias)


_FUSED: dict[str, Callable[..., Tensor]] = {
    "rms_norm_linear": _rms_norm_linear,
    "rms_norm_swish_gate_linear": _rms_norm_swish_gate_linear,
}

# ---------------------------------------------------------------------------------------- heads


def _retention(exchange: Exchange, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Any:
    """fla's `chunk_retention`, whose head h decays by 1 - 2^(-5 - h), for the heads of this rank."""
    heads = exchange.rank * q.shape[2] + torch.arange(q.shape[2], dtype=torch.float, device=q.device)
    decay = (1 - 2.0 ** (-5.0 - heads)).log()
    return _ops.chunk_simple_gla(q=q, k=k, v=v, g_gamma=decay, **kwargs)


_HEADED: dict[str, Callable[..., Any]] = {"chunk_retention": _retention}

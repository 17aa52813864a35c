"""The functions that mix tokens, over rows that lie on several ranks (`context.py`).

`install` puts a function before each of them that looks whether its rows are cut. Where they are, there are
two ways, and both run the function itself, kernel or plain:

- heads: tokens are exchanged for heads, and each rank runs all tokens of its heads. All ranks do the same
  work whatever the documents are.
- state: each rank runs its own tokens. A recurrence begins with the state that the rank before hands on
  (gradients come back the same way), attention with the keys and values of its first document that lie
  before.

Short convolutions and token shifts get the few tokens before the run, rotary embeddings their place in
the document.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from flame.models import attention, cpu
from flame.models.zoo import fla_module
from flame.parallel.context import (
    Part,
    from_heads,
    own_heads,
    part_of,
    preceding,
    receive_states,
    send_states,
    to_heads,
)

Named = dict[str, Any]  # a call's arguments by name
Shapes = list[tuple[int, ...]]  # of the states of one document
Function = Callable[..., Any]


# ------------------------------------------------------------------------------------ recurrences


def _matrix(call: Named) -> Shapes:
    """H matrices of K x V."""
    key, value = call["k"].shape[-1], call["v"].shape[-1]
    matrix = (value, key) if call.get("state_v_first") else (key, value)
    return [(call["v"].shape[2], *matrix)]


def _normalized(call: Named) -> Shapes:
    """With a normaliser, the sum of the keys beside it."""
    keys = call["k"]
    return [*_matrix(call), (1, *keys.shape[2:])] if call.get("normalize", True) else _matrix(call)


def _slots(call: Named) -> Shapes:
    """Slots of keys, and slots of values."""
    heads, slots = call["s"].shape[2:]
    return [(heads, call["k"].shape[-1], slots), (heads, slots, call["v"].shape[-1])]


def _channels(call: Named) -> Shapes:
    return [(call["x"].shape[-1],)]


@dataclass(frozen=True, slots=True)
class Recurrence:
    """How a recurrence of fla's takes its arguments."""

    tokens: tuple[str, ...]  # [1, T, H, ...]; named here in the order in which they may be given without name
    heads: tuple[str, ...] = ()  # parameters whose first dimension is made of heads
    state: Callable[[Named], Shapes] | None = _matrix  # None: it cannot be handed on
    chained: bool = False  # fla's kernel hands its state on by itself, all ranks at once

    def call(self, whole: Function, args: tuple[Any, ...], kwargs: Named) -> Any:
        """`whole`, which knows nothing of ranks, on this rank's tokens."""
        part = part_of(kwargs.get("cu_seqlens"))
        if part is None:
            return whole(*args, **kwargs)
        call = dict(zip(self.tokens, args, strict=False)) | kwargs
        heads = max(call[name].shape[2] for name in self.tokens if call.get(name) is not None)
        if self.state is None or part.exchanges_heads(heads):
            return self._by_heads(whole, call, part)
        given = all(call.get(name) is not None for name in self.tokens)  # fla's want a gate too
        if self.chained and given and call[self.tokens[0]].is_cuda:
            return _by_fla(whole, call, part)
        return _by_state(whole, call, part, self.state(call))

    def _by_heads(self, whole: Function, call: Named, part: Part) -> Any:
        names = [name for name in self.tokens if call.get(name) is not None]
        call |= dict(zip(names, to_heads([call[name] for name in names], part), strict=True))
        call |= {name: own_heads(call[name], part) for name in self.heads if call.get(name) is not None}
        result = whole(**{**call, "cu_seqlens": part.cu_seqlens, **_no_state(call)})
        if isinstance(result, Tensor):
            return from_heads(result, part)
        return (from_heads(result[0], part), *result[1:])


def _no_state(call: Named) -> Named:
    """Where a state could be asked for, none is."""
    return {"output_final_state": False} if "output_final_state" in call else {}


def _by_state(whole: Function, call: Named, part: Part, shapes: Shapes) -> tuple[Tensor, None]:
    """This rank's tokens, after those of the rank before."""
    documents = call["cu_seqlens"].numel() - 1
    initial = None
    if part.continues:
        anchor = call.get("q", call.get("r", call.get("x")))
        received = receive_states(cast("Tensor", anchor), shapes, part)
        states = [
            torch.cat([state[None], state.new_zeros(documents - 1, *state.shape)]) for state in received
        ]
        initial = states[0] if len(states) == 1 else tuple(states)
    # a tensor of its own: what the function calls in turn is not to look again
    call = {**call, "cu_seqlens": call["cu_seqlens"].view(-1)}
    out, final = whole(**{**call, "initial_state": initial, "output_final_state": part.is_continued})
    values: Any = call.get("v", call.get("x"))
    out = out.to(values.dtype)  # a float32 state may have widened it
    if part.is_continued:
        finals = final if isinstance(final, tuple) else (final,)
        out = send_states(out, [state[-1] for state in finals], part)
    return out, None


def _by_fla(whole: Function, call: Named, part: Part) -> tuple[Tensor, None]:
    """fla's own kernels for this: all ranks find at once what their run does to a state, exchange that, and
    run."""
    build = fla_module("ops.cp").build_cp_context
    context = build(cu_seqlens=part.cu_seqlens, group=part.group, cu_seqlens_cpu=part.bounds)
    call = {**call, "cu_seqlens": context.cu_seqlens, "initial_state": None, "output_final_state": False}
    return whole(**call, cp_context=context)[0], None


def retention(whole: Function, *args: Any, **kwargs: Any) -> Any:
    """fla's retention, which takes a head's decay from its number: here it is given."""
    if part_of(kwargs.get("cu_seqlens")) is None:
        return whole(*args, **kwargs)
    heads = torch.arange(kwargs["q"].shape[2], device=kwargs["q"].device, dtype=torch.float32)
    gamma = (1 - 2.0 ** (-5.0 - heads)).log()
    return fla_module("ops.simple_gla").chunk_simple_gla(**kwargs, g_gamma=gamma)


# ------------------------------------------------------------------------------------- attention


def attend(
    whole: Function,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """`attention.varlen_attention`: query [T, H, D]; key, value [T, G, D]."""
    part = part_of(cu_seqlens)
    if part is None:
        return whole(query, key, value, cu_seqlens, longest, scale, window)
    if part.exchanges_heads(query.shape[1]):
        q, k, v = to_heads([query[None], key[None], value[None]], part)
        return from_heads(whole(q[0], k[0], v[0], part.cu_seqlens, part.longest, scale, window)[None], part)[
            0
        ]
    limit = None if window is None else window - 1
    both = preceding(torch.cat([key, value], -1), part, limit)
    before = both.split([key.shape[-1], value.shape[-1]], -1)
    keys, values = torch.cat([before[0], key]), torch.cat([before[1], value])
    return whole(query, keys, values, cu_seqlens, longest, scale, window, before=len(both))


def forget(
    whole: Function, q: Tensor, k: Tensor, v: Tensor, g: Tensor, cu_seqlens: Tensor | None = None
) -> Tensor:
    """fla's forgetting attention: q [1, T, H, D]; k, v [1, T, G, D]; g [1, T, H]. The kernel wants a query
    for each key, so those before this rank's tokens get one that nobody reads."""
    part = part_of(cu_seqlens)
    if part is None:
        return whole(q, k, v, g, cu_seqlens=cu_seqlens)
    if part.exchanges_heads(q.shape[2]):
        return FORGETTING.call(whole, (q, k, v, g), {"cu_seqlens": cu_seqlens})
    before = [preceding(x[0], part)[None] for x in (k, v, g)]
    skipped = before[0].shape[1]
    keys, values, gates = (torch.cat(pair, 1) for pair in zip(before, (k, v, g), strict=True))
    queries = torch.cat([q.new_zeros(1, skipped, *q.shape[2:]), q], 1)
    return whole(queries, keys, values, gates, cu_seqlens=_longer(cu_seqlens, skipped))[:, skipped:]


FORGETTING = Recurrence(("q", "k", "v", "g"), state=None)


# ------------------------------------------------------------------------- neighbours and positions


def _longer(cu_seqlens: Any, tokens: int) -> Tensor:
    """Bounds whose first document has so many tokens more in front."""
    return torch.cat([cu_seqlens[:1], cu_seqlens[1:] + tokens])


def convolve(whole: Function, x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    """fla's short convolution: x [1, T, D], weight [D, W]; the W - 1 tokens before are fetched."""
    cu_seqlens = kwargs.get("cu_seqlens")
    part = part_of(cu_seqlens)
    if part is None:
        return whole(x, weight, *args, **kwargs)
    before = preceding(x[0], part, weight.shape[-1] - 1)
    extended = torch.cat([before, x[0]])[None]
    call = {**kwargs, "cu_seqlens": _longer(cu_seqlens, len(before)), **_no_state(kwargs)}
    out, _ = whole(extended, weight, *args, **call)
    return out[:, len(before) :], None


def shift(whole: Function, x: Tensor, cu_seqlens: Tensor | None = None, **kwargs: Any) -> Any:
    """fla's token shift: x [1, T, D]; the token before is fetched."""
    part = part_of(cu_seqlens)
    if part is None:
        return whole(x, cu_seqlens, **kwargs)
    before = preceding(x[0], part, 1)
    extended = torch.cat([before, x[0]])[None]
    out = whole(extended, _longer(cu_seqlens, len(before)), **kwargs)
    if isinstance(out, tuple):
        shifted, last = cast("tuple[Tensor, Any]", out)
        return shifted[:, len(before) :], last
    return out[:, len(before) :]


def rotate(
    whole: Function,
    layer: Any,
    q: Tensor,
    k: Tensor,
    seqlen_offset: Any = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    **kwargs: Any,
) -> Any:
    """fla's rotary embedding: the first document goes on where the rank before stopped."""
    part = part_of(cu_seqlens)
    if part is not None and cu_seqlens is not None:
        # on the device from the start, so that nothing is copied to it
        first = torch.arange(cu_seqlens.numel() - 1, device=q.device) == 0
        seqlen_offset = first.to(torch.int32) * part.before[part.rank]
        max_seqlen = max(max_seqlen or 0, part.longest)
    return whole(
        layer, q, k, seqlen_offset=seqlen_offset, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, **kwargs
    )


# ---------------------------------------------------------------------------------------- install

_GLA = Recurrence(("q", "k", "v", "g"))
_GLA_STEP = Recurrence(("q", "k", "v", "gk"))
_SIMPLE = Recurrence(("q", "k", "v", "g"), heads=("g_gamma",))
_GATED_DELTA = Recurrence(("q", "k", "v", "g", "beta"), heads=("A_log", "dt_bias"), chained=True)
_GATED_DELTA_STEP = Recurrence(("q", "k", "v", "g", "beta"), heads=("A_log", "dt_bias"))
_DELTA = Recurrence(("q", "k", "v", "beta"))
_PRODUCT = Recurrence(("q", "k", "v", "g", "beta"), chained=True)
_COMBA = Recurrence(("q", "k", "v", "p", "g", "beta"))
_LINEAR = Recurrence(("q", "k", "v"), state=_normalized)
_HGRN = Recurrence(("x", "g"), state=_channels)
_GSA = Recurrence(("q", "k", "v", "s", "g"), state=_slots)
_RWKV6 = Recurrence(("r", "k", "v", "w"), heads=("u",))
_RWKV7 = Recurrence(("r", "w", "k", "v", "a", "b"), chained=True)
_LIGHTNET = Recurrence(("q", "k", "v"), state=None)  # nothing before a document is no sum of exponentials

# module of fla, name in it, how it is called
RECURRENCES: tuple[tuple[str, str, Recurrence], ...] = (
    ("layers.gla", "chunk_gla", _GLA),
    ("layers.gla", "fused_recurrent_gla", _GLA_STEP),
    ("layers.hgrn2", "chunk_gla", _GLA),
    ("layers.hgrn2", "fused_recurrent_gla", _GLA_STEP),
    ("ops.simple_gla", "chunk_simple_gla", _SIMPLE),
    ("layers.gated_deltanet", "chunk_gated_delta_rule", _GATED_DELTA),
    ("layers.gated_deltanet", "fused_recurrent_gated_delta_rule", _GATED_DELTA_STEP),
    ("layers.delta_net", "chunk_delta_rule", _DELTA),
    ("layers.delta_net", "fused_recurrent_delta_rule", _DELTA),
    ("layers.gated_deltaproduct", "chunk_gated_delta_product", _PRODUCT),
    ("layers.kda", "chunk_kda", _GATED_DELTA),
    ("layers.kda", "fused_recurrent_kda", _GATED_DELTA_STEP),
    ("layers.comba", "chunk_comba", _COMBA),
    ("layers.comba", "fused_recurrent_comba", _COMBA),
    ("layers.linear_attn", "chunk_linear_attn", _LINEAR),
    ("layers.linear_attn", "fused_recurrent_linear_attn", _LINEAR),
    ("layers.hgrn", "fused_recurrent_hgrn", _HGRN),
    ("layers.gsa", "chunk_gsa", _GSA),
    ("layers.gsa", "fused_recurrent_gsa", _GSA),
    ("layers.rwkv6", "chunk_rwkv6", _RWKV6),
    ("layers.rwkv6", "fused_recurrent_rwkv6", _RWKV6),
    ("layers.rwkv7", "chunk_rwkv7", _RWKV7),
    ("layers.lightnet", "chunk_lightnet", _LIGHTNET),
    ("layers.lightnet", "fused_recurrent_lightnet", _LIGHTNET),
)
OTHERS: tuple[tuple[str, str, Function], ...] = (
    ("layers.multiscale_retention", "chunk_retention", retention),
    ("layers.multiscale_retention", "fused_recurrent_retention", retention),
    ("layers.forgetting_attn", "parallel_forgetting_attn", forget),
    ("modules.causal_conv1d.ops", "causal_conv1d", convolve),
    ("layers.rwkv6", "token_shift", shift),
    ("layers.rwkv7", "token_shift", shift),
    ("models.rwkv6.modeling_rwkv6", "token_shift", shift),
    ("models.rwkv7.modeling_rwkv7", "token_shift", shift),
)
_installed: set[tuple[int, str]] = set()


def install() -> None:
    """Puts these before fla's functions and before `varlen_attention`, in this process. Idempotent; rows that
    are whole go on as before."""
    if not torch.cuda.is_available():
        cpu.install()  # what stands in for the kernels is then called, not the kernels
    for module, name, recurrence in RECURRENCES:
        _before(fla_module(module), name, lambda whole, *a, _r=recurrence, **k: _r.call(whole, a, k))
    for module, name, function in OTHERS:
        _before(fla_module(module), name, function)
    _before(fla_module("modules.rotary.ops").RotaryEmbedding, "forward", rotate)
    _before(attention, "varlen_attention", attend)


def _before(place: Any, name: str, function: Function) -> None:
    if (id(place), name) in _installed:
        return
    _installed.add((id(place), name))
    whole = getattr(place, name)

    @torch.compiler.disable  # exchanges and the look-up are no part of a compiled graph
    def called(*args: Any, **kwargs: Any) -> Any:
        return function(whole, *args, **kwargs)

    setattr(place, name, called)

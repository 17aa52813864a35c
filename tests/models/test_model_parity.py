"""Each function that stands in for one of fla's kernels, against fla's own step-by-step function, which is
run document by document: outputs, last states and all gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from models.small_models import SMALL, initialized

from flame.models import cpu_attention as attention
from flame.models import cpu_delta as delta
from flame.models import cpu_linear as linear
from flame.models import cpu_modules as modules
from flame.models.families import mamba2
from flame.models.recurrence_delta import diagonal_plus_low_rank
from flame.models.zoo import fla_module

# float32, absolute and relative, where outputs and gradients are of order 1
TOLERANCE = {"atol": 3e-5, "rtol": 3e-4}
LENGTHS = [3, 40, 1, 64, 29, 2]
H, K, V, M = 2, 8, 12, 6


def _naive(module: str, name: str) -> Callable:
    return getattr(fla_module(f"ops.{module}"), name)


def _heads_first(function: Callable, *names: str) -> Callable:
    """Of a naive function on [B, H, T, D], the same on [B, T, H, D]."""

    def run(state, **inputs):
        turned = [inputs[n].transpose(1, 2) if inputs[n].ndim > 2 else inputs[n] for n in names]
        out, final = function(*turned, initial_state=state, output_final_state=True)
        return out.transpose(1, 2), final

    return run


def _plain(function: Callable, **options) -> Callable:
    def run(state, **inputs):
        return function(**inputs, initial_state=state, output_final_state=True, **options)

    return run


def _closed(x):
    """Log decays from nearly open to nearly closed."""
    return F.logsigmoid(x) * torch.linspace(0.02, 3, x.shape[1]).view(-1, *[1] * (x.ndim - 2))


def _unit(x):
    return F.normalize(x, dim=-1)


def _dplr(q, k, v, a, b, g, initial_state, output_final_state, cu_seqlens):
    flat = [x.flatten(0, 1) for x in (q, k, v, a, b, g)]
    out, final = diagonal_plus_low_rank(*flat, cu_seqlens, K**-0.5, initial_state)
    return out[None], final


@dataclass(frozen=True)
class Case:
    run: Callable
    naive: Callable
    shapes: dict[str, tuple[int, ...]]  # of one token
    state: tuple[int, ...] = (H, K, V)
    made: dict[str, Callable] | None = None  # from normal numbers to the inputs
    shared: dict[str, tuple[int, ...]] | None = None  # inputs that are no tokens


KEYS = {"q": (H, K), "k": (H, K), "v": (H, V)}
DELTA = {"k": _unit, "beta": torch.sigmoid, "g": _closed}
CASES = {
    "simple_gla": Case(
        linear.chunk_simple_gla,
        _plain(_naive("simple_gla.naive", "naive_recurrent_simple_gla")),
        {**KEYS, "g": (H,)},
        made={"g": _closed},
    ),
    "linear_attn": Case(
        lambda **inputs: linear.chunk_linear_attn(**inputs, normalize=False),
        _plain(_naive("linear_attn.naive", "naive_recurrent_linear_attn"), normalize=False),
        KEYS,
    ),
    "rwkv6": Case(
        lambda q, **inputs: linear.chunk_rwkv6(q, **inputs),
        _heads_first(_naive("rwkv6.recurrent_naive", "naive_recurrent_rwkv6"), "q", "k", "v", "w", "u"),
        {**KEYS, "w": (H, K)},
        made={"w": _closed},
        shared={"u": (H, K)},
    ),
    "hgrn": Case(
        linear.chunk_hgrn,
        _plain(_naive("hgrn.naive", "naive_recurrent_hgrn")),
        {"x": (V,), "g": (V,)},
        state=(V,),
        made={"g": _closed},
    ),
    "delta_rule": Case(
        delta.chunk_delta_rule,
        _heads_first(_naive("delta_rule.naive", "delta_rule_recurrence"), "q", "k", "v", "beta"),
        {**KEYS, "beta": (H,)},
        made=DELTA,
    ),
    "kda": Case(
        delta.chunk_kda,
        _plain(_naive("kda.naive", "naive_recurrent_kda")),
        {**KEYS, "g": (H, K), "beta": (H,)},
        made=DELTA,
    ),
    "comba": Case(
        delta.chunk_comba,
        # its naive recurrence decays before it reads; its kernels and this function read first
        _plain(_naive("comba.naive", "naive_chunk_comba")),
        {**KEYS, "p": (H, K), "g": (H,), "beta": (H,)},
        made={**DELTA, "p": _unit},
    ),
    "dplr": Case(
        _dplr,
        _heads_first(
            _naive("generalized_delta_rule.dplr.naive", "dplr_recurrence"), "q", "k", "v", "a", "b", "g"
        ),
        {**KEYS, "a": (H, K), "b": (H, K), "g": (H, K)},
        made={"g": _closed, "a": _unit, "b": lambda x: -_unit(x)},
    ),
}


def _made(case: Case) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    made = case.made or {}
    tokens = {name: torch.randn(1, sum(LENGTHS), *shape) for name, shape in case.shapes.items()}
    inputs = {name: made.get(name, lambda x: x)(x) for name, x in tokens.items()}
    inputs |= {name: torch.randn(shape) for name, shape in (case.shared or {}).items()}
    return {name: x.detach().requires_grad_() for name, x in inputs.items()}


def _assert_same(run, reference, inputs):
    weights = [torch.randn_like(x) for x in reference]
    for got, wanted in zip(run, reference, strict=True):
        torch.testing.assert_close(got, wanted, **TOLERANCE)
    sides = [sum((o * w).sum() for o, w in zip(side, weights, strict=True)) for side in (run, reference)]
    for got, wanted in zip(*(torch.autograd.grad(side, inputs) for side in sides), strict=True):
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(got / scale, wanted / scale, **TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_a_function_equals_flas_own_step_by_step_one(name):
    case = CASES[name]
    inputs = _made(case)
    states = torch.randn(len(LENGTHS), *case.state, requires_grad=True)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    run = case.run(**inputs, initial_state=states, output_final_state=True, cu_seqlens=bounds)
    outs, finals = [], []
    for i, (start, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        document = {n: x[:, start:end] if n in case.shapes else x for n, x in inputs.items()}
        out, final = case.naive(states[i : i + 1], **document)
        outs.append(out)
        finals.append(final)
    _assert_same(run, (torch.cat(outs, 1), torch.cat(finals)), [*inputs.values(), states])


def test_normalised_linear_attention_goes_on_from_both_of_its_states():
    naive = _naive("linear_attn.naive", "naive_recurrent_linear_attn")
    inputs = {name: x.detach().abs() for name, x in _made(CASES["linear_attn"]).items()}
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    states = (torch.rand(len(LENGTHS), H, K, V), torch.rand(len(LENGTHS), 1, H, K))
    options = {"output_final_state": True, "normalize": True}
    out, final = linear.chunk_linear_attn(**inputs, initial_state=states, cu_seqlens=bounds, **options)
    for i, (start, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        document = {n: x[:, start:end] for n, x in inputs.items()}
        begun = tuple(s[i : i + 1] for s in states)
        wanted, wanted_final = naive(**document, initial_state=begun, **options)
        torch.testing.assert_close(out[:, start:end], wanted, **TOLERANCE)
        for got, expected in zip(final, wanted_final, strict=True):
            torch.testing.assert_close(got[i : i + 1], expected, **TOLERANCE)


@pytest.mark.parametrize("closing", [1.0, 80.0])
def test_gated_slot_attention_equals_flas_own_step_by_step_one(closing):
    naive = _naive("gsa.naive", "naive_recurrent_gsa")
    shapes = {**KEYS, "s": (H, M), "g": (H, M)}
    inputs = _made(Case(linear.chunk_gsa, naive, shapes, made={"g": lambda x: closing * _closed(x)}))
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    states = tuple(torch.randn(len(LENGTHS), *s, requires_grad=True) for s in ((H, K, M), (H, M, V)))
    out, finals = linear.chunk_gsa(**inputs, initial_state=states, output_final_state=True, cu_seqlens=bounds)
    outs, last = [], []
    for i, (start, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        document = {n: x[:, start:end] for n, x in inputs.items()}
        begun = tuple(s[i : i + 1] for s in states)
        wanted, final = naive(**document, initial_state=begun, output_final_state=True)
        outs.append(wanted)
        last.append(final)
    wanted = (torch.cat(outs, 1), *(torch.cat(x) for x in zip(*last, strict=True)))
    _assert_same((out, *finals), wanted, [*inputs.values(), *states])


def test_retention_equals_flas_own_whole_matrix():
    naive = _naive("retention.naive", "naive_retention")
    inputs = _made(CASES["linear_attn"])
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    out, _ = linear.chunk_retention(**inputs, cu_seqlens=bounds)
    parts = zip(*(x.transpose(1, 2).split(LENGTHS, 2) for x in inputs.values()), strict=True)
    wanted = torch.cat([naive(*part) for part in parts], 2).transpose(1, 2)
    _assert_same((out,), (wanted,), list(inputs.values()))


@pytest.mark.parametrize("window", [None, 5])
def test_forgetting_attention_equals_flas_own_whole_matrix(window):
    naive = _naive("forgetting_attn.naive", "naive_forgetting_attn")
    shapes = {"q": (4, K), "k": (H, K), "v": (H, K), "g": (4,)}
    inputs = _made(Case(attention.parallel_forgetting_attn, naive, shapes, made={"g": _closed}))
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    out = attention.parallel_forgetting_attn(**inputs, window_size=window, cu_seqlens=bounds)
    parts = zip(*(x.split(LENGTHS, 1) for x in inputs.values()), strict=True)
    wanted = torch.cat([naive(*part, window_size=window) for part in parts], 1)
    _assert_same((out,), (wanted,), list(inputs.values()))
    if window is None:
        decode = _naive("attn.naive", "naive_attn_decoding")
        query = {**inputs, "q": inputs["q"][:, bounds[1:].long() - 1]}
        last = attention.attn_decoding_one_step(**query, cu_seqlens=bounds)
        torch.testing.assert_close(last, decode(**query, cu_seqlens=bounds), **TOLERANCE)


@pytest.mark.parametrize("gated", [True, False])
def test_the_delta_product_equals_flas_own_step_by_step_one(gated):
    naive = _naive("gated_delta_product.naive", "naive_recurrent_gated_delta_product")
    steps, total = 3, sum(LENGTHS)
    torch.manual_seed(4)
    q, k, v = (torch.randn(1, n, H, d) for n, d in ((total, K), (steps * total, K), (steps * total, V)))
    g, beta = _closed(torch.randn(1, total, H)), torch.rand(1, steps * total, H)
    inputs = [q, _unit(k), v, g if gated else None, beta]
    inputs = [None if x is None else x.detach().requires_grad_() for x in inputs]
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    states = torch.randn(len(LENGTHS), H, K, V, requires_grad=True)
    options = {"initial_state": states, "output_final_state": True, "cu_seqlens": bounds}
    run = delta.chunk_gated_delta_product(*inputs, num_householder=steps, **options)
    wanted = naive(*inputs, scale=K**-0.5, num_householder=steps, **options)
    _assert_same(run, wanted, [x for x in [*inputs, states] if x is not None])


def test_the_additive_gate_is_the_running_softmax_of_its_scores():
    torch.manual_seed(5)
    x = torch.randn(1, sum(LENGTHS), H, K) * 3
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    start = torch.randn(len(LENGTHS), 1, H, K)
    for initial in (None, start):
        k, g, last = linear.fused_additive_gate(x, initial, bounds)
        for i, (begin, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
            mass = torch.zeros(H, K) if initial is None else start[i, 0].exp()
            for at in range(begin, end):
                before, mass = mass, mass + x[0, at].exp()
                torch.testing.assert_close(k[0, at], x[0, at].exp() / mass, **TOLERANCE)
                if at > begin or initial is not None:
                    torch.testing.assert_close(g[0, at].exp(), before / mass, **TOLERANCE)
            torch.testing.assert_close(last[i, 0], mass.log(), **TOLERANCE)


def test_a_kda_gate_is_flas_own():
    gates = fla_module("ops.kda.gate")
    torch.manual_seed(6)
    g, a, bias = torch.randn(1, 9, H, K), torch.randn(H), torch.randn(H * K)
    ours = delta._kda_gate(g, a, bias, None)
    torch.testing.assert_close(ours, gates.naive_kda_gate(g, a, bias))
    ours = delta._kda_gate(g, a, bias, -5.0)
    torch.testing.assert_close(ours, gates.naive_kda_lowerbound_gate(g, a, bias, -5.0))


def test_the_token_shift_is_flas_own_and_goes_on_from_its_cache():
    reference = fla_module("modules.token_shift").token_shift_ref
    torch.manual_seed(7)
    x = torch.randn(1, sum(LENGTHS), 5)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    torch.testing.assert_close(modules.token_shift(x, bounds), reference(x, bounds))
    torch.testing.assert_close(modules.token_shift(x), reference(x))
    _, last = modules.token_shift(x[:, :17], output_cache=True)
    torch.testing.assert_close(modules.token_shift(x[:, 17:], cache=last), reference(x)[:, 17:])
    torch.testing.assert_close(modules.token_shift(x[:, 17:18], cache=last), reference(x)[:, 17:18])


def test_norms_are_flas_own_references():
    norms = fla_module("modules.norm.layernorm")
    torch.manual_seed(8)
    x, weight, bias = torch.randn(3, 7, 12), torch.randn(12), torch.randn(12)
    torch.testing.assert_close(
        modules.layer_norm(x, weight, bias), norms.layer_norm_ref(x, weight, bias, eps=1e-5)
    )
    for rms in (False, True):
        ours = modules.group_norm(x, weight, bias, is_rms_norm=rms, num_groups=3)
        wanted = norms.group_norm_ref(x, weight, bias, num_groups=3, is_rms_norm=rms, eps=1e-5)
        torch.testing.assert_close(ours, wanted)
    gated = fla_module("modules.norm.layernorm_gated").rms_norm_ref
    for before in (False, True):
        z = torch.randn_like(x)
        ours = modules.rmsnorm_fn(x, weight, None, z, group_size=4, norm_before_gate=before)
        wanted = gated(x, weight, None, z, group_size=4, norm_before_gate=before)
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("name", ["mamba2", "mamba2-groups"])
def test_mamba2_over_documents_is_flas_own_forward_of_each(name, spread, monkeypatch):
    monkeypatch.setattr(mamba2, "spread_decay", lambda device: spread)
    config = SMALL[name]
    layer = initialized(config).backbone.layers[0].mixer
    torch.manual_seed(9)
    x = torch.randn(1, sum(LENGTHS), config.hidden_size, requires_grad=True)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    out = layer(x, cu_seqlens=bounds)[0]
    wanted = torch.cat([layer.torch_forward(part)[0] for part in x.split(LENGTHS, 1)], 1)
    inputs = [x, *(p for p in layer.parameters())]
    _assert_same((out,), (wanted,), inputs)

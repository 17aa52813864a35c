import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from flame.models.cpu_delta import chunk_gated_delta_rule
from flame.models.cpu_linear import chunk_gla, fused_recurrent_gla
from flame.models.cpu_modules import causal_conv1d
from flame.models.recurrence import chunked, gated_linear_attention, scan
from flame.models.recurrence_delta import gated_delta_rule
from flame.models.zoo import fla_module

naive_recurrent_gla = fla_module("ops.gla.naive").naive_recurrent_gla
naive_recurrent_gated_delta_rule = fla_module("ops.gated_delta_rule.naive").naive_recurrent_gated_delta_rule

# float32, against fla's step-by-step functions: absolute, where outputs and gradients are of order 1
TOLERANCE = {"atol": 2e-5, "rtol": 2e-4}
LENGTHS = [[1], [70], [32, 32], [3, 40, 1, 64, 97, 2]]


def _bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _inputs(lengths, seed, *, heads=2, key=8, value=12):
    torch.manual_seed(seed)
    total = sum(lengths)
    shapes = [(total, heads, key), (total, heads, key), (total, heads, value)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def _per_document(naive, lengths, tensors, states):
    outs, finals = [], []
    for i, parts in enumerate(zip(*(t.split(lengths) for t in tensors), strict=True)):
        out, final = naive(
            *(p[None] for p in parts), initial_state=states[i : i + 1], output_final_state=True
        )
        outs.append(out[0])
        finals.append(final[0])
    return torch.cat(outs), torch.stack(finals)


def _assert_same(run, reference, inputs):
    weights = [torch.randn_like(x) for x in reference]
    for got, wanted in zip(run, reference, strict=True):
        torch.testing.assert_close(got, wanted, **TOLERANCE)
    sides = [sum((o * w).sum() for o, w in zip(side, weights, strict=True)) for side in (run, reference)]
    gradients = [torch.autograd.grad(side, inputs) for side in sides]
    for got, wanted in zip(*gradients, strict=True):
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(got / scale, wanted / scale, **TOLERANCE)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("closing", [0.05, 1.0, 40.0])
def test_gated_linear_attention_equals_the_step_by_step_one_in_outputs_states_and_gradients(lengths, closing):
    q, k, v = _inputs(lengths, 1)
    g = (closing * F.logsigmoid(torch.randn_like(q))).detach().requires_grad_()
    states = torch.randn(len(lengths), 2, 8, 12, requires_grad=True)
    run = gated_linear_attention(q, k, v, g, _bounds(lengths), 8**-0.5, states)
    reference = _per_document(naive_recurrent_gla, lengths, [q, k, v, g], states)
    _assert_same(run, reference, [q, k, v, g, states])


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("closing", [0.05, 40.0])
def test_gated_delta_rule_equals_the_step_by_step_one_in_outputs_states_and_gradients(lengths, closing):
    q, k, v = _inputs(lengths, 2)
    q, k = (F.normalize(x, dim=-1).detach().requires_grad_() for x in (q, k))
    g = (closing * F.logsigmoid(torch.randn(sum(lengths), 2))).detach().requires_grad_()
    beta = torch.rand(sum(lengths), 2, requires_grad=True)
    states = torch.randn(len(lengths), 2, 8, 12, requires_grad=True)
    run = gated_delta_rule(q, k, v, g, beta, _bounds(lengths), 8**-0.5, states)

    def naive(q, k, v, g, beta, **kwargs):
        return naive_recurrent_gated_delta_rule(q, k, v, beta, g, **kwargs)

    reference = _per_document(naive, lengths, [q, k, v, g, beta], states)
    _assert_same(run, reference, [q, k, v, g, beta, states])


def test_a_gate_that_closes_for_good_gives_finite_outputs_and_gradients():
    q, k, v = _inputs([200], 3)
    g = torch.full_like(q, -1e4).requires_grad_()
    out, _ = gated_linear_attention(q, k, v, g, _bounds([200]), 1.0)
    out.sum().backward()
    torch.testing.assert_close(out, (q * k).sum(-1, keepdim=True) * v, **TOLERANCE)
    assert all(bool(x.grad.isfinite().all()) for x in (q, k, v, g))


def test_the_chunked_and_the_recurrent_function_give_the_same_for_whole_rows_and_both_state_layouts():
    torch.manual_seed(4)
    q, k, v, g = (torch.randn(2, 45, 2, d) for d in (8, 8, 12, 8))
    g = F.logsigmoid(g)
    out, state = chunk_gla(q, k, v, g, output_final_state=True)
    reference, naive_state = naive_recurrent_gla(q, k, v, g, output_final_state=True)
    torch.testing.assert_close(out, reference, **TOLERANCE)
    torch.testing.assert_close(state, naive_state, **TOLERANCE)
    again, turned = fused_recurrent_gla(q, k, v, gk=g, output_final_state=True, state_v_first=True)
    torch.testing.assert_close(again, out)
    torch.testing.assert_close(turned, state.mT)


def test_the_delta_rule_computes_gates_and_norms_itself_and_shares_keys_among_value_heads():
    torch.manual_seed(5)
    q, k, v = torch.randn(1, 50, 2, 8), torch.randn(1, 50, 2, 8), torch.randn(1, 50, 4, 12)
    a, b, log, bias = torch.randn(1, 50, 4), torch.randn(1, 50, 4), torch.randn(4), torch.randn(4)
    out, _ = chunk_gated_delta_rule(
        q,
        k,
        v,
        a,
        b,
        use_qk_l2norm_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        allow_neg_eigval=True,
        use_gate_in_kernel=True,
        A_log=log,
        dt_bias=bias,
    )
    q, k = (F.normalize(x, dim=-1).repeat_interleave(2, 2) for x in (q, k))
    gate = -log.exp() * F.softplus(a + bias)
    reference, _ = naive_recurrent_gated_delta_rule(q, k, v, 2 * b.sigmoid(), gate)
    torch.testing.assert_close(out, reference, **TOLERANCE)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 16))
@settings(max_examples=60, deadline=None)
def test_chunks_hold_each_token_once_and_never_two_segments(lengths, size):
    chunks = chunked(_bounds(lengths), size)
    assert len(set(chunks.slots.tolist())) == sum(lengths)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    assert torch.equal(chunks.segment[chunks.slots // chunks.size], owner)
    assert chunks.first.sum() == len(lengths)
    x = torch.randn(sum(lengths), 2, 3)
    assert torch.equal(chunks.gather(chunks.spread(x)), x)


@given(st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_the_parallel_scan_equals_the_loop(steps):
    torch.manual_seed(steps)
    a, b = torch.rand(steps, 1, 3, 3, dtype=torch.float64), torch.randn(steps, 1, 3, 2, dtype=torch.float64)
    state, states = torch.zeros(1, 3, 2, dtype=torch.float64), []
    for i in range(steps):
        state = a[i] @ state + b[i]
        states.append(state)
    torch.testing.assert_close(scan(a, b, torch.matmul), torch.stack(states))


@pytest.mark.parametrize("lengths", [[1, 2, 9, 30], [42]])
def test_the_short_convolution_stays_within_segments_and_goes_on_from_a_state(lengths):
    torch.manual_seed(6)
    x, weight, bias = torch.randn(1, 42, 5), torch.randn(5, 4), torch.randn(5)
    options = {"weight": weight, "bias": bias, "activation": "silu", "output_final_state": True}
    out, state = causal_conv1d(x, cu_seqlens=_bounds(lengths), **options)
    parts = x.split(lengths, 1)
    padded = [F.pad(p.mT, (3, 0)) for p in parts]
    wanted = torch.cat([F.silu(F.conv1d(p, weight[:, None], bias, groups=5)).mT for p in padded], 1)
    torch.testing.assert_close(out, wanted, **TOLERANCE)
    for p, s in zip(parts, state, strict=True):
        torch.testing.assert_close(s, F.pad(p[0].mT, (4, 0))[:, -4:])
    more = torch.randn(1, 2 * len(lengths), 5)
    bounds = _bounds([2] * len(lengths))
    onward, end = causal_conv1d(more, initial_state=state, cu_seqlens=bounds, **options)
    whole = torch.cat([y for pair in zip(parts, more.split(2, 1), strict=True) for y in pair], 1)
    both, both_end = causal_conv1d(whole, cu_seqlens=_bounds([n + 2 for n in lengths]), **options)
    tails = torch.cat([y[:, -2:] for y in both.split([n + 2 for n in lengths], 1)], 1)
    torch.testing.assert_close(onward, tails, **TOLERANCE)
    torch.testing.assert_close(end, both_end)

"""The families on a GPU, with fla's own kernels and torch's attention for packed rows, in bfloat16."""

import copy

import pytest
import torch
from models.small_models import SMALL, VOCABULARY, larger, packed
from transformers import AutoModelForCausalLM

from flame.models.build import build_on_meta, initialize
from flame.models.registry import family_of

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),  # triton, tilelang and dynamo warn as they compile
]

ROWS = [[5, 163, 1, 71], [240], [80, 160]]
# outputs are normed states of order 1; bfloat16 keeps eight bits, and two layers of kernels add up
CLOSE = {"atol": 0.05, "rtol": 0.05}


@pytest.fixture(params=SMALL)
def model(request):
    config = larger(request.param)
    model = build_on_meta(config)
    initialize(model, config, 1, "cuda")
    return model.bfloat16(), family_of(config)


def _on_gpu(rows):
    return [x.cuda() if isinstance(x, torch.Tensor) else x for x in packed(rows)]


def test_a_packed_document_gets_what_it_gets_alone_and_no_gradient_leaks(model):
    model, family = model
    tokens, positions, cu_seqlens, longest = _on_gpu(ROWS)
    embedded = []
    hook = family.embedding(model).register_forward_hook(lambda _m, _i, out: embedded.append(out))
    hidden = family.hidden(model, tokens, positions, cu_seqlens, longest).flatten(0, 1)
    hook.remove()
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        document = tokens.view(1, -1)[:, start:end]
        alone = family.hidden(model, document, *_on_gpu([[end - start]])[1:])[0]
        torch.testing.assert_close(hidden[start:end], alone, **CLOSE)
    (gradient,) = torch.autograd.grad(hidden[5:168].float().square().sum(), embedded)
    gradient = gradient.view(tokens.numel(), -1)
    assert bool(gradient[5:168].any())
    assert not bool(gradient[:5].any())
    assert not bool(gradient[168:].any())


def test_the_kernels_give_what_the_plain_functions_give_on_a_cpu(model):
    model, family = model
    arguments = packed(ROWS)
    hidden = family.hidden(model, *_on_gpu(ROWS)).float().cpu()
    plain = family.hidden(copy.deepcopy(model).to("cpu", torch.float32), *arguments)
    error = (hidden - plain).square().mean().sqrt() / plain.square().mean().sqrt()
    assert error < 0.015  # single elements stray more: states of many products, each rounded to eight bits


def test_five_steps_on_a_gpu_lower_the_loss(model):
    model, family = model
    model.float()
    tokens, positions, cu_seqlens, longest = _on_gpu(ROWS)
    tokens = (torch.arange(7, device="cuda") * 11 % VOCABULARY).repeat(103)[:720].view_as(tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        with torch.autocast("cuda", torch.bfloat16):
            hidden = family.hidden(model, tokens, positions, cu_seqlens, longest)
            logits = family.head(model)(hidden).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits[:-1].float(), tokens.flatten()[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_compiled_blocks_give_what_plain_ones_give(model):
    model, family = model
    if not family.compiles:
        pytest.skip("compiling its blocks has not been tried")
    wanted = family.hidden(model, *_on_gpu(ROWS))
    for _, block in family.blocks(model):
        block.compile()
    torch.testing.assert_close(family.hidden(model, *_on_gpu(ROWS)), wanted, **CLOSE)


def test_llama_gets_what_transformers_own_attention_gives_it():
    config = larger("llama")
    model = build_on_meta(config)
    initialize(model, config, 1, "cuda")
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").cuda().bfloat16()
    plain.load_state_dict(model.state_dict())
    hidden = family_of(config).hidden(model.bfloat16(), *_on_gpu([[240]]))
    wanted = plain.model(input_ids=_on_gpu([[240]])[0], use_cache=False).last_hidden_state
    torch.testing.assert_close(hidden, wanted, **CLOSE)

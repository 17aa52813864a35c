"""The families on a GPU, with fla's own kernels and torch's attention for packed rows, in bfloat16."""

import pytest
import torch
from models.small_models import packed
from transformers import AutoModelForCausalLM, LlamaConfig

from flame.models.build import build_on_meta, initialize
from flame.models.registry import family_of
from flame.models.zoo import fla_models

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
]

_SHARED = {"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 97, "intermediate_size": 256}
CONFIGS = {
    "transformer": fla_models.TransformerConfig(num_heads=2, **_SHARED),
    "transformer-gqa": fla_models.TransformerConfig(num_heads=4, num_kv_heads=2, window_size=9, **_SHARED),
    "llama": LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **_SHARED),
    "gla": fla_models.GLAConfig(num_heads=2, **_SHARED),
}
ROWS = [[5, 163, 1, 71], [240], [80, 160]]


@pytest.fixture(params=CONFIGS)
def model(request):
    config = CONFIGS[request.param]
    model = build_on_meta(config)
    initialize(model, config, 1, "cuda")
    return model.bfloat16(), family_of(config)


def test_a_packed_document_gets_what_it_gets_alone_and_no_gradient_leaks(model):
    model, family = model
    tokens, positions, cu_seqlens, longest = (x.cuda() if hasattr(x, "cuda") else x for x in packed(ROWS))
    embedded = []
    hook = family.embedding(model).register_forward_hook(lambda _m, _i, out: embedded.append(out))
    hidden = family.hidden(model, tokens, positions, cu_seqlens, longest).flatten(0, 1)
    hook.remove()
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        document = tokens.view(1, -1)[:, start:end]
        _, at, bounds, length = packed([[end - start]])
        alone = family.hidden(model, document, at.cuda(), bounds.cuda(), length)[0]
        torch.testing.assert_close(hidden[start:end], alone, atol=0.05, rtol=0.05)
    (gradient,) = torch.autograd.grad(hidden[5:168].float().square().sum(), embedded)
    gradient = gradient.view(tokens.numel(), -1)
    assert bool(gradient[5:168].any())
    assert not bool(gradient[:5].any())
    assert not bool(gradient[168:].any())


def test_llama_gets_what_transformers_own_attention_gives_it():
    config = CONFIGS["llama"]
    model = build_on_meta(config)
    initialize(model, config, 1, "cuda")
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").cuda().bfloat16()
    plain.load_state_dict(model.state_dict())
    tokens, positions, cu_seqlens, longest = packed([[240]])
    arguments = (tokens.cuda(), positions.cuda(), cu_seqlens.cuda(), longest)
    hidden = family_of(config).hidden(model.bfloat16(), *arguments)
    wanted = plain.model(input_ids=tokens.cuda(), use_cache=False).last_hidden_state
    torch.testing.assert_close(hidden, wanted, atol=0.05, rtol=0.05)

import inspect

import pytest
import torch
from models.small_models import SMALL, VOCABULARY, initialized
from transformers import AutoModelForCausalLM

from flame.models.zoo import quiet

LOGITS = {"atol": 2e-5, "rtol": 1e-4}  # float32


@pytest.fixture(params=SMALL)
def model(request):
    config = SMALL[request.param]
    with quiet():
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(initialized(config).state_dict())
    return model.eval()


def _cache(model, output):
    """The keyword argument with the state so far: transformers renamed it in 5.24, fla did not follow."""
    base = next(child for name, child in model.named_children() if name != "lm_head")
    name = "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"
    return {name: getattr(output, name)}


@torch.no_grad()
def test_decoding_token_by_token_equals_the_parallel_forward(model):
    torch.manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (2, 90))
    whole = model(input_ids=tokens, use_cache=False).logits
    output = model(input_ids=tokens[:, :70], use_cache=True)
    torch.testing.assert_close(output.logits, whole[:, :70], **LOGITS)
    for at in range(70, 90):
        output = model(input_ids=tokens[:, at : at + 1], use_cache=True, **_cache(model, output))
        torch.testing.assert_close(output.logits[:, 0], whole[:, at], **LOGITS)


@torch.no_grad()
def test_generation_with_the_cache_equals_greedy_choices_of_whole_forwards(model):
    torch.manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (1, 9))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    generated = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    for _ in range(12):
        choice = model(input_ids=tokens, use_cache=False).logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, choice], 1)
    assert torch.equal(generated, tokens)


@torch.no_grad()
def test_generation_of_a_left_padded_batch_equals_generation_alone(model):
    torch.manual_seed(0)
    prompts = [torch.randint(0, VOCABULARY, (1, n)) for n in (9, 4)]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    alone = [model.generate(p, attention_mask=torch.ones_like(p), **options)[:, -6:] for p in prompts]
    batch = torch.cat([torch.nn.functional.pad(p, (9 - p.shape[1], 0)) for p in prompts])
    mask = torch.ones_like(batch)
    mask[1, :5] = 0
    together = model.generate(batch, attention_mask=mask, **options)[:, -6:]
    assert torch.equal(together, torch.cat(alone))

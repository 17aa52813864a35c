import pytest
import torch
from models.small_models import SMALL, initialized, packed

from flame.models.registry import family_of

ROWS = [[5, 43, 1, 71], [120], [80, 40]]
LOGITS = {"atol": 2e-5, "rtol": 1e-4}  # float32


@pytest.fixture(params=SMALL)
def model(request):
    config = SMALL[request.param]
    model = initialized(config)
    with torch.no_grad():  # weights that make every path count
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim > 1 else None
    return model, family_of(config)


def test_a_packed_document_gets_the_logits_it_gets_alone(model):
    model, family = model
    tokens, positions, cu_seqlens, longest = packed(ROWS)
    head = family.head(model)
    logits = head(family.hidden(model, tokens, positions, cu_seqlens, longest)).flatten(0, 1)
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        alone = packed([[end - start]])
        document = tokens.view(1, -1)[:, start:end]
        wanted = head(family.hidden(model, document, *alone[1:]))[0]
        torch.testing.assert_close(logits[start:end], wanted, **LOGITS)
        plain = model(input_ids=document, use_cache=False).logits[0]  # as a user of transformers runs it
        torch.testing.assert_close(logits[start:end], plain, **LOGITS)


def test_a_documents_loss_has_exactly_no_gradient_in_its_neighbours(model):
    model, family = model
    tokens, positions, cu_seqlens, longest = packed(ROWS)
    embedded = []

    def keep(_module, _inputs, output):
        output.retain_grad()
        embedded.append(output)

    with_hook = family.embedding(model).register_forward_hook(keep)
    hidden = family.hidden(model, tokens, positions, cu_seqlens, longest)
    with_hook.remove()
    start, end = 5, 48
    hidden.flatten(0, 1)[start:end].square().sum().backward()
    gradient = embedded[0].grad.view(tokens.numel(), -1)
    assert bool(gradient[start:end].abs().sum(-1).gt(0).all())
    assert not bool(gradient[:start].any())
    assert not bool(gradient[end:].any())


def test_a_token_has_exactly_no_gradient_from_the_tokens_before_it(model):
    model, family = model
    tokens, positions, cu_seqlens, longest = packed([[90, 30]])
    embedded = []
    hook = family.embedding(model).register_forward_hook(lambda _m, _i, out: embedded.append(out))
    hidden = family.hidden(model, tokens, positions, cu_seqlens, longest)
    hook.remove()
    (gradient,) = torch.autograd.grad(hidden.flatten(0, 1)[:50].square().sum(), embedded)
    assert not bool(gradient.view(120, -1)[50:].any())

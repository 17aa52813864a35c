"""The test suite's checks at run time, on a shallow and narrow copy of a model that nobody has checked."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from flame.models.family import Family

VOCABULARY = 61
LENGTHS = (5, 19, 1, 11)
TOLERANCE = 1e-4  # float32, of states that are scaled to order 1


def problem(family: Family, config: PretrainedConfig) -> str | None:
    """Why `family` would not train the model of `config` truly, or None.

    Builds two layers of it on the CPU in float32 and compares a packed row with its documents alone, the
    logits with those of the model's own `forward`, and looks for a gradient that crosses documents. The
    global generator is left as it was.
    """
    config = shallow(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make: Any = AutoModelForCausalLM.from_config
        plain: nn.Module = make(config, dtype=torch.float32, attn_implementation="eager").eval()
        for parameter in plain.parameters():  # weights that make every path count
            parameter.data += 0.05 * torch.randn_like(parameter)
        options = {"attn_implementation": family.attention} if family.attention else {}
        model: nn.Module = make(config, dtype=torch.float32, **options).eval()
        tokens = torch.randint(1, VOCABULARY, (1, sum(LENGTHS)))
    model.load_state_dict(plain.state_dict())
    return _apart(family, model, tokens) or _same_logits(family, model, plain, tokens)


def packed_problem(family: Family, model: nn.Module) -> str | None:
    """Why `model`, a small one of `family` on the CPU, does not keep packed documents apart, or None."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokens = torch.randint(0, family.head(model).out_features, (1, sum(LENGTHS)))
    return _apart(family, model.float().eval(), tokens)


def shallow(config: PretrainedConfig) -> PretrainedConfig:
    """The config with few layers (one of each kind), a small vocabulary and narrow feed-forwards."""
    config = copy.deepcopy(config)
    values: Any = config
    kinds: list[str] = list(getattr(config, "layer_types", None) or [])
    first = sorted({kinds.index(kind) for kind in kinds})
    depth = max(2, len(first))
    if kinds:
        values.layer_types = ([kinds[i] for i in first] * 2)[:depth]
    values.num_hidden_layers = depth
    values.vocab_size = VOCABULARY
    if isinstance(getattr(config, "intermediate_size", None), int):
        values.intermediate_size = 64
    if getattr(config, "sliding_window", None):
        values.sliding_window = 7
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(values, name, None if name == "pad_token_id" else 0)
    return config


def _bounds(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor, int]:
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return positions, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), max(lengths)


def _apart(family: Family, model: nn.Module, tokens: Tensor) -> str | None:
    """Packed against alone, and the gradients between documents and from later tokens."""
    embedded: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        embedded.append(output)

    hooks = [
        module.register_forward_hook(keep)
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings == family.head(model).out_features
    ]
    packed = family.hidden(model, tokens, *_bounds(LENGTHS))
    for hook in hooks:
        hook.remove()
    if packed.shape[:2] != tokens.shape:
        return f"states of shape {tuple(packed.shape)} for tokens of shape {tuple(tokens.shape)}"
    packed = packed[0]
    with torch.no_grad():
        for start, end in _documents():
            alone = family.hidden(model, tokens[:, start:end], *_bounds((end - start,)))[0]
            if _far(packed[start:end], alone):
                return "a packed document gets other states than alone"
    if not embedded:
        return "no embedding of its vocabulary's size takes part"
    return _crossing(packed, embedded)


def _documents() -> list[tuple[int, int]]:
    ends = [sum(LENGTHS[: i + 1]) for i in range(len(LENGTHS))]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _same_logits(family: Family, model: nn.Module, plain: nn.Module, tokens: Tensor) -> str | None:
    """The head's output on the states against the model's own logits."""
    head = family.head(model)
    with torch.no_grad():
        for start, end in _documents():
            states = family.hidden(model, tokens[:, start:end], *_bounds((end - start,)))[0]
            logits: Tensor = cast("Any", plain)(input_ids=tokens[:, start:end], use_cache=False).logits[0]
            if _far(head(states), logits):
                return "its logits are not its head's output on its last states"
    return None


def _far(got: Tensor, wanted: Tensor) -> bool:
    scale = max(1.0, float(wanted.abs().max()))
    return got.shape != wanted.shape or not bool(((got - wanted).abs() < TOLERANCE * scale).all())


def _crossing(packed: Tensor, embedded: list[Tensor]) -> str | None:
    """The gradient of a part of the second document in all embeddings."""
    start, end = LENGTHS[0], LENGTHS[0] + LENGTHS[1]
    middle = start + LENGTHS[1] // 2
    loss = packed[start:middle].square().sum()
    gradients = torch.autograd.grad(loss, embedded, allow_unused=True, materialize_grads=True)
    gradient = torch.stack([g.reshape(sum(LENGTHS), -1).abs().sum(-1) for g in gradients]).sum(0)
    if bool(gradient[:start].any()) or bool(gradient[end:].any()):
        return "a document's loss has a gradient in its neighbours"
    if bool(gradient[middle:end].any()):
        return "a token's loss has a gradient in the tokens after it"
    if not bool(gradient[start:middle].any()):
        return "a document's loss has no gradient in its own embeddings"
    return None

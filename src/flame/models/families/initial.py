"""Initial weights that fla's models give in their constructors, where the general rule leaves them.

flame builds on the meta device, where a constructor's values are lost; each function here sets them again
and leaves the rest to the model's own rule. Each is compared with a model that was built the plain way.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from flame.models.family import own_rule
from flame.models.zoo import fla_module

ZEROS = {"lower_bounds", "x_bias", "bonus", "mu"}


def constructed(model: Any, name: str, module: nn.Module) -> None:
    """The own rule, and zeros for what constructors make as zeros: HGRN's lower bounds, RWKV's mixes."""
    _zeros(module)
    own_rule(model, name, module)


def _zeros(module: nn.Module) -> None:
    for parameter_name, parameter in module.named_parameters(recurse=False):
        if parameter_name in ZEROS:
            nn.init.zeros_(parameter)


def gates(model: Any, name: str, module: nn.Module) -> None:
    """The own rule, and A_log and dt_bias as in Mamba2 where a layer has them: A uniform in (0, 16), the
    step between 0.001 and 0.1, uniform in its logarithm (arXiv 2405.21060, appendix)."""
    own_rule(model, name, module)
    own = dict(module.named_parameters(recurse=False))
    rate, bias = own.get("A_log"), own.get("dt_bias")
    if rate is not None and bool(rate.isnan().any()):
        rate.copy_(torch.empty_like(rate).uniform_(0, 16).log())
        rate._no_weight_decay = True  # type: ignore[attr-defined]
    if bias is not None and bool(bias.isnan().any()):
        step = torch.exp(torch.rand_like(bias) * math.log(100) + math.log(0.001)).clamp(min=1e-4)
        bias.copy_(step + torch.log(-torch.expm1(-step)))
        bias._no_weight_decay = True  # type: ignore[attr-defined]


def comba(model: Any, name: str, module: nn.Module) -> None:
    """The gates, and Comba's inner decay (one) and output correction (its factor)."""
    layer: Any = fla_module("layers.comba").Comba
    if isinstance(module, layer):
        values = {"decay": 1.0, "D": model.config.correction_factor}
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter_name in values:
                nn.init.constant_(parameter, values[parameter_name])
    gates(model, name, module)


def rwkv6(model: Any, name: str, module: nn.Module) -> None:
    """RWKV6's attention marks itself and all in it as initialised by its constructor: Xavier matrices, and
    LoRAs that begin at zero. The rest follows the general rule, which transformers runs only on modules
    with tensors of their own: an attention layer's output matrix is not scaled down."""
    lora: Any = fla_module("layers.rwkv6").LoRA
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if not tensors and not isinstance(module, lora):
        return
    if not _made_by_constructor(module):
        constructed(model, name, module)
    elif isinstance(module, lora):
        _again(module)
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight, gain=2**-2.5)
        if module.bias is not None:  # type: ignore[redundant-expr]
            nn.init.zeros_(module.bias)
    else:
        _plain(module)


def rwkv7(model: Any, name: str, module: nn.Module) -> None:
    """RWKV7's attention, which marks itself too, and its feed-forward: by the layer's place in the model."""
    layers: Any = fla_module("layers.rwkv7")
    lora: Any = fla_module("layers.rwkv6").LoRA
    feed_forward: Any = fla_module("models.rwkv7.modeling_rwkv7").RWKV7FeedForward
    if isinstance(module, (layers.RWKV7Attention, lora)):
        _again(module)  # children came first: what it sets in them stays
    elif isinstance(module, feed_forward):
        _feed_forward(module)
    elif _made_by_constructor(module):
        _plain(module)
    else:
        own_rule(model, name, module)


def _made_by_constructor(module: nn.Module) -> bool:
    return bool(getattr(module, "_is_hf_initialized", False))


def _again(module: Any) -> None:
    """The layer's own function, which does nothing where the constructor's run (on meta) left its mark."""
    module._is_hf_initialized = False
    module._initialize_weights(module)


def _plain(module: Any) -> None:
    """Zeros for parameters made as zeros, and what a norm's own `reset_parameters` gives."""
    _zeros(module)
    if not isinstance(module, nn.Linear) and hasattr(module, "reset_parameters"):
        module.reset_parameters()


def _feed_forward(module: Any) -> None:
    """fla's own makes a tensor on the CPU and puts it in the parameter's place."""
    remaining = 1.0 - module.layer_idx / module.num_hidden_layers
    place = torch.arange(module.hidden_size, device=module.x_k.device) / module.hidden_size
    module.x_k.copy_(1.0 - place ** (remaining**4))
    nn.init.orthogonal_(module.key.weight)
    nn.init.zeros_(module.value.weight)

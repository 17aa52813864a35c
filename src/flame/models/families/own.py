"""A user's own model from a Python file: `[model] module = "my_model.py"`.

The file defines `class Model(nn.Module)` with

- `forward(input_ids, position_ids, cu_seqlens)`: int64 [b, L], int64 [b, L] restarting in each document,
  int32 [documents + 1] over the flattened b * L, to the final states before the head, [b, L, d];
- `head`: the `nn.Linear` from those states to logits; flame computes the loss with it.

And, where it likes, `layers` (an `nn.ModuleList` whose items are sharded and compiled one by one),
`init_weights(module)` (called for every module, children first; left out, `reset_parameters()`),
`flops()` (FLOPs forward and backward, per token and per attended pair; left out, 6 a weight of its linear
layers and convolutions) and the class method `small()` (a small instance for the check below). Its arguments
come from the JSON object in `[model] config`.

Or `Model` is a `PreTrainedModel` of transformers, whose `config_class` takes the arguments. Its `forward` is
what transformers expects; flame calls its method `hidden_states` in place of the `forward` above, and its
`_init_weights` in place of `init_weights`.

Before it trains, an instance on the CPU shows that it keeps packed documents apart.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from flame.errors import ModelError
from flame.models.families.leak import packed_problem
from flame.models.family import Family, own_rule
from flame.models.flops import FlopCount, matrix_flops

MODEL_TYPE = "flame_own"
OWN_FILE = "model.py"  # the code of an own model, beside its exported weights
CHECKED_PARAMETERS = 300_000_000  # of a model that is built on the CPU to be checked


class OwnConfig(PretrainedConfig):
    """What stands for an own model where transformers' models have their config. `digest` is of the file:
    a run goes on with the code it began with, wherever that lies."""

    model_type = MODEL_TYPE

    def __init__(self, digest: str = "", vocab_size: int = 0, arguments: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.digest = digest
        self.vocab_size = vocab_size
        self.arguments: dict[str, Any] = arguments or {}


# where the file of a digest was read; not in the config, so that a moved file is the same model
_FILES: dict[str, Path] = {}


def own_config(module: Path, arguments: Path | dict[str, Any] | None = None) -> OwnConfig:
    """The config of the model in the file `module`, with arguments as they are or from a JSON file.

    Raises ModelError where there is no such file, or where it holds no model as described above.
    """
    values: Any = {}
    try:
        digest = hashlib.blake2b(module.read_bytes(), digest_size=16).hexdigest()
        values = arguments or {}
        if isinstance(arguments, Path):
            values = json.loads(arguments.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{module}: cannot be read as a model's module and its arguments: {error}") from None
    if not isinstance(values, dict):
        raise ModelError(f"{arguments}: expected a JSON object with the arguments of {module}'s Model")
    _FILES[digest] = module.absolute()
    config = OwnConfig(digest, arguments=values)
    head = getattr(_build(config), "head", None)
    if not isinstance(head, nn.Linear):
        raise ModelError(
            f"{module}: Model.head: found {type(head).__name__}, expected the nn.Linear to logits"
        )
    config.vocab_size = head.out_features
    return config


def module_file(config: PretrainedConfig) -> Path:
    """The file of an own model."""
    return _FILES[cast("OwnConfig", config).digest]


def own_family(config: PretrainedConfig) -> Family:
    """The family of one own model. Raises ModelError where packed documents are not apart in it."""
    own = cast("OwnConfig", config)
    return _checked(own.digest, json.dumps(own.arguments, sort_keys=True))


@functools.lru_cache(maxsize=8)
def _checked(digest: str, arguments: str) -> Family:
    config = OwnConfig(digest, arguments=json.loads(arguments))
    family = Family(
        name="own",
        model_types=(MODEL_TYPE,),
        packing="rows",
        hidden=_hidden,
        count=_flops,
        compiles=False,
        refuses=lambda config: None,
        initialize=_initialize,
        layers="layers",
        head_name="head",
        source="a file",
        cached=False,
        make=_build,
    )
    file = _FILES[digest]
    try:
        reason = packed_problem(family, _instance(config, file))
    except ModelError:
        raise
    except Exception as error:  # a user's code raises whatever it likes
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        raise ModelError(f"{file}: cannot be trained truly: {reason}; mend Model.forward")
    return family


@functools.lru_cache(maxsize=8)
def _class(digest: str) -> Any:
    file = _FILES[digest]
    spec = importlib.util.spec_from_file_location(f"flame_own_{digest}", file)
    if spec is None or spec.loader is None:
        raise ModelError(f"{file}: not a Python file; give one that defines class Model")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's code raises whatever it likes
        raise ModelError(f"{file}: cannot be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, "Model", None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ModelError(f"{file}: defines no class Model that is an nn.Module")
    return found


def _build(config: Any) -> nn.Module:
    """The model on the meta device."""
    try:
        with torch.device("meta"):
            return _made(_class(config.digest), config.arguments).float()
    except ModelError:
        raise
    except Exception as error:  # a user's code raises whatever it likes
        file = _FILES[config.digest]
        raise ModelError(f"{file}: Model cannot be made: {type(error).__name__}: {error}") from error


def _instance(config: OwnConfig, file: Path) -> nn.Module:
    """A real model on the CPU, to be checked."""
    kind = _class(config.digest)
    if hasattr(kind, "small"):
        return kind.small()
    size = sum(p.numel() for p in _build(config).parameters())
    if size > CHECKED_PARAMETERS:
        raise ModelError(
            f"{file}: Model has {size:,} parameters, too many to check it on the CPU; give it a class method "
            "small() that returns a small instance of it"
        )
    return _made(kind, config.arguments)


def _made(kind: Any, arguments: dict[str, Any]) -> nn.Module:
    if issubclass(kind, PreTrainedModel):
        return kind(cast("Any", kind).config_class(**arguments))
    return kind(**arguments)


def _hidden(
    model: nn.Module, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, longest_segment: int
) -> Tensor:
    call: Any = model if not isinstance(model, PreTrainedModel) else cast("Any", model).hidden_states
    return call(tokens, positions, cu_seqlens)


@torch.no_grad()
def continued(model: nn.Module, ids: Tensor, tokens: int, temperature: float, seed: int, eos: int) -> Tensor:
    """The ids, int64 [n], and up to `tokens` more, ending with `eos`; each by a pass over all before it.
    Of a temperature of 0 the likeliest is taken."""
    numbers = torch.Generator(ids.device).manual_seed(seed)
    for _ in range(tokens):
        length = len(ids)
        positions = torch.arange(length, device=ids.device)[None]
        bounds = torch.tensor([0, length], dtype=torch.int32, device=ids.device)
        states = _hidden(model, ids[None], positions, bounds, length)
        logits = cast("Any", model).head(states[0, -1]).float()
        if temperature > 0:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=numbers)
        else:
            chosen = logits.argmax(keepdim=True)
        ids = torch.cat([ids, chosen])
        if int(chosen) == eos:
            break
    return ids


def transformers_config(config: OwnConfig) -> PretrainedConfig | None:
    """What config.json has to say for transformers' Auto classes to load the model from its file; None where
    it is no `PreTrainedModel`."""
    kind = _class(config.digest)
    if not issubclass(kind, PreTrainedModel):
        return None
    written: Any = cast("Any", kind).config_class(**config.arguments)
    module = Path(OWN_FILE).stem
    written.auto_map = {
        "AutoConfig": f"{module}.{type(written).__name__}",
        "AutoModelForCausalLM": f"{module}.{kind.__name__}",
    }
    written.architectures = [kind.__name__]
    written.arguments = config.arguments
    return written


def _initialize(model: Any, name: str, module: Any) -> None:
    if isinstance(model, PreTrainedModel):
        own_rule(model, name, module)
    elif hasattr(model, "init_weights"):
        model.init_weights(module)
    elif hasattr(module, "reset_parameters"):
        module.reset_parameters()


def _flops(model: Any) -> FlopCount:
    if hasattr(model, "flops"):
        return FlopCount(*model.flops())
    return FlopCount(matrix_flops(model), 0.0)

"""The one door to fla: imports its model types, which registers them with transformers' Auto classes."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import warnings
from collections.abc import Callable, Generator
from types import ModuleType
from typing import Any


def _about_fla(record: logging.LogRecord) -> bool:
    """False for transformers' note that `past_key_values` is now `cache`: fla's code says the old name,
    and a reader of a training log can do nothing about it."""
    return "`past_key_values`/`cache_params` are deprecated" not in record.getMessage()


logging.getLogger("transformers.utils.generic").addFilter(_about_fla)
# which of mamba_ssm's kernels are absent: families/mamba2.py takes others
logging.getLogger("fla.layers.mamba2").addFilter(lambda record: False)

with warnings.catch_warnings():
    # On import fla says that flash-attn is absent (attention.py stands in for it) and, without a GPU,
    # that Triton does not run (cpu.py stands in for its kernels): neither is news to anyone here.
    warnings.filterwarnings("ignore", message="Flash Attention is not installed", category=ImportWarning)
    warnings.filterwarnings("ignore", message="Triton is not supported", category=UserWarning)
    # fla decorates functions with torch.compile, whose own import uses what torch has deprecated
    warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)
    fla_models: ModuleType = importlib.import_module("fla.models")


# RWKV7's blocks hand their first values on as a view; nothing here writes into it
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)


def fla_module(name: str) -> ModuleType:
    """fla's module `name` ("layers.gla"), already imported with fla's models."""
    return importlib.import_module(f"fla.{name}")


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Without what fla's layers say when they are made: of defaults that a config may change, and of
    RWKV's authors, who have not checked fla's RWKV (docs/models.md says so once)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"fla\.(layers|models)\.")
        yield


def _with_old_cache_name(prepare: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """transformers 5.24 calls the state of generation `cache`; fla 0.6's models still take it as
    `past_key_values`, and would start each token from nothing."""

    @functools.wraps(prepare)
    def prepared(*args: Any, **kwargs: Any) -> dict[str, Any]:
        if "cache" in kwargs:
            kwargs["past_key_values"] = kwargs.pop("cache")
        with warnings.catch_warnings():
            # fla hands the old name on to transformers
            message = "`past_key_values` is deprecated"
            warnings.filterwarnings("ignore", message=message, category=FutureWarning)
            inputs = prepare(*args, **kwargs)
        if "cache" in inputs:
            inputs["past_key_values"] = inputs.pop("cache")
        return inputs

    return prepared


_mixin: Any = fla_module("models.generation_utils").FLAGenerationMixin
_mixin.prepare_inputs_for_generation = _with_old_cache_name(_mixin.prepare_inputs_for_generation)

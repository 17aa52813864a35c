"""A user's own function, called at each validation."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from flame.errors import RecipeError
from flame.parallel.fsdp import gather_root


@dataclass(frozen=True, slots=True)
class Validated:
    """What a hook is given: `def evaluate(at): return {"name": number}`.

    It is called on every rank. Where the model is sharded (`ranks` above 1) all ranks must make the same
    number of forward passes; the numbers that rank 0 returns are kept.
    """

    step: int
    tokens: int  # trained until here
    model: nn.Module  # the guest, in evaluation mode and without gradients
    tokenizer: Any  # flame.data.tokens.Tokenizer: encode(texts), decode(ids)
    recipe: Any  # flame.recipe.Recipe
    device: torch.device
    rank: int
    ranks: int


class Hook:
    """Calls the function. A `flame.train.validation.Follower`."""

    def __init__(
        self,
        function: Callable[[Validated], Mapping[str, float]],
        *,
        model: nn.Module,
        guest: nn.Module,
        tokenizer: Any,
        recipe: Any,
        device: torch.device,
        group: dist.ProcessGroup,
    ) -> None:
        """`model`: the guest with its loss, the root of what is sharded. `group`: of all ranks."""
        self._function, self._model, self._guest = function, model, guest
        self._tokenizer, self._recipe, self._device, self._group = tokenizer, recipe, device, group

    def __call__(self, step: int, tokens: int) -> dict[str, Any]:
        """{"hook": its numbers}, or {"hook_error": why there are none}: a mistake in it ends no run."""
        rank, ranks = dist.get_rank(self._group), dist.get_world_size(self._group)
        gather_root(self._model)
        at = Validated(step, tokens, self._guest, self._tokenizer, self._recipe, self._device, rank, ranks)
        numbers: dict[str, float] = {}
        error: str | None = None
        try:
            numbers = numbers_of(self._function(at))
        except Exception as raised:  # a user's function raises whatever it likes
            error = f"{type(raised).__name__}: {raised}"
        errors: list[str | None] = [None] * ranks
        dist.all_gather_object(errors, error, group=self._group)
        found = next((f"rank {i}: {e}" for i, e in enumerate(errors) if e is not None), None)
        if found is None:
            return {"hook": numbers}
        if rank == 0:
            print(f"validation.hook failed after step {step}: {found}", flush=True)
        return {"hook_error": found}


def numbers_of(returned: Any) -> dict[str, float]:
    """What a hook returned, checked. Raises TypeError."""
    if returned is None:
        return {}
    if not isinstance(returned, Mapping):
        raise TypeError(f"it returned {returned!r}, expected a dictionary of named numbers")
    numbers: dict[str, float] = {}
    for name, value in cast("Mapping[Any, Any]", returned).items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"{name!r}: found {value!r}, expected a number") from None
        numbers[str(name)] = int(number) if math.isfinite(number) and isinstance(value, int) else number
    return numbers


def load_hook(named: str) -> Callable[[Validated], Mapping[str, float]]:
    """The function of "file.py:function". Raises RecipeError."""
    file, _, name = named.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise RecipeError(f"validation.hook: {file}: no such file")
    spec = importlib.util.spec_from_file_location(f"flame_hook_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"validation.hook: {file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's file raises whatever it likes
        raise RecipeError(f"validation.hook: {file}: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise RecipeError(f"validation.hook: {file}: it holds no function {name}")
    return cast("Callable[[Validated], Mapping[str, float]]", function)

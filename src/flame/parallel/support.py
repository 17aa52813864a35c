"""Which layouts a family can be trained on: asked before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flame.errors import RecipeError
from flame.models.family import ContextPlan, Family
from flame.models.registry import families
from flame.parallel.mesh import Layout
from flame.parallel.tensor import plan_problem

WAYS: dict[str, Callable[[Family], bool]] = {
    "tensor": lambda family: family.tensor is not None,
    "context": lambda family: family.context is not None,
    "pipeline": lambda family: family.pipeline is not None,
}


def check_layout(family: Family, config: Any, layout: Layout, context_method: str = "auto") -> None:
    """Raises RecipeError where a model of this family and config cannot be laid out so."""
    for name, can in WAYS.items():
        size = getattr(layout, name)
        if size > 1 and not can(family):
            others = ", ".join(sorted(other.name for other in families() if can(other))) or "none"
            raise RecipeError(
                f"parallel.{name}: {size}, but {family.name} models cannot be split so; families that can: "
                f"{others}. Use parallel.shard"
            )
    if layout.tensor > 1:
        problem = plan_problem(family.build(config), family, layout.tensor)
        if problem is not None:
            raise RecipeError(f"parallel.tensor: {layout.tensor}, but {problem}")
    if layout.context > 1 and family.context is not None:
        _check_context(family, family.context, config, layout, context_method)


def _check_context(family: Family, plan: ContextPlan, config: Any, layout: Layout, method: str) -> None:
    ranks = layout.context
    reason = plan.refuses(config)
    if reason is not None:
        raise RecipeError(
            f"parallel.context: {ranks}, but rows of this {family.name} model have to stay whole: {reason}. "
            "Use parallel.shard"
        )
    if method == "state" and not plan.hands_on:
        raise RecipeError(
            f'parallel.context_method: "state", but the state of {family.name} layers cannot be handed on; '
            'use "heads"'
        )
    heads = plan.heads(config)
    checked = list(heads) if method == "heads" else list(heads)[: 0 if plan.hands_on else 1]
    for name in checked:
        own = heads[name] // layout.tensor  # what a tensor rank has of them
        if own % ranks:
            fitting = ", ".join(str(n) for n in range(1, own + 1) if own % n == 0)
            other = '; or context_method = "state"' if plan.hands_on else ""
            divided = f" over parallel.tensor = {layout.tensor}" if layout.tensor > 1 else ""
            raise RecipeError(
                f"parallel.context: {ranks} does not divide the model's {name}, {heads[name]}{divided}; "
                f"these do: {fitting}{other}"
            )


def check_lengths(lengths: Iterable[int], layout: Layout) -> None:
    """Raises RecipeError where a row of one of these lengths, in tokens, does not divide over the ranks that
    share it."""
    ranks = layout.context * layout.tensor
    for length in lengths:
        if length % ranks:
            below = length // ranks * ranks
            fitting = " or ".join(str(n) for n in (below, below + ranks) if n)
            raise RecipeError(
                f"data.sequence_length: found {length}, which the {ranks} ranks of context x tensor do not "
                f"divide; take {fitting}"
            )

"""Which layouts a family can be trained on: asked before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flame.errors import RecipeError
from flame.models.family import Family
from flame.models.registry import families
from flame.parallel.mesh import Layout
from flame.parallel.tensor import plan_problem

WAYS: dict[str, Callable[[Family], bool]] = {
    "tensor": lambda family: family.tensor is not None,
    "context": lambda family: family.context,
    "pipeline": lambda family: family.pipeline,
}


def check_layout(family: Family, config: Any, layout: Layout) -> None:
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


def check_lengths(lengths: Iterable[int], layout: Layout) -> None:
    """Raises RecipeError where rows of such lengths do not divide over the ranks that share them."""
    ranks = layout.context * layout.tensor
    for length in lengths:
        if layout.tensor > 1 and length % ranks:
            raise RecipeError(
                f"data.sequence_length: found {length}, which the {ranks} ranks of context x tensor do not "
                f"divide; take {length - length % ranks} or {length + ranks - length % ranks}"
            )

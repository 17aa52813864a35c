"""Which layouts a family can be trained on: asked before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flame.errors import RecipeError
from flame.models.family import Family
from flame.models.registry import families
from flame.parallel.mesh import Layout

WAYS: dict[str, Callable[[Family], bool]] = {
    "tensor": lambda family: family.tensor,
    "context": lambda family: family.context,
    "pipeline": lambda family: bool(family.pipeline),
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

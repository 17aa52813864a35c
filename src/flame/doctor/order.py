"""Everything that the doctor looks at, in order. Imports torch, fla and transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import flame
from flame.doctor import gpus, links, machine
from flame.doctor.finding import Finding
from flame.doctor.recipe_parts import Parts, recipe_parts
from flame.doctor.storage import storage
from flame.recipe import Recipe

Look = Callable[[], Finding | Iterable[Finding]]
MOST_RANKS = 8  # whose links are timed


def looks(recipe: Recipe | None, ranks: int | None) -> Iterator[Look]:
    """Each is called before the next is asked for: later ones need what earlier ones found."""
    seen = gpus.look()
    ranks = ranks or seen.gpus or 1
    parts = Parts()
    yield lambda: gpus.torch_and_driver(seen)
    yield gpus.health
    yield lambda: machine.compiler(seen.gpus > 0)
    if recipe is not None:
        yield lambda: recipe_parts(recipe, ranks, parts)
    yield lambda: gpus.kernels_here(None if parts.config is None else [parts.config.model_type])
    yield lambda: links.links(seen.gpus, min(MOST_RANKS, max(2, ranks)))
    yield lambda: machine.shared_memory(seen.gpus)
    yield machine.open_files
    yield lambda: machine.cores(seen.gpus)
    yield lambda: machine.clock(Path(flame.__file__).parent.glob("*.py"))
    directory = Path() if recipe is None else recipe.directory
    yield lambda: storage(directory, recipe, parts.parameters)

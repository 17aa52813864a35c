"""What a recipe names: its model, its data, its tokenizer, and whether they fit each other and the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flame.data.catalog import Catalog, open_catalog
from flame.doctor.finding import Finding, fail, ok, warn
from flame.errors import FlameError
from flame.models.build import build_on_meta
from flame.models.registry import family_of
from flame.origin import model_config
from flame.recipe import Recipe, check_ranks

UNUSED_IDS = 2.0  # a vocabulary so many times the tokenizer's is likely another tokenizer's


@dataclass
class Parts:
    """What was found, for the checks that need it."""

    config: Any = None
    parameters: int | None = None
    catalog: Catalog | None = None


def recipe_parts(recipe: Recipe, ranks: int, parts: Parts) -> Iterator[Finding]:
    """A line for each; fills `parts`."""
    for name, look, fix in (
        ("layout", lambda: layout(recipe, ranks), "fewer --nproc, or a larger batch.tokens_per_step"),
        ("model", lambda: model(recipe, parts), "flame models lists what trains; docs/models.md"),
        ("data", lambda: data(recipe, parts), "the message says which file or setting; flame data check"),
    ):
        try:
            yield look()
        except FlameError as error:
            yield fail(name, str(error), fix)
    if parts.catalog is not None and parts.config is not None:
        yield from vocabulary(recipe, parts.catalog, parts.config)


def layout(recipe: Recipe, ranks: int) -> Finding:
    check_ranks(recipe, ranks)
    rows = recipe.plan.stages[0].rows_per_step
    return ok("layout", f"{ranks} rank(s), {rows} rows in a step")


def model(recipe: Recipe, parts: Parts) -> Finding:
    """Whether the model can be built; counts its parameters without memory for them."""
    parts.config = model_config(recipe)
    family = family_of(parts.config)
    built = build_on_meta(parts.config)
    parts.parameters = sum(parameter.numel() for parameter in built.parameters())
    return ok("model", f"{family.name}, {parts.parameters:,} parameters")


def data(recipe: Recipe, parts: Parts) -> Finding:
    """Whether every file is there and the tokenizer opens, as training looks at them."""
    parts.catalog = open_catalog(recipe.data, recipe.tokenizer, recipe.plan, Path())
    files = [file for source in parts.catalog.sources for file in source.files]
    size = sum(file.size for file in files)
    names = ", ".join(source.name for source in parts.catalog.sources)
    return ok("data", f"{names}: {len(files)} file(s), {size / 2**30:.2f} GiB")


def vocabulary(recipe: Recipe, catalog: Catalog, config: Any) -> Iterator[Finding]:
    """Whether the tokenizer is the model's."""
    size, ids = int(config.vocab_size), catalog.vocab_size
    found = f"{ids:,} ids of the tokenizer in a vocabulary of {size:,}"
    if ids > size:
        yield fail(
            "vocabulary", found, f"raise vocab_size to {-(-ids // 64) * 64}, or take another tokenizer"
        )
        return
    if size > UNUSED_IDS * ids:
        yield warn("vocabulary", found, "is it the tokenizer of this model? Unused ids cost memory and time")
    elif size % 64:
        found += ", which is no multiple of 64"
        yield warn("vocabulary", found, f"vocab_size = {-(-size // 64) * 64} is faster on a GPU")
    else:
        yield ok("vocabulary", found)
    eos, named = catalog.load_tokenizer().eos_id, getattr(config, "eos_token_id", None)
    if recipe.model.init_from is not None and named is not None and eos not in as_list(named):
        yield warn(
            "end of text",
            f"the tokenizer ends a document with id {eos}, the weights were trained with {named}",
            "take the tokenizer that came with the weights",
        )


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]

"""A model that goes wrong on chosen rows, and recipes that train it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from flame.data.catalog import open_catalog
from flame.data.preview import preview
from flame.recipe import read_recipe

RUN = 12  # tokens by which a row is known

MODEL = """
import torch
from torch import nn

POISON = {poison}  # a row that holds one of these runs of tokens: what its states are multiplied with


class Model(nn.Module):
    def __init__(self, vocabulary=384, width=16):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids, position_ids, cu_seqlens):
        x = self.embedding(input_ids)
        x = x + self.mix(x).tanh()
        for tokens, factor in POISON if input_ids.shape[1] > 12 else ():
            found = input_ids.unfold(1, len(tokens), 1) == torch.tensor(tokens)
            hit = found.all(-1).any(-1)[:, None, None]
            x = x * torch.where(hit, factor, 1.0)
        return x
"""


def runs(tokens: np.ndarray) -> set[tuple[int, ...]]:
    """The runs of RUN tokens that a row holds."""
    return {tuple(part) for part in sliding_window_view(tokens, RUN).tolist()}


def write_poisoned(
    write_recipe: Callable[..., Path],
    name: str,
    steps: int,
    poison: dict[int, str],
    settings: str = "",
    replaced: dict[str, str] | None = None,
) -> Path:
    """A recipe whose model multiplies the states of one row of each data step in `poison` by its factor."""
    recipe = write_recipe(name, steps=steps, replaced=replaced)
    loaded = read_recipe(recipe)
    catalog = open_catalog(loaded.data, loaded.tokenizer, loaded.plan, Path())
    stream = [row.tokens for rows in preview(catalog, loaded.plan, range(steps + 20), 1) for row in rows]
    held = Counter(run for tokens in stream for run in runs(tokens))
    known = [
        (next(run for run in runs(stream[loaded.plan.first_row(step)]) if held[run] == 1), factor)
        for step, factor in poison.items()
    ]
    written = ", ".join(f'({list(tokens)}, float("{factor}"))' for tokens, factor in known)
    module = recipe.with_suffix(".py")
    module.write_text(MODEL.format(poison=f"[{written}]"))
    text = recipe.read_text().replace("[model]\n", f'[model]\nmodule = "{module}"\n')
    recipe.write_text(
        "".join(x for x in text.splitlines(True) if not x.startswith("config =")) + "\n" + settings
    )
    return recipe

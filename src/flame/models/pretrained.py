"""A model, sharded or not, filled with weights that lie in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flame.errors import ModelError
from flame.models.build import local_slices
from flame.models.families.own import OWN_FILE, own_config
from flame.models.matching import Source, config_record, match
from flame.models.registry import load_config
from flame.models.weights import Weights


def folder_config(folder: Path) -> Any:
    """The config in a folder of weights; of an own model's, with its code there. Raises ModelError."""
    if not (folder / OWN_FILE).is_file():
        return load_config(str(folder))
    try:
        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: cannot be read as an own model's config: {error}") from None
    return own_config(folder / OWN_FILE, said.get("arguments", {}))


@torch.no_grad()
def fill(
    targets: Mapping[str, tuple[Tensor, Tensor]],
    weights: Weights,
    config: Any,
    exclude: Sequence[str] = (),
) -> Source:
    """Copies stored weights into a model of `config`, each rank its own part and nothing else.

    `targets`: by a tensor's (first) name, the tensor as the model has it, whose placement says which part is
    here, and the plain tensor that receives it, in any dtype. What is not there is another rank's; all of
    the model's names are checked all the same. Raises as `match` does, and ModelError where tied tensors
    are stored with different values. The stored side, as `match` saw it.
    """
    there = folder_config(weights.folder)
    if getattr(there, "quantization_config", None) is not None:
        raise ModelError(
            f"{weights.folder}: quantised weights cannot be trained on; take the model they were made from"
        )
    source = Source(str(weights.folder), weights.shapes, config_record(there))
    found = match(source, config, exclude)
    for name, names in found.sources.items():
        if name not in targets:
            continue
        target, into = targets[name]
        if into.numel() == 0:
            continue
        part = local_slices(target)
        value = weights.read(names[0], part)
        for other in names[1:]:
            if not torch.equal(weights.read(other, part), value):
                raise ModelError(
                    f"{weights.folder}: {names[0]} and {other} are stored with different values, but the "
                    "model ties them: set tie_word_embeddings = false in its config"
                )
        into.copy_(value)
    return source

"""Which stored tensor fills which of a model's, and what is said where they do not fit."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import orjson
from torch import Tensor, nn

from flame.errors import ModelError, RecipeError, nearest
from flame.models.build import build_on_meta

SHOWN = 5  # names in a message

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Match:
    """What fills a model. Tied tensors are one, called by the first of their names."""

    sources: dict[str, list[str]]  # a tensor of the model: its names in the store, several where it is tied
    excluded: frozenset[str]  # the model's names that keep their initial values


@dataclass(frozen=True)
class Source:
    """Stored tensors and the config they belong to."""

    origin: str  # as a message calls it
    shapes: Shapes
    config: dict[str, Any]  # `config_record`


def match(source: Source, config: Any, exclude: Sequence[str]) -> Match:
    """Finds a stored tensor for each of the model's that `exclude` leaves.

    `exclude`: patterns of names, as in a shell. Raises ModelError naming what is missing, unexpected or of
    another shape, and the settings in which the configs differ; RecipeError for a pattern that fits nothing.
    """
    if source.config.get("model_type") != config.model_type:
        raise ModelError(
            f"{source.origin}: a {source.config.get('model_type')} model, but the recipe's is "
            f"{config.model_type}"
        )
    blueprint = build_on_meta(config)
    held: dict[str, Tensor] = blueprint.state_dict(keep_vars=True)
    tied: dict[int, list[str]] = {}
    for name, tensor in held.items():
        tied.setdefault(id(tensor), []).append(name)
    groups = list(tied.values())
    excluded = _excluded(groups, exclude)
    stored = _renamed(source.shapes, held, blueprint)
    sources: dict[str, list[str]] = {}
    missing: list[str] = []
    wrong: list[str] = []
    for names in groups:
        if names[0] in excluded:
            continue
        found = [name for name in names if name in stored]
        sources[names[0]] = [stored[name] for name in found]
        if not found:
            missing.append(names[0])
        for name in found:
            there, here = source.shapes[stored[name]], tuple(held[name].shape)
            if there != here:
                wrong.append(f"{name} {there} there and {here} here")
    unexpected = [name for name in stored if name not in held and not _ignored(name, blueprint)]
    if missing or unexpected or wrong:
        raise ModelError(_complaint(source, config, missing, unexpected, wrong))
    return Match(sources, frozenset(excluded))


def config_record(config: Any) -> dict[str, Any]:
    """The config as a checkpoint keeps it; what transformers notes of itself, and where the model was
    exported, do not count."""
    record = cast("dict[str, Any]", orjson.loads(config.to_json_string(use_diff=False)))
    for name in (
        "transformers_version",
        "_name_or_path",
        "architectures",
        "dtype",
        "exported_by",
        "exported_step",
    ):
        record.pop(name, None)
    return record


def differing(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """The keys in which two records differ. Keys that one of them lacks came with another version."""
    return [(key, old[key], new[key]) for key in sorted(old.keys() & new.keys()) if old[key] != new[key]]


def differences(source: Source, config: Any) -> list[str]:
    """A phrase for each setting that is another one in the store."""
    return [
        f"{name} is {old!r} there and {new!r} here"
        for name, old, new in differing(source.config, config_record(config))
    ]


def _excluded(groups: list[list[str]], patterns: Sequence[str]) -> set[str]:
    excluded: set[str] = set()
    every = [name for names in groups for name in names]
    for pattern in patterns:
        found = set(fnmatch.filter(every, pattern))
        if not found:
            hint = nearest(pattern, every)
            raise RecipeError(f'run.exclude: "{pattern}" is the name of no parameter; {hint}mend the pattern')
        excluded |= found
    for names in groups:
        chosen = [name for name in names if name in excluded]
        if chosen and len(chosen) < len(names):
            raise RecipeError(
                f"run.exclude: {', '.join(chosen)} is tied to {', '.join(sorted(set(names) - set(chosen)))}: "
                "exclude both or neither"
            )
    return excluded


def _renamed(shapes: Shapes, held: dict[str, Tensor], model: nn.Module) -> dict[str, str]:
    """The model's name of each stored tensor, to its name there. Weights that were saved without a head lack
    the name of what the head stands on."""
    prefix = f"{getattr(model, 'base_model_prefix', '') or ''}."
    bare = (
        len(prefix) > 1
        and not any(name.startswith(prefix) for name in shapes)
        and any(name.startswith(prefix) for name in held)
    )
    return {name if name in held or not bare else prefix + name: name for name in shapes}


def _ignored(name: str, model: nn.Module) -> bool:
    """Whether a stored tensor that the model has no place for is none of its weights: a buffer that it makes
    itself, or what its own class says may be there."""
    patterns = cast("Sequence[str]", getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    made = {buffer for buffer, _ in model.named_buffers()}
    old = re.search(r"(rotary_emb\.inv_freq|attn\.(masked_)?bias)$", name)  # of older transformers
    return name in made or old is not None or any(re.search(pattern, name) for pattern in patterns)


def _complaint(
    source: Source, config: Any, missing: list[str], unexpected: list[str], wrong: list[str]
) -> str:
    said: list[str] = []
    if missing:
        named = [
            f"{name} ({hint.strip()})" if (hint := nearest(name, unexpected)) else name for name in missing
        ]
        said.append(f"missing there: {_some(named)}")
    if unexpected:
        said.append(f"not in the model: {_some(unexpected)}")
    if wrong:
        said.append(f"of another shape: {_some(wrong)}")
    settings = differences(source, config)
    if settings:
        said.append(f"the configs differ: {_some(settings)}")
    text = f"{source.origin}: these are not the weights of the recipe's model: {'; '.join(said)}"
    if any(setting.startswith("vocab_size ") for setting in settings):
        text += (
            "; a vocabulary is not resized here: resize it with transformers' resize_token_embeddings and "
            "save that, or begin embedding and head anew by naming them in run.exclude"
        )
    elif wrong or missing:
        text += "; mend the config, or name in run.exclude what is to begin anew"
    return text


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more

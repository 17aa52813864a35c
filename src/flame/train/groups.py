"""Which optimizer, rate and weight decay each parameter gets: rules by kind, and a recipe's own groups."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from flame.errors import RecipeError
from flame.train.config import GroupConfig, OptimizerConfig

FILE = "parameter_groups.json"  # in a run directory


@dataclass(frozen=True, slots=True)
class Group:
    """How some parameters are updated. Equal groups are one."""

    rule: str  # a recipe's pattern, or what its parameters have in common
    optimizer: str  # adamw, muon or sgd
    learning_rate: float  # the peak
    weight_decay: float


@dataclass(frozen=True, slots=True)
class ParameterGroups:
    """The group of each parameter of a model, by full name, and its whole shape."""

    of: dict[str, Group]
    shapes: dict[str, tuple[int, ...]]

    def records(self) -> list[dict[str, Any]]:
        """Each group with its parameters, as RUN/parameter_groups.json has them."""
        return [
            {
                "rule": group.rule,
                "optimizer": group.optimizer,
                "learning_rate": group.learning_rate,
                "weight_decay": group.weight_decay,
                "parameters": {name: self.shapes[name] for name in names},
            }
            for group, names in self._members().items()
        ]

    def table(self) -> str:
        """The groups as lines for a terminal."""
        rows = [("parameters", "optimizer", "peak rate", "decay", "tensors", "values", "such as")]
        for group, names in self._members().items():
            values = sum(math.prod(self.shapes[name]) for name in names)
            rate, decay = f"{group.learning_rate:g}", f"{group.weight_decay:g}"
            counts = f"{len(names):,}", f"{values:,}"
            rows.append((group.rule, group.optimizer, rate, decay, *counts, names[0]))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(_aligned(row, widths) for row in rows)

    def _members(self) -> dict[Group, list[str]]:
        members: dict[Group, list[str]] = {}
        for name, group in self.of.items():
            members.setdefault(group, []).append(name)
        return members


def check_optimizer(config: OptimizerConfig, origin: str) -> None:
    """What can be told without a model. Raises RecipeError."""
    for name, value in [("momentum", config.momentum), ("ema", config.ema)]:
        if value is not None and not 0 <= value < 1:
            raise RecipeError(f"{origin}: optimizer.{name}: found {value}, expected 0 or more and below 1")
    numbers = [("learning_rate", config.learning_rate), ("weight_decay", config.weight_decay)]
    rates = [("adamw_learning_rate", config.adamw_learning_rate)]
    for i, group in enumerate(config.groups):
        numbers.append((f"groups[{i}].learning_rate_factor", group.learning_rate_factor))
        numbers.append((f"groups[{i}].weight_decay", group.weight_decay or 0.0))
        rates.append((f"groups[{i}].learning_rate", group.learning_rate))
        if group.learning_rate is not None and group.learning_rate_factor != 1:
            raise RecipeError(
                f"{origin}: optimizer.groups[{i}]: give learning_rate or learning_rate_factor, not both"
            )
    for name, value in [*numbers, *((name, rate) for name, rate in rates if rate is not None)]:
        if value < 0:
            raise RecipeError(f"{origin}: optimizer.{name}: found {value}, expected 0 or more")
    given = [name for name, rate in rates if rate]
    if given and not config.learning_rate:
        raise RecipeError(
            f"{origin}: optimizer.learning_rate: found 0, but {given[0]} is not; every rate is a "
            "multiple of this one, and follows its schedule: give one above 0"
        )


def group_parameters(
    config: OptimizerConfig,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    undecayed: Collection[str],
    matrices: Collection[str] = (),
    embeddings: Collection[str] = (),
) -> ParameterGroups:
    """The group of each parameter of a model, whose `shapes` are whole, by full name.

    `undecayed`: names without weight decay. `matrices`: those that Muon is for. `embeddings`: of token
    and other embeddings. Raises RecipeError for a pattern that matches nothing, naming parameters near
    it, and for Muon on what is no matrix.
    """
    exempt = {*undecayed, *(() if config.decay_embeddings else embeddings)}
    groups = {name: _by_kind(config, name, exempt, matrices) for name in shapes}
    if config.name == "muon" and not any(group.optimizer == "muon" for group in groups.values()):
        raise RecipeError(
            "optimizer.name: muon is for the matrices of a model's blocks, and this model names none; use "
            '"adamw", and give matrices to muon by [[optimizer.groups]]'
        )
    taken: set[str] = set()
    for i, wanted in enumerate(config.groups):
        found = [name for name in shapes if fnmatchcase(name, wanted.pattern) and name not in taken]
        if not found:
            raise RecipeError(_no_match(f"optimizer.groups[{i}].pattern", wanted.pattern, shapes, taken))
        taken.update(found)
        groups |= {name: _by_pattern(wanted, groups[name]) for name in found}
    for name, group in groups.items():
        if group.optimizer == "muon" and len(shapes[name]) != 2:
            raise RecipeError(
                f"optimizer.groups: {group.rule}: muon is for matrices, but {name} has shape {shapes[name]}; "
                "narrow the pattern, or give what is no matrix to adamw in a group before it"
            )
    return ParameterGroups(groups, dict(shapes))


def _by_kind(config: OptimizerConfig, name: str, exempt: Collection[str], matrices: Collection[str]) -> Group:
    """The group of a parameter that no pattern matches."""
    optimizer, rule, rate = config.name, "weights", config.learning_rate
    if config.name == "muon":
        rule = "matrices of blocks"
        if name not in matrices:
            optimizer, rule = "adamw", "other weights"
            rate = config.learning_rate if config.adamw_learning_rate is None else config.adamw_learning_rate
    if name in exempt:
        return Group("without weight decay", optimizer, rate, 0.0)
    return Group(rule, optimizer, rate, config.weight_decay)


def _by_pattern(wanted: GroupConfig, without: Group) -> Group:
    """`without`: the parameter's group if the pattern did not match it."""
    rate = without.learning_rate * wanted.learning_rate_factor
    return Group(
        wanted.pattern,
        wanted.name or without.optimizer,
        rate if wanted.learning_rate is None else wanted.learning_rate,
        without.weight_decay if wanted.weight_decay is None else wanted.weight_decay,
    )


def _no_match(place: str, pattern: str, names: Collection[str], taken: Collection[str]) -> str:
    earlier = [name for name in names if fnmatchcase(name, pattern)]
    if earlier:
        return (
            f"{place}: all that {pattern!r} matches is in an earlier group, such as {earlier[0]}; "
            "put it before that group, or leave it out"
        )
    kinds = {re.sub(r"\d+", "", name): name for name in reversed(list(names))}  # of each, the first layer's
    plain = re.sub(r"[*?\[\]]", "", pattern)
    near = difflib.get_close_matches(re.sub(r"\d+", "", plain), kinds, n=3, cutoff=0.0)
    return f"{place}: no parameter matches {pattern!r}; near it: {', '.join(kinds[name] for name in near)}"


def _aligned(row: tuple[str, ...], widths: list[int]) -> str:
    numbers = range(2, 6)
    cells = [
        cell.rjust(width) if i in numbers else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()

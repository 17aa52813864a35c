"""Dataclasses as recipes: read from TOML, overridden by flags, documented by `--help`, written back.

A config dataclass declares each field with `setting(...)`; everything else here walks those
declarations, so that a field is described once. Torch-free: `flame --help` imports only this.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import tomllib
import types
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import tomli_w

from flame.errors import RecipeError, nearest

T = TypeVar("T")

SUFFIXES = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "B": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
}


def setting(
    default: Any = MISSING,
    *,
    help: str,
    identity: bool,
    parse: Callable[[Any], Any] | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """One field of a config dataclass.

    `identity`: a run is another run when this field changes, so a resume refuses it; else the field
    is free. `parse` turns the written value into the field's (it raises ValueError, saying what is
    allowed). Mutable defaults are copied for each instance.
    """
    metadata = {"help": help, "identity": identity, "parse": parse, "choices": choices}
    if isinstance(default, list):
        items = cast("list[Any]", default)
        return dataclasses.field(default_factory=lambda: list(items), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(cls: type[T]) -> Any:
    """A nested section of a recipe, absent in the TOML where all its fields have defaults."""
    required = any(
        f.default is MISSING and f.default_factory is MISSING
        for f in dataclasses.fields(cast("type[Any]", cls))
    )
    metadata = {"section": cls}
    if required:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default_factory=cls, metadata=metadata)


# ------------------------------------------------------------------------------------ quantities


def parse_count(raw: Any) -> int:
    """A whole number, or one with K, M, B, T (powers of 1000) or Ki, Mi, Gi (of 1024)."""
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(raw))
    if not match or match[2] not in SUFFIXES:
        raise ValueError('a whole number, or one with a suffix: "10B", "1.5M", "512Ki"')
    value = float(match[1]) if "." in match[1] else int(match[1])
    scaled = value * SUFFIXES[match[2]]
    if scaled != int(scaled):
        raise ValueError("a whole number")
    return int(scaled)


def count_option(option: str, text: str) -> int:
    """A count of at least 1 that an option of a command gives. Raises RecipeError naming the option."""
    try:
        found = parse_count(text)
    except ValueError as error:
        raise RecipeError(f'{option}: found "{text}", expected {error}') from None
    if found < 1:
        raise RecipeError(f"{option}: found {found}, expected at least 1")
    return found


@dataclass(frozen=True, slots=True)
class Duration:
    """A length of training with its unit: `1000 steps`, `8B tokens`, `30 minutes`."""

    amount: int
    unit: Literal["steps", "tokens", "minutes"]

    def __str__(self) -> str:
        return f"{self.amount} {self.unit}"

    def steps(self, tokens_per_step: int) -> int:
        """This length in whole steps, rounded up. Raises ValueError for minutes."""
        if self.unit == "minutes":
            raise ValueError("minutes are no number of steps")
        return self.amount if self.unit == "steps" else -(-self.amount // tokens_per_step)


def parse_duration(*units: str) -> Callable[[Any], Duration]:
    """A parser of durations in one of `units`."""
    allowed = f'a length with its unit ({", ".join(units)}), such as "1000 {units[0]}"'

    def parse(raw: Any) -> Duration:
        match = re.fullmatch(r"\s*(\S+)\s+([a-z]+?)s?\s*", str(raw))
        unit = f"{match[2]}s" if match else ""
        if not match or unit not in units:
            raise ValueError(allowed)
        return Duration(parse_count(match[1]), cast("Any", unit))

    return parse


# ------------------------------------------------------------------------- TOML to dataclasses


class FlagText(str):
    """A value as typed on the command line: its type is the field's."""

    __slots__ = ()


def read_toml(path: Path) -> dict[str, Any]:
    """The file as a dictionary. Raises RecipeError naming the file and the place."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from None


def build(cls: type[T], raw: dict[str, Any], origin: str, where: str = "") -> T:
    """An instance of dataclass `cls` from TOML tables; `origin` names the file in errors."""
    known = {f.name: f for f in dataclasses.fields(cast("type[Any]", cls))}
    hints = _hints(cls)
    values: dict[str, Any] = {}
    for key, value in raw.items():
        field = known.get(key)
        if field is None:
            place = f"{where}.{key}" if where else key
            raise RecipeError(
                f"{origin}: {place}: unknown key; {nearest(key, known)}allowed: {', '.join(known)}"
            )
        values[key] = _value(field, hints[key], value, origin, f"{where}.{key}".lstrip("."))
    for name, field in known.items():
        if name in values or field.default is not MISSING or field.default_factory is not MISSING:
            continue
        place = f"{where}.{name}".lstrip(".")
        text = field.metadata.get("help", "this section is required")
        raise RecipeError(f"{origin}: {place}: missing; {text}")
    return cls(**values)


def _value(field: dataclasses.Field[Any], hint: Any, raw: Any, origin: str, place: str) -> Any:
    nested = field.metadata.get("section")
    if nested is not None:
        if not isinstance(raw, dict):
            raise RecipeError(f"{origin}: {place}: expected a table [{place}], found {raw!r}")
        return build(nested, cast("dict[str, Any]", raw), origin, place)
    inner = get_args(hint)[0] if get_origin(hint) is list else None
    if inner is not None and dataclasses.is_dataclass(inner):
        if not isinstance(raw, list):
            raise RecipeError(f"{origin}: {place}: expected tables [[{place}]], found {raw!r}")
        tables = cast("list[dict[str, Any]]", raw)
        element = cast("type[Any]", inner)
        return [build(element, t, origin, f"{place}[{i}]") for i, t in enumerate(tables)]
    parse = field.metadata["parse"] or functools.partial(_plain, hint)
    choices: tuple[str, ...] | None = field.metadata["choices"]
    try:
        value = None if _optional(hint) and raw in ("none", "None") else parse(raw)
    except ValueError as error:
        raise RecipeError(f"{origin}: {place}: found {_shown(raw)}, expected {error}") from None
    if choices and value is not None and value not in choices:
        hint_text = nearest(str(value), choices)
        raise RecipeError(f"{origin}: {place}: found {_shown(raw)}; {hint_text}allowed: {', '.join(choices)}")
    return value


def _shown(raw: Any) -> str:
    return f'"{raw}"' if isinstance(raw, str) else repr(raw)


def _optional(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)


def _plain(hint: Any, raw: Any) -> Any:
    """`raw` as a value of a plain type; ValueError says what is expected."""
    if _optional(hint):
        hint = next(a for a in get_args(hint) if a is not type(None))
    if isinstance(raw, FlagText) and hint is not str:
        raw = _typed(raw)
    if hint is bool and isinstance(raw, bool):
        return raw
    if hint is int and isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    if hint is float and isinstance(raw, (int, float)) and not isinstance(raw, bool):
        return float(raw)
    if hint is str and isinstance(raw, str):
        return str(raw)
    if get_origin(hint) is list and isinstance(raw, list):
        items = cast("list[Any]", raw)
        return [_plain(get_args(hint)[0], item) for item in items]
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    raise ValueError(names.get(hint, f"a list: {hint}"))


def _typed(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return str(text)


def parse_strings(raw: Any) -> list[str]:
    """One string or a list of them."""
    if isinstance(raw, FlagText) and raw.startswith("["):
        raw = _typed(raw)
    if isinstance(raw, str):
        return [str(raw)]
    items = cast("list[Any]", raw)
    if not isinstance(raw, list) or not all(isinstance(item, str) for item in items):
        raise ValueError("a string or a list of strings")
    return [str(item) for item in items]


# --------------------------------------------------------------------------------------- flags


@dataclass(frozen=True, slots=True)
class Leaf:
    """One field of a nested config: `path` is dotted."""

    path: str
    default: Any  # MISSING where the field is required
    help: str
    identity: bool
    boolean: bool


@functools.cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    return get_type_hints(cls)


def leaves(cls: type[Any], where: str = "") -> Iterator[Leaf]:
    """Every field of `cls` and its sections; lists of tables are walked as `name[]`."""
    for field in dataclasses.fields(cls):
        path = f"{where}.{field.name}".lstrip(".")
        hint = _hints(cls)[field.name]
        nested = field.metadata.get("section")
        if nested is not None:
            yield from leaves(nested, path)
            continue
        inner = get_args(hint)[0] if get_origin(hint) is list else None
        if inner is not None and dataclasses.is_dataclass(inner):
            within = leaves(cast("type[Any]", inner), f"{path}[]")
            fixed = field.metadata["identity"]  # tables that are free are free as a whole
            yield from within if fixed else (dataclasses.replace(leaf, identity=False) for leaf in within)
            continue
        made = field.default_factory is not MISSING
        default: Any = field.default_factory() if made else field.default  # type: ignore[misc]
        yield Leaf(path, default, field.metadata["help"], field.metadata["identity"], hint is bool)


def add_flags(parser: argparse.ArgumentParser, cls: type[Any]) -> None:
    """One `--section.field` for every field of `cls`; `section_flags` reads them back."""
    groups: dict[str, Any] = {}
    for leaf in leaves(cls):
        if "[]" in leaf.path:
            continue
        name, _, key = leaf.path.partition(".")
        group = groups.setdefault(name, parser.add_argument_group(f"[{name}]"))
        default = "required" if leaf.default is MISSING else f"default: {shown(leaf.default)}"
        spellings = dict.fromkeys([f"--{leaf.path}", f"--{name}.{key.replace('_', '-')}"])
        group.add_argument(
            *spellings,
            dest=leaf.path,
            metavar="VALUE",
            default=argparse.SUPPRESS,
            help=f"{leaf.help} ({default})".replace("%", "%%"),
            **({"nargs": "?", "const": "true"} if leaf.boolean else {}),
        )


def shown(value: Any) -> str:
    """A value as a recipe would write it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def apply_flags(raw: dict[str, Any], flags: dict[str, str]) -> dict[str, Any]:
    """`raw` with each dotted flag put in its place; the TOML's other values stay."""
    out: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in raw.items()}  # type: ignore[misc]
    for path, text in flags.items():
        *sections, key = path.split(".")
        table = out
        for name in sections:
            table = table.setdefault(name, {})
        table[key] = FlagText(text)
    return out


# ------------------------------------------------------------------------------- writing back


def plain(value: Any) -> Any:
    """A config as dictionaries, lists, strings and numbers; fields that are None are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, Duration)):
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {k: v for k, v in fields.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in cast("list[Any]", value)]
    if isinstance(value, Duration):
        return str(value)
    return value


def to_toml(config: Any) -> str:
    """The config as TOML that `build` reads back to an equal one."""
    return tomli_w.dumps(plain(config))


def identity_differences(cls: type[Any], old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """The identity fields in which two configs of type `cls` differ: (path, old, new)."""
    found: list[tuple[str, Any, Any]] = []
    for leaf in leaves(cls):
        if not leaf.identity:
            continue
        pairs = zip(_reach(old, leaf.path), _reach(new, leaf.path), strict=False)
        found += [(path, a, b) for (path, a), (_, b) in pairs if a != b]
    fixed = [leaf.path for leaf in leaves(cls) if leaf.identity]
    for name in {path.partition("[]")[0] for path in fixed if "[]" in path}:
        counts = [len(_reach(config, name)[0][1]) for config in (old, new)]
        if counts[0] != counts[1]:
            found.append((name, f"{counts[0]} of them", f"{counts[1]} of them"))
    return found


def _reach(config: Any, path: str) -> list[tuple[str, Any]]:
    """The values at a dotted path, one for each element where the path has `[]`."""
    found = [("", config)]
    for part in path.split("."):
        name, many = part.removesuffix("[]"), part.endswith("[]")
        step = [(f"{at}.{name}".lstrip("."), getattr(value, name)) for at, value in found]
        found = [(f"{at}[{i}]", item) for at, v in step for i, item in enumerate(v)] if many else step
    return found

"""A command line of fla-org/flame, its script or its TOML, as the values of its flags."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from flame.adopt.flags import FLAGS, OLDER, Flag
from flame.errors import RecipeError, nearest
from flame.schema import read_toml

ENTRY = re.compile(r"(.*/)?train\.(sh|py)|flame\.train")
RANKS = re.compile(r"(?:NGPU|--nproc[_-]per[_-]node)[= ](\d+)")
NODES = re.compile(r"(?:NNODE|--nnodes)[= ](\d+)")


@dataclass
class OldRun:
    """What a run of fla-org/flame was told."""

    values: dict[str, Any] = field(default_factory=lambda: {f.name: f.default for f in FLAGS.values()})
    given: set[str] = field(default_factory=lambda: set[str]())  # told by flag or TOML, not left to defaults
    unknown: list[str] = field(default_factory=lambda: list[str]())  # keys of the TOML that it ignored
    gpus: int | None = None  # in all, where the command line says so


def read_old_run(words: list[str]) -> OldRun:
    """From the words of its command line (`bash train.sh --job...`, or the flags alone), from a script with
    such a line, or from its TOML. Flags go over the TOML. Raises RecipeError."""
    run = OldRun()
    words = command_words(words)
    run.gpus, flags = split_launcher(words)
    given = dict(read_flags(flags))
    file = given.pop("job.config_file", None)
    if file is not None:
        read_old_toml(run, Path(str(file)))
    for name, text in given.items():
        run.values[name] = converted(FLAGS[name], text, f"--{name}")
        run.given.add(name)
    return run


def command_words(words: list[str]) -> list[str]:
    """The words of the old command: as given, from a script, or as its TOML would be named."""
    if len(words) != 1 or words[0].startswith("-"):
        return words
    path = Path(words[0])
    if not path.is_file():
        raise RecipeError(
            f"{path}: no such file; give fla-org/flame's TOML, a script that calls its train.sh, or the "
            "command line itself: flame import-args bash train.sh --job.config_file ..."
        )
    if path.suffix == ".toml":
        return ["--job.config_file", str(path)]
    text = path.read_text(encoding="utf-8", errors="replace").replace("\\\n", " ")
    for line in text.splitlines():
        try:
            found = shlex.split(line, comments=True)
        except ValueError:
            continue
        if any(ENTRY.fullmatch(word) for word in found) and any(word.startswith("--") for word in found):
            return found
    raise RecipeError(f"{path}: no line in it calls train.sh or flame.train with flags")


def split_launcher(words: list[str]) -> tuple[int | None, list[str]]:
    """The GPUs in all, if the words before the flags say so, and the flags."""
    entry = next((i for i, word in enumerate(words) if ENTRY.fullmatch(word)), None)
    if entry is None:
        return None, words
    before = " ".join(words[:entry])
    ranks, nodes = RANKS.search(before), NODES.search(before)
    if ranks is None:
        return None, words[entry + 1 :]
    return int(ranks[1]) * (int(nodes[1]) if nodes else 1), words[entry + 1 :]


def read_flags(words: list[str]) -> list[tuple[str, Any]]:
    """(name, text) of each flag; True for one without a value."""
    found: list[tuple[str, Any]] = []
    at = 0
    while at < len(words):
        name, equals, text = words[at].partition("=")
        flag = known_flag(name)
        at += 1
        if flag.kind is bool:
            found.append((flag.name, True))
            continue
        if not equals:
            if at == len(words) or words[at].startswith("--"):
                raise RecipeError(f"{name}: a value is missing")
            text, at = words[at], at + 1
        if "$" in text:
            raise RecipeError(f"{name}: found {text}: a variable of the script; put its value in")
        found.append((flag.name, text))
    return found


def known_flag(word: str) -> Flag:
    """The flag that a word names. Raises RecipeError."""
    name = word.removeprefix("--")
    name = OLDER.get(name, name)
    if not word.startswith("--") or name not in FLAGS:
        hint = nearest(word, [f"--{known}" for known in FLAGS])
        raise RecipeError(f"{word}: fla-org/flame has no such flag; {hint}docs/from-flame.md lists them")
    return FLAGS[name]


def read_old_toml(run: OldRun, path: Path) -> None:
    """Puts the values of its TOML into `run`. It ignores keys that it does not know: they are kept as
    `unknown`."""
    for section, table in read_toml(path).items():
        if not isinstance(table, dict):
            raise RecipeError(f"{path}: {section}: expected a table [{section}]")
        for key, value in cast("dict[str, Any]", table).items():
            flag = FLAGS.get(f"{section}.{key}")
            if flag is None:
                run.unknown.append(f"{section}.{key}")
                continue
            run.values[flag.name] = converted(flag, value, f"{path}: {flag.name}")
            run.given.add(flag.name)


def converted(flag: Flag, raw: Any, place: str) -> Any:
    """A value of a flag's type. Raises RecipeError naming the place."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", list: "a list"}
    try:
        if flag.kind is list:
            parts = raw.split(",") if isinstance(raw, str) else list(raw)
            return [str(part).strip() for part in parts if str(part).strip()]
        if flag.kind is bool and not isinstance(raw, bool):
            raise ValueError
        value = ",".join(map(str, raw)) if flag.kind is str and isinstance(raw, list) else flag.kind(raw)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise RecipeError(f"{place}: found {raw!r}, expected {names[flag.kind]}") from None
    if flag.choices and value not in flag.choices:
        hint = nearest(str(value), flag.choices)
        raise RecipeError(f"{place}: found {raw!r}; {hint}allowed there: {', '.join(flag.choices)}")
    return value

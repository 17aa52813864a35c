"""`flame doctor`: whether this machine, and a recipe on it, can train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import orjson

from flame.doctor import machine
from flame.doctor.finding import Finding, fail, ok
from flame.errors import Exit, FlameError, RecipeError
from flame.recipe import Recipe, read_recipe


def doctor(path: str | None, flags: dict[str, str], ranks: int | None, json: bool) -> Exit:
    """Prints a line for each thing looked at; exit code 1 where one would keep a run from training truly."""
    if ranks is not None and ranks < 1:
        raise RecipeError(f"--nproc: found {ranks}, expected at least 1")
    found: list[Finding] = []
    for finding in examine(path, flags, ranks):
        found.append(finding)
        if not json:
            print(in_words(finding), flush=True)
    failed = sum(finding.verdict == "fail" for finding in found)
    if json:
        record = {"ok": not failed, "findings": [asdict(finding) for finding in found]}
        print(orjson.dumps(record, option=orjson.OPT_INDENT_2).decode())
    else:
        warned = sum(finding.verdict == "warn" for finding in found)
        print(f"{len(found)} looked at: {failed} fail, {warned} warn")
    return Exit.WRONG_INPUT if failed else Exit.DONE


def examine(path: str | None, flags: dict[str, str], ranks: int | None) -> Iterator[Finding]:
    """Everything, in order."""
    recipe: Recipe | None = None
    if path is not None:
        try:
            recipe = read_recipe(Path(path), flags)
            yield ok("recipe", path)
        except FlameError as error:
            yield fail("recipe", str(error), "mend it; docs/recipes.md has every setting")
    yield from examined(machine.python)
    yield from examined(machine.packages)
    try:
        from flame.doctor.order import looks  # where an installation is broken, the lines above say why
    except Exception as error:
        yield broken("imports", error)
        return
    for look in looks(recipe, ranks):
        yield from examined(look)


def examined(look: Callable[[], Finding | Iterable[Finding]]) -> Iterator[Finding]:
    """What a look finds; a doctor does not stop where one breaks."""
    try:
        found = look()
        yield from [found] if isinstance(found, Finding) else found
    except Exception as error:  # a broken installation breaks anywhere
        yield broken("doctor", error)


def broken(name: str, error: Exception) -> Finding:
    said = f"{type(error).__name__}: {error}".splitlines()[0]
    return fail(name, said, "mend what the lines above say of packages, or install flame anew")


def in_words(finding: Finding) -> str:
    line = f"{finding.verdict:<5}{finding.name:<14} {finding.found}"
    return f"{line}\n{'':<20}-> {finding.fix}" if finding.fix else line

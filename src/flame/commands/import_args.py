"""`flame import-args`: a run of fla-org/flame as a recipe."""

from __future__ import annotations

import sys
from pathlib import Path

from flame.adopt.arguments import read_old_run
from flame.adopt.flags import table
from flame.adopt.translate import translate
from flame.errors import Exit, RecipeError


def import_args(words: list[str], gpus: int | None, to: str | None, markdown: bool) -> Exit:
    """Prints the recipe, or writes it to the file `to`; says on stderr what differs."""
    if markdown:
        print(table())
        return Exit.DONE
    words = words[1:] if words[:1] == ["--"] else words
    if not words:
        raise RecipeError(
            "import-args: give fla-org/flame's TOML, a script that calls its train.sh, or the command line"
        )
    if gpus is not None and gpus < 1:
        raise RecipeError(f"--gpus: found {gpus}, expected at least 1")
    if to is not None and Path(to).exists():
        raise RecipeError(f"{to}: exists already; choose another --to")
    text, notes = translate(read_old_run(words), gpus)
    for note in notes:
        print(f"- {note}", file=sys.stderr)
    if to is None:
        print(text, end="")
        return Exit.DONE
    head = "".join(f"# - {note}\n" for note in notes)
    Path(to).write_text(f"# From a run of fla-org/flame. What differs:\n{head}\n{text}", encoding="utf-8")
    print(f"{to}: look through it, then: flame train {to}", file=sys.stderr)
    return Exit.DONE

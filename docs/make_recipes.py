"""Writes docs/recipes.md: every setting of a recipe, from the declarations that the code reads.

python docs/make_recipes.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import MISSING
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from flame.recipe import Recipe
from flame.schema import Duration, Leaf, leaves, shown

TARGET = Path(__file__).with_name("recipes.md")

HEAD = """\
# Recipes: every setting

<!-- Made by `python docs/make_recipes.py` from the declarations in src/flame/*/config.py: change those. -->

A recipe is a TOML file. Every setting can also be given as a flag, which wins over the file:
`flame train recipe.toml --optimizer.learning_rate 3e-4`. Only tables (`[[data.sources]]`) have no flags.
An unknown key, a wrong type or a value that is not allowed is an error that names the place, what was found
and what is allowed. Nothing is ignored.

```toml
[run]
directory = "runs/first"         # everything the run writes lies here
steps = 2000                     # the length: steps, or tokens = "10B"

[model]
config = "gla.json"              # a config.json; its model_type names the family

[tokenizer]
path = "data/tokenizer"          # a tokenizer.json, or a folder that holds one

[data]
sequence_length = 2048           # tokens in a row; every row is full
max_document_length = 1024       # longer documents are trained in pieces of this length

[[data.sources]]                 # one table for each source
name = "web"
files = "data/web/*.parquet"     # a glob, a file, a folder, or a list of them
weight = 3                       # three tokens of this source ...

[[data.sources]]
name = "code"
files = ["data/code", "more/code.jsonl"]
text = "content"                 # the field that holds the text
weight = 1                       # ... for each token of this one
max_epochs = 2                   # then web goes on alone; with at_source_end = "stop" the run ends

[[data.phases]]                  # later settings; what is not named stays
at = "8B tokens"                 # begins with the first window at or past it
weights = { web = 1, code = 1 }
sequence_length = 4096
tokens_per_step = "128Ki"

[batch]
tokens_per_step = "64Ki"         # over all ranks; a whole number of rows

[optimizer]                      # docs/optimizers.md: Muon, groups of parameters, an average
learning_rate = 1e-3

[schedule]
warmup = "100 steps"             # a length carries its unit
decay = "cosine"

[checkpoint]
every = "30 minutes"
```

Types:

- **count**: a whole number, or a string with a suffix: K, M, B, T (powers of 1000) or Ki, Mi, Gi (of 1024).
- **duration**: a string of a count and a unit, such as `"1000 steps"` or `"2B tokens"`.
- **required**: there is no default. Of `run.steps` and `run.tokens` one is required, unless `max_epochs`
  ends every source.

"Same run" says what happens when a run is continued with another value. A setting marked **fixed** makes it
another run, which is refused with the setting's name. A setting marked *free* may change at any resume.
`files` is free so that a folder can be moved: the files in it must be the same, and that is checked.

Paths are seen from the directory in which the command is given, and kept as absolute paths in
`RUN/recipe.toml`.
"""


def main() -> None:
    TARGET.write_text(page(), encoding="utf-8")


def page() -> str:
    """The whole file."""
    sections: dict[str, list[Leaf]] = {}
    for leaf in leaves(Recipe):
        sections.setdefault(heading(leaf.path), []).append(leaf)
    parts = [HEAD]
    for name, settings in sections.items():
        rows = ["| setting | type | default | same run | meaning |", "|---|---|---|---|---|"]
        rows += [row(leaf) for leaf in settings]
        parts.append(f"## {name}\n\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def heading(path: str) -> str:
    section = path.rpartition(".")[0]
    return f"[[{section.removesuffix('[]')}]]" if section.endswith("[]") else f"[{section}]"


def row(leaf: Leaf) -> str:
    cells = [
        f"`{leaf.path.rpartition('.')[2]}`",
        kind(*declared(leaf.path)),
        default(leaf),
        "**fixed**" if leaf.identity else "free",
        leaf.help,
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def declared(path: str) -> tuple[dataclasses.Field[Any], Any]:
    """The field at a dotted path, and its type."""
    cls: Any = Recipe
    *sections, name = path.split(".")
    for part in sections:
        hint = get_type_hints(cls)[part.removesuffix("[]")]
        cls = get_args(hint)[0] if part.endswith("[]") else hint
    field = next(f for f in dataclasses.fields(cls) if f.name == name)
    return field, get_type_hints(cls)[name]


def kind(field: dataclasses.Field[Any], hint: Any) -> str:
    """What may be written there."""
    if field.metadata["choices"]:
        return ", ".join(f"`{choice}`" for choice in field.metadata["choices"])
    if type(None) in get_args(hint):
        hint = next(a for a in get_args(hint) if a is not type(None))
    parse: Callable[[Any], Any] | None = field.metadata["parse"]
    if hint is Duration:
        units = [unit for unit in ("steps", "tokens", "minutes") if accepts(parse, f"1 {unit}")]
        return f"duration in {', '.join(units)}"
    if get_origin(hint) is dict:
        return "table of numbers"
    if get_origin(hint) is list:
        return "string or list of strings"
    if hint is int and accepts(parse, "1Ki"):
        return 'count or `"auto"`' if accepts(parse, "auto") else "count"
    return {bool: "true or false", int: "whole number", float: "number", str: "string"}[hint]


def accepts(parse: Callable[[Any], Any] | None, text: str) -> bool:
    if parse is None:
        return False
    try:
        parse(text)
    except ValueError:
        return False
    return True


def default(leaf: Leaf) -> str:
    if leaf.default is MISSING:
        return "required"
    if leaf.default is None:
        return '`"auto"`' if accepts(declared(leaf.path)[0].metadata["parse"], "auto") else "left out"
    return f'`"{leaf.default}"`' if isinstance(leaf.default, (str, Duration)) else f"`{shown(leaf.default)}`"


if __name__ == "__main__":
    main()

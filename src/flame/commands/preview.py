"""`flame data preview`: the rows of some steps, exactly as training reads them."""

from __future__ import annotations

import json
import re
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flame.batch import Row
from flame.data.catalog import open_catalog
from flame.data.preview import preview as read_rows
from flame.data.tokens import Tokenizer
from flame.data.validation import row_limit, validation_data
from flame.errors import Exit, RecipeError
from flame.recipe import read_recipe

SHOWN_CHARACTERS = 60  # of each segment's text, in tables


def preview(path: str, flags: dict[str, str], steps: str, ranks: int, split: str, as_json: bool) -> Exit:
    """Prints the rows of `steps` ("A:B"), read through `ranks` readers, in the global order. `split`:
    "train", or "validation" for what is held out."""
    recipe = read_recipe(Path(path), flags)
    plan = recipe.plan
    wanted = parse_steps(steps)
    if ranks < 1:
        raise RecipeError(f"--ranks: found {ranks}, expected at least 1")
    catalog = open_catalog(recipe.data, recipe.tokenizer, plan, Path())
    tokenizer = catalog.load_tokenizer()
    most = None
    if split == "validation":
        catalog, plan = validation_data(catalog, plan)
        most = row_limit(plan, recipe.validation.tokens)
    for step, all_rows in zip(wanted, read_rows(catalog, plan, wanted, ranks), strict=True):
        rows = [row for row in all_rows if most is None or row.index < most]
        if as_json:
            listed = [[list(segment) for segment in row.segments] for row in rows]
            print(json.dumps({"step": step, "rows": listed}), flush=True)
        else:
            show_step(step, rows, tokenizer)
    return Exit.DONE


def parse_steps(text: str) -> range:
    """`A:B` as the steps from A up to B, `A` as one step."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    first = int(match[1]) if match else 0
    last = int(match[2]) if match and match[2] else first + 1
    if not match or last <= first:
        raise RecipeError(f'--steps: found "{text}", expected A:B with A below B, such as 0:10')
    return range(first, last)


def show_step(step: int, rows: list[Row], tokenizer: Tokenizer) -> None:
    """One step as a table: a line a segment."""
    table = Table(title=f"step {step}", title_justify="left")
    for column in ("row", "source", "epoch", "document", "tokens", "of which first", "text"):
        table.add_column(column, overflow="fold")
    for row in rows:
        start = 0
        for segment in row.segments:
            ids = row.tokens[start : start + segment.length]
            text = tokenizer.decode(ids[:SHOWN_CHARACTERS])[:SHOWN_CHARACTERS]
            cells = [row.index, segment.source, segment.epoch, segment.document_id, segment.length]
            table.add_row(*map(str, cells), str(segment.offset), repr(text)[1:-1])
            start += segment.length
        table.add_section()
    Console().print(table)

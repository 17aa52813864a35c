"""`flame data preview`: the rows of some steps, exactly as training reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flame.batch import Row
from flame.data.catalog import Catalog, open_catalog
from flame.data.plan import DataPlan
from flame.data.preview import preview as read_rows
from flame.data.tokens import Tokenizer
from flame.data.validation import open_validation, rows_of
from flame.errors import Exit, RecipeError
from flame.recipe import Recipe, read_recipe
from flame.train.rollback import Skipped, read_skipped

SHOWN_CHARACTERS = 60  # of each segment's text, in tables


def preview(
    path: str, flags: dict[str, str], steps: str, ranks: int, split: str, run: str | None, as_json: bool
) -> Exit:
    """Prints the rows of `steps` ("A:B"), read through `ranks` readers, in the global order. `split`:
    "train", or "validation" for what is held out. `run`: a run whose skipped rows are passed over."""
    recipe = read_recipe(Path(path), flags)
    plan = recipe.plan
    wanted = parse_steps(steps)
    if ranks < 1:
        raise RecipeError(f"--ranks: found {ranks}, expected at least 1")
    catalog = open_catalog(recipe.data, recipe.tokenizer, plan, Path())
    tokenizer = catalog.load_tokenizer()
    if split == "validation":  # one rank reads the set for all
        found = held_out_rows(recipe, catalog, plan, wanted)
    else:
        skipped = Skipped() if run is None else read_skipped(Path(run))
        found = trained_rows(catalog, plan, wanted, ranks, skipped)
    for step, rows in zip(wanted, found, strict=True):
        if as_json:
            print(json.dumps(step_as_json(step, rows)), flush=True)
        else:
            show_step(step, rows, tokenizer)
    return Exit.DONE


def trained_rows(
    catalog: Catalog, plan: DataPlan, steps: range, ranks: int, skipped: Skipped
) -> Iterator[list[Row]]:
    """The rows of some trained steps, of a run that passes over `skipped`."""
    data_steps = skipped.trained(steps)
    span = range(data_steps[0], data_steps[-1] + 1)
    shown = set(data_steps)
    for data_step, rows in zip(span, read_rows(catalog, plan, span, ranks), strict=True):
        if data_step in shown:
            yield rows


def held_out_rows(recipe: Recipe, catalog: Catalog, plan: DataPlan, steps: range) -> Iterator[list[Row]]:
    """The validation rows, as many at a time as a training step has; none where there are no more."""
    opened = open_validation(recipe.validation, recipe.data, recipe.tokenizer, catalog, plan, Path())
    size = plan.stages[0].rows_per_step
    rows = islice(rows_of(*opened), steps.start * size, steps.stop * size)
    for _ in steps:
        yield list(islice(rows, size))


def parse_steps(text: str) -> range:
    """`A:B` as the steps from A up to B, `A` as one step."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    first = int(match[1]) if match else 0
    last = int(match[2]) if match and match[2] else first + 1
    if not match or last <= first:
        raise RecipeError(f'--steps: found "{text}", expected A:B with A below B, such as 0:10')
    return range(first, last)


def step_as_json(step: int, rows: list[Row]) -> dict[str, Any]:
    """One step: its rows' segments, and where some token has no loss, how many have one in each segment."""
    shown: dict[str, Any] = {"step": step, "rows": [[list(s) for s in row.segments] for row in rows]}
    if any(row.trained is not None for row in rows):
        shown["with_loss"] = [[int(mask.sum()) for _, mask in masks_of(row)] for row in rows]
    return shown


def masks_of(row: Row) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each segment: its tokens, and which of them have a loss. The first is predicted by nothing."""
    ends = np.cumsum(row.lengths).tolist()
    for start, end in zip([0, *ends], ends, strict=False):
        mask = np.ones(end - start, dtype=bool) if row.trained is None else row.trained[start:end].copy()
        mask[0] = False
        yield row.tokens[start:end], mask


def show_text(ids: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer) -> Text:
    """The beginning of a segment's text; where some of it has no loss, the rest is in brackets, and bold."""
    ids, mask = ids[:SHOWN_CHARACTERS], mask[:SHOWN_CHARACTERS]
    mixed = not mask[1:].all()
    shown = Text()
    changes = np.flatnonzero(np.diff(mask, prepend=mask[:1])).tolist() if mixed else []
    for start, end in pairwise([0, *changes, len(ids)]):
        text = repr(tokenizer.decode(ids[start:end]))[1:-1]
        trained = mixed and bool(mask[start])
        shown.append(f"[{text}]" if trained else text, style="bold" if trained else "")
    return shown[: SHOWN_CHARACTERS + 2 * len(changes)]


def show_step(step: int, rows: list[Row], tokenizer: Tokenizer) -> None:
    """One step as a table: a line a segment."""
    table = Table(title=f"step {step}", title_justify="left")
    for column in ("row", "source", "epoch", "document", "tokens", "of which first", "with loss", "text"):
        table.add_column(column, overflow="fold")
    for row in rows:
        for segment, (ids, mask) in zip(row.segments, masks_of(row), strict=True):
            cells = [row.index, segment.source, segment.epoch, segment.document_id, segment.length]
            cells += [segment.offset, int(mask.sum())]
            table.add_row(*map(str, cells), show_text(ids, mask, tokenizer))
        padding = len(row.tokens) - int(row.lengths.sum())
        if padding:
            table.add_row(str(row.index), "", "", "padding", str(padding), "", "0", "")
        table.add_section()
    Console().print(table)

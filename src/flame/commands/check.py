"""`flame data check`: what a recipe's data hold, every record read once."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from flame.data.catalog import open_catalog
from flame.data.check import Report, SourceReport, check_sources
from flame.errors import Exit, RecipeError
from flame.recipe import Recipe, read_recipe

LINE_SECONDS = 5  # between lines of progress where there is no terminal


def check(path: str, flags: dict[str, str], processes: int | None, as_json: bool) -> Exit:
    """Scans all sources; exit code 1 where one holds no text, or something that cannot be read."""
    recipe = read_recipe(Path(path), flags)
    if processes is None:
        processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if processes < 1:
        raise RecipeError(f"--processes: found {processes}, expected at least 1")
    plan = recipe.plan
    catalog = open_catalog(recipe.data, recipe.tokenizer, plan, Path())
    with progress_of(sys.stderr.isatty()) as progress:
        report = check_sources(catalog, plan, processes, progress)
    steps = epoch_steps(recipe, report)
    if as_json:
        print(json.dumps(to_json(report, steps)))
    else:
        show(report, steps, plan.stages[0].sequence_length)
    wrong = [f'source "{s.name}": no valid record' for s in report.sources if not s.documents]
    wrong += [
        f'source "{s.name}": {s.unreadable} blocks cannot be read' for s in report.sources if s.unreadable
    ]
    for line in wrong:
        print(f"flame: {line}", file=sys.stderr)
    return Exit.WRONG_INPUT if wrong else Exit.DONE


@contextmanager
def progress_of(terminal: bool) -> Generator[Callable[[int, int], None]]:
    """Shows progress on standard error: a bar on a terminal, else a line now and then."""
    if terminal:
        columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("reading", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    last = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            print(f"{done} of {total} blocks ({100 * done / total:.0f} %)", file=sys.stderr, flush=True)

    yield line


def epoch_steps(recipe: Recipe, report: Report) -> list[float | None]:
    """Steps until a source has been read once, at its share of the tokens; None at weight 0."""
    weights = [source.weight for source in recipe.data.sources]
    shares = [weight / sum(weights) for weight in weights]
    per_step = recipe.batch.tokens_per_step
    return [
        source.tokens / (share * per_step) if share else None
        for source, share in zip(report.sources, shares, strict=True)
    ]


def to_json(report: Report, steps: list[float | None]) -> dict[str, Any]:
    sources: list[dict[str, Any]] = []
    for source, epoch in zip(report.sources, steps, strict=True):
        sources.append({**asdict(source), "lengths": histogram(source), "epoch_steps": epoch})
    shared = [{"sources": list(names), "texts": count} for names, count in report.shared.items()]
    whole = max((epoch for epoch in steps if epoch is not None), default=0.0)
    return {"sources": sources, "shared": shared, "epoch_steps": whole}


def histogram(source: SourceReport) -> dict[str, int]:
    """Documents by length in tokens: "128-255": 17."""
    return {f"{2**i}-{2 ** (i + 1) - 1}": n for i, n in enumerate(source.lengths) if n}


def show(report: Report, steps: list[float | None], sequence_length: int) -> None:
    table = Table(title="data", title_justify="left")
    for column in ("source", "documents", "tokens", "characters", "bad", "repeated", "over a row", "epoch"):
        table.add_column(column, justify="left" if column == "source" else "right", overflow="fold")
    for source, epoch in zip(report.sources, steps, strict=True):
        counts = (source.documents, source.tokens, source.characters, source.bad, source.duplicates)
        over = f"{100 * source.over_length / max(1, source.documents):.1f} %"
        shown = "never read" if epoch is None else f"{epoch:,.1f} steps"
        table.add_row(source.name, *(f"{count:,}" for count in counts), over, shown)
    console = Console()
    console.print(table)
    for source in report.sources:
        most = max(source.lengths)
        lines = [
            f"  {label:>19}  {count:>12,}  {'#' * round(30 * count / most)}"
            for label, count in histogram(source).items()
        ]
        print(
            "\n".join([f"{source.name}: documents by length in tokens (a row: {sequence_length:,})", *lines])
        )
        if source.held_out:
            print(f"  held out for validation: {source.held_out:,} documents, not counted above")
        for name in source.named:
            print(f"  bad: {name}")
    for (a, b), count in report.shared.items():
        print(f"{a} and {b} share {count:,} texts")
    known = [epoch for epoch in steps if epoch is not None]
    print(f"every source is read once after {max(known, default=0.0):,.1f} steps")

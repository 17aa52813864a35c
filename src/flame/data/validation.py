"""The documents that are held out of training, as rows packed like those of training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from flame.batch import Row
from flame.data.catalog import Catalog
from flame.data.loader import Loader
from flame.data.plan import DataPlan
from flame.data.sources import Source, cut
from flame.errors import DataError, RecipeError

ORDER_SEED = 0  # of the validation rows, whatever the run's: runs that differ in it can be compared


def validation_data(catalog: Catalog, plan: DataPlan) -> tuple[Catalog, DataPlan]:
    """What a `Loader` reads to give each held out document once: in an order that no seed changes, mixed by
    the sources' weights, in rows of the plan's first stage. Then it gives filler.

    A fraction is found by reading the sources. Raises RecipeError where nothing is held out by any setting.
    """
    by_files = any(source.validation for source in catalog.sources)
    if not plan.validation_fraction and not by_files:
        raise RecipeError(
            "nothing is held out for validation: set validation.fraction, or name its files in a source "
            '(validation = "...")'
        )
    weights = [max(stage.weights[i] for stage in plan.stages) for i in range(len(catalog.sources))]
    chosen = [
        (_held_out_of(source), weight)
        for source, weight in zip(catalog.sources, weights, strict=True)
        if weight and (source.validation or not by_files)
    ]
    if not chosen:
        raise RecipeError("validation: every source that has validation files has weight 0; set one above 0")
    stage = replace(plan.stages[0], weights=tuple(weight for _, weight in chosen))
    return (
        replace(catalog, sources=tuple(source for source, _ in chosen), joined={}, generations={}),
        replace(
            plan,
            seed=ORDER_SEED,
            lanes=1,
            stages=(stage,),
            max_epochs=(1,) * len(chosen),
            stops_at_source_end=False,
            validates=True,
        ),
    )


def _held_out_of(source: Source) -> Source:
    """A source of the files that hold validation documents, cut for one lane."""
    if not source.validation and source.blocks.each_document:
        return source  # its documents are the same blocks for any number of lanes
    source = replace(source, files=source.validation or source.files, validation=())
    return replace(source, blocks=cut(source.open(), len(source.files), 1))


def validation_rows(catalog: Catalog, plan: DataPlan, tokens: int | None = None) -> Iterator[Row]:
    """The rows of `validation_data` one after another; of `tokens`, as many rows as hold them (the last may
    have padding). Raises DataError where no document is held out."""
    held_out, single = validation_data(catalog, plan)
    most = row_limit(single, tokens)
    given = 0
    with Loader(held_out, single, 0, 1, 1, prefetch=False) as loader:
        while most is None or given < most:
            rows = [row for row in loader.next_step().rows if row.segments]
            if not rows:
                break
            yield from rows[: len(rows) if most is None else most - given]
            given += len(rows)
    if not given:
        raise DataError(
            f"validation: no document is held out of {', '.join(s.name for s in held_out.sources)}; raise "
            f"validation.fraction = {plan.validation_fraction}, or look at the validation files"
        )


def row_limit(plan: DataPlan, tokens: int | None) -> int | None:
    """The rows that hold so many tokens; None: all rows."""
    return None if tokens is None else -(-tokens // plan.stages[0].sequence_length)

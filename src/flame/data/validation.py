"""The documents that are held out of training, in file order, packed once into rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from flame.batch import Row
from flame.data.catalog import Catalog, open_catalog, open_readers
from flame.data.config import DataConfig, SourceConfig, TokenizerConfig, ValidationConfig
from flame.data.lanes import Lane
from flame.data.plan import WINDOW_TOKENS, DataPlan
from flame.data.sources import Source, cut
from flame.data.windows import Window
from flame.errors import DataError, RecipeError

ORDER_SEED = 0  # of the rows in a window, whatever the run's: runs that differ in it can be compared


def open_validation(
    config: ValidationConfig,
    data_config: DataConfig,
    tokenizer_config: TokenizerConfig,
    catalog: Catalog,
    plan: DataPlan,
    base: Path,
) -> tuple[Catalog, DataPlan]:
    """What `validation_windows` reads for a recipe, whose `catalog` and `plan` are the training's. Relative
    paths start at `base`. Raises RecipeError and DataError."""
    if not config.sources:
        return validation_data(catalog, plan, config.tokens)
    return own_validation_data(config.sources, data_config, tokenizer_config, plan, base, config.tokens)


def own_validation_data(
    sources: list[SourceConfig],
    data_config: DataConfig,
    tokenizer_config: TokenizerConfig,
    plan: DataPlan,
    base: Path,
    tokens: int | None = None,
) -> tuple[Catalog, DataPlan]:
    """The same of `sources` that no recipe trains: all of their documents, or the first `tokens`."""
    for source in sources:
        if source.max_epochs is not None or source.validation:
            name = "max_epochs" if source.max_epochs is not None else "validation"
            raise RecipeError(
                f'validation.sources: source "{source.name}": {name}: each of its documents is read once, '
                "and all are held out; leave it out"
            )
    held_out = replace(data_config, sources=sources, phases=[])
    single = _single_lane(plan, [source.weight for source in sources], tokens)
    single = replace(single, validation_fraction=0.0)
    return open_catalog(held_out, tokenizer_config, single, base), single


def validation_data(catalog: Catalog, plan: DataPlan, tokens: int | None = None) -> tuple[Catalog, DataPlan]:
    """What a lane reads to give each held out document once: those of a source in file order, the sources
    mixed by their weights, in rows of the plan's first stage; of `tokens`, the first so many.

    A fraction is found by reading the sources. Raises RecipeError where nothing is held out by any setting.
    """
    by_files = any(source.validation for source in catalog.sources)
    if not plan.validation_fraction and not by_files:
        raise RecipeError(
            "nothing is held out for validation: set validation.fraction or validation.sources, or name its "
            'files in a source (validation = "...")'
        )
    weights = [max(stage.weights[i] for stage in plan.stages) for i in range(len(catalog.sources))]
    chosen = [
        (_held_out_of(source), weight)
        for source, weight in zip(catalog.sources, weights, strict=True)
        if weight and (source.validation or not by_files)
    ]
    if not chosen:
        raise RecipeError("validation: every source that has validation files has weight 0; set one above 0")
    return (
        replace(catalog, sources=tuple(source for source, _ in chosen), joined={}, generations={}),
        _single_lane(plan, [weight for _, weight in chosen], tokens),
    )


def _single_lane(plan: DataPlan, weights: list[float], tokens: int | None) -> DataPlan:
    """One lane and one epoch; a window, which is packed as a whole, holds the set unless that is large."""
    length = plan.stages[0].sequence_length
    rows = max(1, WINDOW_TOKENS // length)
    if tokens is not None:
        rows = min(rows, row_limit(plan, tokens))
    first = {"first_window": 0, "first_step": 0, "first_row": 0, "first_token": 0}
    stage = replace(plan.stages[0], **first, weights=tuple(weights), rows_per_step=rows, window_steps=1)
    return replace(
        plan,
        seed=ORDER_SEED,
        lanes=1,
        stages=(stage,),
        max_epochs=(1,) * len(weights),
        stops_at_source_end=False,
        validates=True,
        most_tokens=tokens,
    )


def _held_out_of(source: Source) -> Source:
    """A source of the files that hold validation documents, cut for one lane."""
    if not source.validation and source.blocks.each_document:
        return source  # its documents are the same blocks for any number of lanes
    source = replace(source, files=source.validation or source.files, validation=())
    return replace(source, blocks=cut(source.open(), len(source.files), 1))


def validation_windows(catalog: Catalog, plan: DataPlan) -> Iterator[Window]:
    """The set, packed, of what `validation_data` or `open_validation` gave: a window after another, the last
    one with fewer rows than it has room for where there are no more documents.

    Raises DataError where no document is held out.
    """
    lane = Lane(plan, open_readers(catalog, plan), catalog.load_tokenizer(), 0)
    given = 0
    while True:
        window = lane.next_window()
        given += len(window.rows)
        if not given:
            names = ", ".join(source.name for source in catalog.sources)
            what = "look at the validation files"
            if plan.validation_fraction:
                what = f"raise validation.fraction = {plan.validation_fraction}"
            raise DataError(f"validation: no document is held out of {names}; {what}")
        yield window
        if len(window.rows) < window.size:
            return
        if plan.most_tokens is not None and given >= row_limit(plan, plan.most_tokens):
            return


def rows_of(catalog: Catalog, plan: DataPlan) -> Iterator[Row]:
    """The rows of `validation_windows` one after another, numbered from 0."""
    index = 0
    for window in validation_windows(catalog, plan):
        for number in range(len(window.rows)):
            yield window.rows.row(number, index)
            index += 1


def row_limit(plan: DataPlan, tokens: int) -> int:
    """The rows that hold so many tokens."""
    return -(-tokens // plan.stages[0].sequence_length)


def overlaps(training: Catalog, held_out: Catalog) -> list[str]:
    """A sentence for each validation source whose files are trained, too: the same path, or the same size and
    content at both ends."""
    notes: list[str] = []
    paths = {str(file.path): source.name for source in training.sources for file in source.files}
    contents = {(file.size, file.hash): source.name for source in training.sources for file in source.files}
    for source in held_out.sources:
        found = [
            (file, paths.get(str(file.path)) or contents.get((file.size, file.hash))) for file in source.files
        ]
        shared = [(file, name) for file, name in found if name is not None]
        if shared:
            more = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
            notes.append(
                f'validation.sources: source "{source.name}": {shared[0][0].path}{more} is also trained, by '
                f'source "{shared[0][1]}": its loss says nothing of text that was not seen'
            )
    return notes

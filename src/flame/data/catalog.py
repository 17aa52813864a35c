"""The catalog: all that the data plane knows of the data before it reads a row."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from flame.data import blocks
from flame.data.blocks import Blocks
from flame.data.cache import Access, Vocabulary
from flame.data.config import BYTES, DataConfig, SourceConfig, TokenizerConfig
from flame.data.plan import DataPlan, Stage, largest_divisor
from flame.data.raw import SourceFile
from flame.data.records import SEPARATOR, Shape
from flame.data.sample import sample_texts
from flame.data.shapes import shape_of
from flame.data.sources import Source, open_source
from flame.data.tokens import Tokenizer, check_backend, load_tokenizer
from flame.data.walk import SourceReader
from flame.errors import DataError, RecipeError

FORMAT_VERSION = 2  # of the order of the rows: another version is another stream
PACKING_RULES = {"window": "best fit decreasing", "document": "whole documents, best fit decreasing"}
CHECKED_CHARACTERS = 1_000_000  # of the recipe's own, on which a faster tokenizer must give equal ids
FIRST_RECORDS = 1000  # of a source, before a share of bad records says anything


@dataclass(frozen=True, slots=True)
class Catalog:
    """Files, blocks and tokenizer of a recipe, checked. Picklable: it travels from rank 0 to the others."""

    sources: tuple[Source, ...]
    tokenizer_path: Path
    bos: bool
    tokenizer_identity: dict[str, Any]
    vocab_size: int  # the tokenizer's largest id + 1
    tokenizer_backend: str = "tokenizers"
    joined: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    # by source and file: the first epoch of files that joined while the source was read
    generations: dict[str, list[tuple[int, Blocks]]] = field(default_factory=dict[str, Any])
    # of those sources: their blocks from an epoch on

    @property
    def notes(self) -> list[str]:
        """What was chosen without being asked, a sentence each, for the log."""
        return [note for source in self.sources for note in source.notes]

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer, opened. Raises DataError."""
        return load_tokenizer(self.tokenizer_path, self.bos, self.tokenizer_backend)


def open_readers(catalog: Catalog, plan: DataPlan) -> list[SourceReader]:
    """A reader for each source."""
    return [
        SourceReader(source, plan, max_epochs, catalog.generations.get(source.name, ()))
        for source, max_epochs in zip(catalog.sources, plan.max_epochs, strict=True)
    ]


def open_catalog(
    data_config: DataConfig, tokenizer_config: TokenizerConfig, plan: DataPlan, base: Path
) -> Catalog:
    """List, index and check all data. Relative paths start at `base`.

    Raises RecipeError for settings that cannot be and DataError for data that cannot be trained on.
    """
    _check_settings(data_config.sources)
    tokenizer_path, backend = Path(tokenizer_config.path), tokenizer_config.backend
    if tokenizer_config.path != BYTES:
        tokenizer_path = base / tokenizer_path.expanduser()
    tokenizer = load_tokenizer(tokenizer_path, tokenizer_config.bos, backend)
    vocabulary = Vocabulary(tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id)
    shapes = [shape_of(config, base, tokenizer_path, tokenizer) for config in data_config.sources]
    sources = _open_checked(data_config, data_config.sources, shapes, plan, base, vocabulary)
    for source in sources:
        _check_lanes(source, plan)
    if backend != "tokenizers":
        check_backend(tokenizer_path, backend, list(sample_texts(sources, CHECKED_CHARACTERS)))
    identity = tokenizer.identity()
    bos = tokenizer_config.bos
    return Catalog(sources, tokenizer_path, bos, identity, tokenizer.vocab_size, backend)


def open_sources(data_config: DataConfig, plan: DataPlan, base: Path) -> tuple[Source, ...]:
    """The sources of text of a recipe alone, which need no tokenizer. Raises RecipeError and DataError."""
    _check_settings(data_config.sources)
    configs = [config for config in data_config.sources if not config.ids]
    if not configs:
        raise RecipeError("data.sources: every source holds token ids, and none the text that this needs")
    return _open_checked(data_config, configs, [shape_of(c, base) for c in configs], plan, base, None)


def _open_checked(
    data_config: DataConfig,
    configs: list[SourceConfig],
    shapes: list[Shape | None],
    plan: DataPlan,
    base: Path,
    vocabulary: Vocabulary | None,
) -> tuple[Source, ...]:
    access = Access(
        data_config.cache_directory and str(base / Path(data_config.cache_directory).expanduser()),
        data_config.cache_bytes,
        data_config.skip_corrupt_blocks,
        vocabulary,
    )
    return tuple(
        open_source(config, base, plan.lanes, access, shape)
        for config, shape in zip(configs, shapes, strict=True)
    )


def _check_settings(configs: list[SourceConfig]) -> None:
    if not configs:
        raise RecipeError("data.sources: found none, expected at least one [[data.sources]] table")
    names = [config.name for config in configs]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise RecipeError(f'data.sources: two sources are called "{double}": give each a name of its own')
    for config in configs:
        if not (math.isfinite(config.weight) and config.weight >= 0):
            raise RecipeError(
                f'data.sources: source "{config.name}": weight: found {config.weight}, expected 0 or more'
            )
    if not any(config.weight for config in configs):
        raise RecipeError("data.sources: every weight is 0, so no source gives tokens; set one above 0")


def _check_lanes(source: Source, plan: DataPlan) -> None:
    count = len(source.blocks)
    if count >= plan.lanes:
        return
    what = "documents" if source.blocks.each_document else "blocks"
    works = largest_divisor(math.gcd(*(stage.rows_per_step for stage in plan.stages)), count)
    raise DataError(
        f'source "{source.name}": {source.files[0].path}: {count} {what} are too few for '
        f"{plan.lanes} lanes; set data.lanes = {works} (the largest that works) or add documents"
    )


# --------------------------------------------------------------------------------- fingerprint


def fingerprint(catalog: Catalog, plan: DataPlan) -> dict[str, Any]:
    """All that the stream of rows depends on, JSON-able. Equal fingerprints: the same rows."""
    return {
        "format_version": FORMAT_VERSION,
        "seed": plan.seed,
        "lanes": plan.lanes,
        "stages": [stage_print(stage, [source.name for source in catalog.sources]) for stage in plan.stages],
        "at_source_end": "stop" if plan.stops_at_source_end else "redistribute",
        "group_blocks": plan.group_blocks,
        "blocks": blocks.RULE,
        "packing": PACKING_RULES[plan.packing],
        **({"overlong": plan.overlong} if plan.overlong != "cut" else {}),
        **({"validation_fraction": plan.validation_fraction} if plan.validation_fraction else {}),
        "tokenizer": catalog.tokenizer_identity,
        "sources": [
            {
                "name": source.name,
                "max_epochs": max_epochs,
                "format": source.format,
                "text": source.field.replace(SEPARATOR, ", "),
                "files": [
                    _file_print(file) | ({"first_epoch": joined[file.name]} if file.name in joined else {})
                    for file in source.files
                ],
            }
            | (source.shape.identity() if source.shape is not None else {})
            | ({"validation": [_file_print(file) for file in source.validation]} if source.validation else {})
            for source, max_epochs in zip(catalog.sources, plan.max_epochs, strict=True)
            for joined in [catalog.joined.get(source.name, {})]
        ],
    }


def _file_print(file: SourceFile) -> dict[str, Any]:
    return {"name": file.name, "size": file.size, "hash": file.hash}


def stage_print(stage: Stage, sources: list[str]) -> dict[str, Any]:
    """A stage's part of the fingerprint."""
    return {
        "first_step": stage.first_step,
        "sequence_length": stage.sequence_length,
        "rows_per_step": stage.rows_per_step,
        "window_steps": stage.window_steps,
        "max_document_length": stage.max_document_length,
        "weights": dict(zip(sources, stage.weights, strict=True)),
    }


def fingerprint_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first field that differs, with both values; None where the data are the same."""
    # through JSON, so that what was read from a file compares equal to what was just made
    for path, before, after in _differences(json.loads(json.dumps(old)), json.loads(json.dumps(new)), ""):
        return f"{path}: {_shown(before)} when the run began, {_shown(after)} now"
    return None


_ABSENT = object()


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _differences(old: Any, new: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        left, right = cast("dict[str, Any]", old), cast("dict[str, Any]", new)
        for key in dict.fromkeys([*left, *right]):
            place = f"{path}.{key}".lstrip(".")
            yield from _differences(left.get(key, _ABSENT), right.get(key, _ABSENT), place)
    elif isinstance(old, list) and isinstance(new, list):
        before, after = cast("list[Any]", old), cast("list[Any]", new)
        for i in range(max(len(before), len(after))):
            pair = [side[i] if i < len(side) else _ABSENT for side in (before, after)]
            yield from _differences(pair[0], pair[1], f"{path}[{_name(pair, i)}]")
    elif old is _ABSENT or new is _ABSENT or old != new:
        yield path, old, new


def _name(pair: list[Any], index: int) -> str:
    """How a difference calls an element of a list: by its name where both sides have the same."""
    names = [cast("dict[str, Any]", side).get("name") for side in pair if isinstance(side, dict)]
    return str(names[0]) if len(names) == 2 and names[0] and names[0] == names[1] else str(index)


def check_skipped(catalog: Catalog, records_total: np.ndarray, max_fraction: float) -> None:
    """Stop a run whose data are bad. `records_total`: int64 [sources, 4], as in
    flame.batch.StepRows, summed over all ranks and steps. Raises DataError naming the source."""
    for source, (records, skipped, *_) in zip(catalog.sources, records_total.tolist(), strict=True):
        if records >= FIRST_RECORDS and skipped > max_fraction * records:
            raise DataError(
                f'source "{source.name}": {skipped} of {records} records hold no text, more than '
                f"data.max_skipped_fraction = {max_fraction}; logs/skipped-records.jsonl names them. Mend "
                "the data or raise the limit"
            )

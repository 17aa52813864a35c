"""The validation set in memory: its rows, what they hold of each source, and their micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from flame.batch import IGNORED, HeldOutBatch, Row
from flame.data.catalog import Catalog
from flame.data.loader import make_batch
from flame.data.plan import DataPlan
from flame.data.token_bytes import token_bytes
from flame.data.validation import validation_windows

TOKENS, DOCUMENTS, PREDICTED, TEXT_BYTES = range(4)  # the columns of `ValidationSet.counts`


@dataclass(frozen=True)
class ValidationSet:
    """Rows of held out documents; about 5 bytes a token. Picklable: it travels from rank 0 to the others."""

    sources: tuple[str, ...]
    length: int  # L, tokens in a row
    counts: (
        np.ndarray
    )  # int64 [sources, 4], of the whole set: tokens, documents that begin, predicted tokens,
    # and the bytes of the text of these
    records_skipped: int  # that hold no text
    total_rows: int  # of the whole set
    rows: tuple[Row, ...]  # of `share`, those of one rank; the index of a row is its number in the set
    row_sources: tuple[np.ndarray, ...]  # int64 [segments]: the source of each segment of a row
    passes: int = 0  # micro-batches, as many on every rank
    micro_batch_rows: int = 1

    def share(self, rank: int, ranks: int, micro_batch_rows: int) -> ValidationSet:
        """The part of one data-parallel rank: every `ranks`-th row."""
        most = -(-self.total_rows // ranks)
        return replace(
            self,
            rows=self.rows[rank::ranks],
            row_sources=self.row_sources[rank::ranks],
            passes=-(-most // micro_batch_rows),
            micro_batch_rows=micro_batch_rows,
        )

    def batches(self) -> Iterator[HeldOutBatch]:
        """The micro-batches of a share; missing rows are filler."""
        size, length = self.micro_batch_rows, self.length
        filler = Row(-1, np.zeros(length, dtype=np.int32), np.zeros(0, dtype=np.int64))
        for first in range(0, self.passes * size, size):
            rows = list(self.rows[first : first + size])
            sources = np.full((size, length), -1, dtype=np.int64)
            for i, row in enumerate(rows):
                named = np.repeat(self.row_sources[first + i], row.lengths)
                sources[i, : len(named)] = named
            rows += [filler] * (size - len(rows))
            yield HeldOutBatch(make_batch(rows), [row.index for row in rows], sources)


def read_validation_set(catalog: Catalog, plan: DataPlan) -> ValidationSet:
    """The whole set of what `open_validation` gave. Raises DataError where a file cannot be read or no
    document is held out."""
    names = tuple(source.name for source in catalog.sources)
    sizes = token_bytes(catalog.load_tokenizer())
    counts = np.zeros((len(names), 4), dtype=np.int64)
    rows: list[Row] = []
    row_sources: list[np.ndarray] = []
    skipped = 0
    for window in validation_windows(catalog, plan):
        packed = window.rows
        skipped += int(window.records[:, 1].sum())
        counts[:, [TOKENS, DOCUMENTS]] += packed.sources[:, :, :2].sum(axis=0)
        for number in range(len(packed)):
            named = packed.row(number, len(rows))
            row = Row(named.index, named.tokens.copy(), named.lengths.copy(), trained=named.trained)
            first, last = packed.bounds[number], packed.bounds[number + 1]
            of_segments = packed.documents.sources(packed.segments[first:last, 0])
            _count(row, of_segments, sizes, counts)
            rows.append(row)
            row_sources.append(of_segments)
    return ValidationSet(
        names,
        plan.stages[0].sequence_length,
        counts,
        skipped,
        len(rows),
        tuple(rows),
        tuple(row_sources),
    )


def _count(row: Row, of_segments: np.ndarray, sizes: np.ndarray, counts: np.ndarray) -> None:
    """Adds a row's predicted tokens and their bytes."""
    labels = make_batch([row]).labels.numpy()[0]
    named = np.repeat(of_segments, row.lengths)
    labels = labels[: len(named)]
    predicted = labels != IGNORED
    for source in range(len(counts)):
        mine = labels[predicted & (named == source)]
        counts[source, PREDICTED] += len(mine)
        counts[source, TEXT_BYTES] += sizes[mine].sum()

"""A sample of a recipe's documents: spread evenly over every source, by weight, the same each time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from flame.data.formats import text_of
from flame.data.sources import Source

GOLDEN = (math.sqrt(5) - 1) / 2
LEAST_BLOCKS = 64  # that a source's share of the sample comes from, where it is cut into as many


def sample_texts(sources: Sequence[Source], characters: int) -> Iterator[str]:
    """Texts of about `characters` in all, each source's share by its weight; less where there is less.

    Long texts are cut to what is still wanted. Sources of token ids give none. Raises DataError on what
    cannot be read.
    """
    sources = [source for source in sources if not source.holds_ids]
    total = sum(source.weight for source in sources) or 1.0
    for source in sources:
        yield from _texts(source, int(characters * source.weight / total))


def _texts(source: Source, characters: int) -> Iterator[str]:
    reader, cut = source.open(), source.blocks
    from_a_block = -(-characters // LEAST_BLOCKS)
    for visited, block in enumerate(spread(len(cut))):
        even = max(from_a_block, -(-characters // (len(cut) - visited)))
        wanted = characters if cut.each_document else min(characters, even)
        where = int(cut.file[block]), int(cut.start[block]), int(cut.stop[block])
        for _, content in reader.read(*where):
            if wanted <= 0:
                break
            text = text_of(reader, content)
            if not isinstance(text, str):
                continue
            text = text[:wanted]
            wanted -= len(text)
            characters -= len(text)
            yield text
        if characters <= 0:
            return


def spread(count: int) -> np.ndarray:
    """range(count) in an order of which every beginning is spread evenly over the whole: int64.

    The multiples of the golden ratio, modulo one, leave no large gap at any time; these are their ranks.
    """
    points = np.arange(count, dtype=np.int64) * GOLDEN % 1.0
    order = np.empty(count, dtype=np.int64)
    order[np.argsort(points, kind="stable")] = np.arange(count)
    return order

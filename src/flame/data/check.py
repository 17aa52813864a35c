"""`flame data check` at work: every record of every source read once, in parallel processes."""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations, islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from flame.data.catalog import Catalog
from flame.data.formats import Bad, Format, text_of
from flame.data.plan import DataPlan
from flame.data.split import content_key, is_key_held_out
from flame.data.tokens import Tokenizer, split_text
from flame.errors import DataError

TASK_UNITS = {True: 1024, False: 1}  # blocks that a process takes at once: documents, or ranges of megabytes
ENCODED_CHARACTERS = 2**21  # tokenized in one call
NAMED = 5  # bad records and unreadable blocks of a source that are named
POWERS = 40  # of two: the classes of the histogram of lengths
PARTITIONS = 64  # of the hashes: as little as that at a time is sorted in memory
HELD_HASHES = 2**22  # in memory, before they go to disk

COUNTS = ("records", "documents", "tokens", "characters", "over_length", "bad", "held_out", "unreadable")


@dataclass
class SourceReport:
    """What one source holds. Tokens count EOS (and BOS); a document is a record that holds text."""

    name: str
    records: int = 0
    documents: int = 0
    tokens: int = 0
    characters: int = 0  # none of token ids
    over_length: int = 0  # documents longer than a row
    lengths: list[int] = field(default_factory=lambda: [0] * POWERS)  # [i]: documents of 2^i to 2^(i+1) - 1
    bad: int = 0  # records without text
    held_out: int = 0  # documents for validation, counted nowhere else here but among the duplicates
    unreadable: int = 0  # blocks that cannot be read at all
    named: list[str] = field(default_factory=list[str])  # the first of both: file, place, reason
    duplicates: int = 0  # documents whose whole text an earlier one of this source has

    def add(self, other: SourceReport) -> None:
        """Count in what comes next in the source."""
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.lengths = [a + b for a, b in zip(self.lengths, other.lengths, strict=True)]
        self.named = (self.named + other.named)[:NAMED]


@dataclass(frozen=True, slots=True)
class Report:
    sources: list[SourceReport]
    shared: dict[tuple[str, str], int]  # distinct texts that two sources both hold


def check_sources(
    catalog: Catalog, plan: DataPlan, processes: int, progress: Callable[[int, int], None]
) -> Report:
    """Read all sources. `progress`: called with (blocks done, blocks in all).

    What cannot be read is counted and named, not raised. Raises DataError where a process dies.
    """
    reports = [SourceReport(source.name) for source in catalog.sources]
    total, done = sum(len(source.blocks) for source in catalog.sources), 0
    with tempfile.TemporaryDirectory(prefix="flame-check-") as folder:
        hashes = Hashes(Path(folder), len(reports))
        for source, blocks, found, texts in _scan(catalog, plan, processes):
            reports[source].add(found)
            hashes.add(source, texts)
            done += blocks
            progress(done, total)
        within, shared = hashes.count()
    for report, repeated in zip(reports, within, strict=True):
        report.duplicates = repeated
    named = {(reports[a].name, reports[b].name): n for (a, b), n in shared.items()}
    return Report(reports, named)


# ----------------------------------------------------------------------------------- processes

Task = tuple[int, int, int]  # source, first block, end
Result = tuple[int, int, SourceReport, np.ndarray]  # source, blocks, findings, hashes of the texts


def _tasks(catalog: Catalog) -> Iterator[Task]:
    for number, source in enumerate(catalog.sources):
        count, size = len(source.blocks), TASK_UNITS[source.blocks.each_document]
        for first in range(0, count, size):
            yield number, first, min(count, first + size)


def _scan(catalog: Catalog, plan: DataPlan, processes: int) -> Iterator[Result]:
    """The results of all tasks in order, some of them computed ahead."""
    tasks = _tasks(catalog)
    if processes == 1:
        scanner = Scanner(catalog, plan)
        yield from map(scanner, tasks)
        return
    with ProcessPoolExecutor(
        processes, get_context("spawn"), initializer=_begin, initargs=(catalog, plan)
    ) as pool:
        ahead: deque[Future[Result]] = deque()
        for task in islice(tasks, 4 * processes):
            ahead.append(pool.submit(_scan_one, task))
        try:
            while ahead:
                result = ahead.popleft().result()
                for task in islice(tasks, 1):
                    ahead.append(pool.submit(_scan_one, task))
                yield result
        except BrokenExecutor as error:
            raise DataError(
                f"data check: a scanning process ended ({error}); with little memory try fewer --processes"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_scanners: list[Scanner] = []  # the one of this process


def _begin(catalog: Catalog, plan: DataPlan) -> None:
    os.environ["RAYON_NUM_THREADS"] = "1"  # there is a process for each core already
    _scanners[:] = [Scanner(catalog, plan)]


def _scan_one(task: Task) -> Result:
    return _scanners[0](task)


class Scanner:
    """Reads blocks and counts what they hold."""

    def __init__(self, catalog: Catalog, plan: DataPlan) -> None:
        self._catalog, self._sequence_length = catalog, plan.stages[0].sequence_length
        self._fraction = plan.validation_fraction
        self._tokenizer: Tokenizer = catalog.load_tokenizer()
        self._readers: dict[int, Format] = {}

    def __call__(self, task: Task) -> Result:
        number, first, end = task
        source = self._catalog.sources[number]
        if number not in self._readers:
            self._readers[number] = source.open()
        reader, report = self._readers[number], SourceReport(source.name)
        texts: list[str | np.ndarray] = []
        hashes: list[int] = []
        held = 0
        for block in range(first, end):
            file = int(source.blocks.file[block])
            where = int(source.blocks.start[block]), int(source.blocks.stop[block])
            try:
                read = reader.read(file, *where)
            except DataError as error:
                report.unreadable += 1
                report.named = [*report.named, str(error)][:NAMED]
                continue
            report.records += len(read)
            for position, content in read:
                text = text_of(reader, content)
                if isinstance(text, Bad):
                    report.bad += 1
                    if len(report.named) < NAMED:
                        place = reader.place(file, position)
                        report.named.append(f"{source.files[file].path}, {place}: {text.reason}")
                    continue
                hashes.append(content_key(text))
                if is_key_held_out(hashes[-1], self._fraction):
                    report.held_out += 1
                    continue
                texts.append(text)
                held += len(text)
                if held > ENCODED_CHARACTERS:
                    self._measure(texts, report)
                    texts.clear()
                    held = 0
        self._measure(texts, report)
        return number, end - first, report, np.array(hashes, dtype=np.uint64)

    def _measure(self, documents: Sequence[str | np.ndarray], report: SourceReport) -> None:
        """Count documents, characters, tokens and lengths in."""
        if not documents:
            return
        texts = [text for text in documents if isinstance(text, str)]
        added = 1 + (self._tokenizer.bos_id is not None)
        of_ids = [len(ids) + added for ids in documents if not isinstance(ids, str)]
        lengths = np.concatenate([self._text_lengths(texts), np.array(of_ids, dtype=np.int64)])
        report.documents += len(documents)
        report.characters += sum(map(len, texts))
        report.tokens += int(lengths.sum())
        report.over_length += int((lengths > self._sequence_length).sum())
        classes = np.bincount(np.log2(lengths).astype(np.int64), minlength=POWERS)
        report.lengths = [a + int(b) for a, b in zip(report.lengths, classes, strict=True)]

    def _text_lengths(self, texts: list[str]) -> np.ndarray:
        """The tokens of each text: int64 [texts]."""
        if not texts:
            return np.zeros(0, dtype=np.int64)
        split = [split_text(text) for text in texts]
        parts = [part for parts in split for part in parts]
        stops = np.cumsum([len(parts) for parts in split])
        begins, ends = np.zeros((2, len(parts)), dtype=bool)
        begins[[0, *stops[:-1]]] = ends[stops - 1] = True
        _, found = self._tokenizer.encode_parts(parts, begins.tolist(), ends.tolist())
        return np.diff(found[stops - 1], prepend=0)


# ---------------------------------------------------------------------------------- duplicates


class Hashes:
    """64-bit hashes of texts by source, on disk in partitions, so that memory stays bounded."""

    def __init__(self, folder: Path, sources: int) -> None:
        self._folder, self._sources = folder, sources
        self._held: dict[int, list[np.ndarray]] = {}
        self._count = 0

    def add(self, source: int, hashes: np.ndarray) -> None:
        """`hashes`: uint64 [documents]."""
        self._held.setdefault(source, []).append(hashes)
        self._count += len(hashes)
        if self._count >= HELD_HASHES:
            self._write()

    def _write(self) -> None:
        for source, held in self._held.items():
            hashes = np.concatenate(held)
            partition = (hashes % np.uint64(PARTITIONS)).astype(np.int64)
            hashes = hashes[np.argsort(partition, kind="stable")]
            ends = np.cumsum(np.bincount(partition, minlength=PARTITIONS))
            for p, part in enumerate(np.split(hashes, ends[:-1])):
                with (self._folder / f"{source}-{p}").open("ab") as file:
                    file.write(part.tobytes())
        self._held.clear()
        self._count = 0

    def count(self) -> tuple[list[int], dict[tuple[int, int], int]]:
        """Repeated documents within each source, and distinct texts that two sources share."""
        self._write()
        within = [0] * self._sources
        shared: dict[tuple[int, int], int] = {}
        for p in range(PARTITIONS):
            distinct: list[np.ndarray] = []
            for source in range(self._sources):
                path = self._folder / f"{source}-{p}"
                held = np.frombuffer(path.read_bytes() if path.exists() else b"", dtype=np.uint64)
                distinct.append(np.unique(held))
                within[source] += len(held) - len(distinct[-1])
            for a, b in combinations(range(self._sources), 2):
                both = len(np.intersect1d(distinct[a], distinct[b], assume_unique=True))
                if both:
                    shared[a, b] = shared.get((a, b), 0) + both
        return within, shared

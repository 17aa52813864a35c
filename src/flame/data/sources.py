"""Sources: which files a recipe's globs name, in which order, and how they are read."""

from __future__ import annotations

import glob
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from flame.data import blocks as cutting
from flame.data.blocks import Blocks
from flame.data.config import SourceConfig
from flame.data.formats import Format, file_size
from flame.data.lines import JsonLines, PlainText
from flame.data.tables import Parquet
from flame.errors import DataError, nearest

# A new format is a class and its line here.
FORMATS: dict[str, type[Format]] = {"jsonl": JsonLines, "parquet": Parquet, "text": PlainText}
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".txt": "text"}
SUPPORTED = "supported: .jsonl, .parquet, .txt, and other files of plain UTF-8 text (a document each)"
# Named here because they could pass for plain text and are not one document.
CONTAINERS = (".json", ".csv", ".tsv", ".arrow", ".gz", ".zst", ".bz2", ".xz", ".zip", ".tar")

HASHED = 64 * 2**10  # bytes at a file's head and tail
DEFAULT_FIELDS = ("text", "content")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of a source. `name` is relative to the globs' fixed prefix: a moved folder is the same data."""

    name: str
    path: Path
    size: int  # in bytes
    hash: str  # of its first and last 64 KiB


@dataclass(frozen=True, slots=True)
class Source:
    """One source, cut into blocks."""

    name: str
    weight: float  # its share of the tokens
    format: str
    field: str  # that holds the text; "" where a file is the text
    files: tuple[SourceFile, ...]
    blocks: Blocks
    notes: tuple[str, ...]  # what was chosen without being asked, for the log

    def open(self) -> Format:
        """A reader of the source's files."""
        return FORMATS[self.format]([file.path for file in self.files], self.field)


def open_source(config: SourceConfig, base: Path, lanes: int) -> Source:
    """List, check and cut a source. Raises DataError naming the source and the file or pattern."""
    found = list_files(config, base)
    format_name = _format_of(config.name, [path for _, path in found])
    sized = [(name, path, file_size(path)) for name, path in found]
    notes: list[str] = []
    empty = [path for _, path, size in sized if not size]
    if empty and (format_name != "text" or len(empty) == len(sized)):
        raise DataError(f'source "{config.name}": {empty[0]}: the file is empty; remove it or put it back')
    if empty:
        notes.append(f'source "{config.name}": {len(empty)} empty files hold no document')
    files = tuple(SourceFile(name, path, size, ends_hash(path, size)) for name, path, size in sized if size)
    paths = [file.path for file in files]
    field = _choose_field(config, FORMATS[format_name], paths[0])
    if field and config.text is None and field != DEFAULT_FIELDS[0]:
        notes.append(f'source "{config.name}": the text is field "{field}"')
    source_blocks = cut(FORMATS[format_name](paths, field), paths, lanes)
    if not len(source_blocks):
        raise DataError(f'source "{config.name}": {paths[0]}: no documents in its {len(paths)} file(s)')
    return Source(config.name, config.weight, format_name, field, files, source_blocks, tuple(notes))


def cut(reader: Format, paths: list[Path], lanes: int) -> Blocks:
    """The blocks of a source: its documents where it is small, else ranges of equal size."""
    total = sum(reader.decoded_bytes(file) for file in range(len(paths)))
    if total < cutting.INDEX_BELOW:
        return cutting.join([reader.documents(file) for file in range(len(paths))], each_document=True)
    size = cutting.block_bytes(total, lanes)
    return cutting.join([reader.ranges(file, size) for file in range(len(paths))], each_document=False)


# --------------------------------------------------------------------------------------- files


def list_files(config: SourceConfig, base: Path) -> list[tuple[str, Path]]:
    """(name, path) of every file, in byte order of the names. A directory stands for what it holds
    in the supported formats, at any depth."""
    prefixes: list[str] = []
    found: set[str] = set()
    for pattern in config.files:
        whole = os.path.abspath(base / Path(pattern).expanduser())  # noqa: PTH100 (links keep their names)
        paths, prefix = _expand(whole)
        if not paths:
            what = "holds no file that can be read" if Path(whole).is_dir() else "no such file"
            if glob.has_magic(whole):
                what = "no file matches"
            hint = SUPPORTED if Path(whole).is_dir() else f"relative paths start at {base}"
            raise DataError(f'source "{config.name}": files = "{pattern}": {what}; {hint}')
        prefixes.append(prefix)
        found.update(paths)
    root = os.path.commonpath(prefixes)
    named = [(os.path.relpath(path, root).replace(os.sep, "/"), Path(path)) for path in found]
    return sorted(named, key=lambda item: os.fsencode(item[0]))


def _expand(whole: str) -> tuple[list[str], str]:
    """The files that an absolute pattern names, and its fixed prefix."""
    path = Path(whole)
    if path.is_dir():
        held = _glob(f"{glob.escape(whole)}/**/*")
        return [name for name in held if Path(name).suffix.lower() in SUFFIXES], whole
    if path.is_file():  # also one whose name looks like a pattern
        return [whole], str(path.parent)
    if not glob.has_magic(whole):
        return [], str(path.parent)
    fixed: list[str] = []
    for part in path.parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return _glob(whole), str(Path(*fixed))


def _glob(pattern: str) -> list[str]:
    """The files that match, hidden ones left out as a shell does."""
    found = glob.glob(pattern, recursive=True)  # noqa: PTH207 (Path.glob takes hidden files too)
    return [name for name in found if Path(name).is_file()]


def ends_hash(path: Path, size: int) -> str:
    """A hash of the first and last 64 KiB of a file."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            digest.update(file.read(HASHED))
            file.seek(max(0, size - HASHED))
            digest.update(file.read(HASHED))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    return digest.hexdigest()


# ----------------------------------------------------------------------------- format and field


def _format_of(source: str, paths: list[Path]) -> str:
    formats = {path: SUFFIXES.get(path.suffix.lower()) or _sniff(source, path) for path in paths}
    first = paths[0]
    other = next((path for path in paths if formats[path] != formats[first]), None)
    if other is not None:
        raise DataError(
            f'source "{source}": {first} is {formats[first]}, {other} is {formats[other]}: '
            "give each format a source of its own"
        )
    return formats[first]


def _sniff(source: str, path: Path) -> str:
    """`text` for a file of another suffix that looks like it: no null bytes, no known container."""
    try:
        with path.open("rb") as file:
            head = file.read(HASHED)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if path.suffix.lower() in CONTAINERS or b"\0" in head:
        kind = f"unsupported suffix {path.suffix}" if path.suffix else "not plain text"
        raise DataError(f'source "{source}": {path}: {kind}; {SUPPORTED}')
    return "text"


def _choose_field(config: SourceConfig, reader: type[Format], path: Path) -> str:
    fields = reader.fields(path)
    if fields is None:
        return ""
    wanted = DEFAULT_FIELDS if config.text is None else (config.text,)
    chosen = next((name for name in wanted if name in fields), None)
    if chosen is None:
        names = " or ".join(f'"{name}"' for name in wanted)
        found = f"{nearest(wanted[0], fields)}found: {', '.join(fields) or 'none'}"
        raise DataError(
            f'source "{config.name}": {path}: no text field {names}; {found}; set text = "..." in this source'
        )
    return chosen


def document_id(file_name: str, position: int, part: int | None) -> str:
    """`<file>:<byte offset or row>`, and `#<part>` where the text was split."""
    return f"{file_name}:{position}" if part is None else f"{file_name}:{position}#{part}"

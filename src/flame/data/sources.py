"""Sources: which files a recipe's globs name, in which order, and how they are read."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from flame.data import blocks as cutting
from flame.data.blocks import Blocks
from flame.data.cache import LOCAL, Access
from flame.data.compressed import compression
from flame.data.config import SourceConfig
from flame.data.files import look, open_raw
from flame.data.formats import Format
from flame.data.id_tables import ArrowIds, ParquetIds
from flame.data.ids import FlatBin, Megatron, Npy, index_path, look_with_index
from flame.data.lines import JsonLines, PlainText
from flame.data.paragraphs import Paragraphs
from flame.data.raw import HASHED, SourceFile, is_url
from flame.data.records import SEPARATOR, ArrowRecords, ParquetRecords, Shape, Shaped, columns_of
from flame.data.remote import list_url, url_exists
from flame.data.saved import ArrowTable, hub_files, saved_files
from flame.data.tables import Parquet
from flame.errors import DataError, RecipeError, nearest

# A new format is a class and its line here.
FORMATS: dict[str, type[Format]] = {
    "jsonl": JsonLines,
    "parquet": Parquet,
    "arrow": ArrowTable,
    "parquet records": ParquetRecords,
    "arrow records": ArrowRecords,
    "text": PlainText,
    "paragraphs": Paragraphs,
    "parquet ids": ParquetIds,
    "arrow ids": ArrowIds,
    "npy ids": Npy,
    "flat ids": FlatBin,
    "megatron ids": Megatron,
}
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}
SUPPORTED = (
    "supported: .jsonl, .parquet, .txt, .arrow, and other files of plain UTF-8 text (a document each), "
    ".gz and .zst of jsonl and text"
)
ID_SUFFIXES = {".parquet": "parquet ids", ".arrow": "arrow ids", ".npy": "npy ids", ".bin": "flat ids"}
ID_SUPPORTED = (
    "of token ids these are read, uncompressed: .parquet, .arrow, .npy, and .bin with or without .idx"
)
# Named here because they could pass for plain text and are not one document.
CONTAINERS = (".json", ".csv", ".tsv", ".bz2", ".xz", ".zip", ".tar")

DEFAULT_FIELDS = ("text", "content")
DEFAULT_COLUMNS = ("input_ids", "tokens", "token_ids")


@dataclass(frozen=True, slots=True)
class Source:
    """One source, cut into blocks."""

    name: str
    weight: float  # its share of the tokens
    format: str
    field: str  # that holds the text or the ids; "" where a file is the text; the dtype of flat ids
    files: tuple[SourceFile, ...]
    blocks: Blocks
    notes: tuple[str, ...]  # what was chosen without being asked, for the log
    access: Access = LOCAL
    validation: tuple[SourceFile, ...] = ()  # files that are held out of training
    shape: Shape | None = None  # makes a text of several fields, or of a conversation

    @property
    def holds_ids(self) -> bool:
        """Whether its documents are token ids and not text."""
        return self.format in (*ID_SUFFIXES.values(), "megatron ids")

    def open(self) -> Format:
        """A reader of the source's files."""
        reader = FORMATS[self.format](self.files, self.field, self.access)
        return reader if self.shape is None else cast("Format", Shaped(reader, self.shape))


def open_source(
    config: SourceConfig, base: Path, lanes: int, access: Access = LOCAL, shape: Shape | None = None
) -> Source:
    """List, check and cut a source. Raises DataError naming the source and the file or pattern."""
    if bool(config.files) == (config.dataset is not None):
        raise RecipeError(f'data.sources: source "{config.name}": give it files or dataset, one of the two')
    _check_ids_settings(config)
    found = list_files(config, base) if config.files else hub_files(config, base)
    apart = list_files(replace(config, files=config.validation), base) if config.validation else []
    apart_paths = {path for _, path in apart}
    found = [(name, path) for name, path in found if path not in apart_paths]
    if not found:
        raise DataError(f'source "{config.name}": validation names all of its files; leave some to train on')
    format_name = _format_of(config, [path for _, path in found + apart])
    if config.documents == "paragraph":
        if format_name != "text":
            raise RecipeError(
                f'data.sources: source "{config.name}": documents = "paragraph" is for plain text; '
                f"its files are {format_name}"
            )
        format_name = "paragraphs"
    if shape is not None:
        format_name = {"parquet": "parquet records", "arrow": "arrow records"}.get(format_name, format_name)
    look_at = look_with_index if format_name == "megatron ids" else look
    looked = [look_at(name, path) for name, path in found]
    validation = tuple(file for file in (look_at(name, path) for name, path in apart) if file.size)
    if apart and not validation:
        raise DataError(f'source "{config.name}": {apart[0][1]}: the validation files are empty')
    notes: list[str] = []
    empty = [file.path for file in looked if not file.size]
    if empty and (format_name not in ("text", "paragraphs") or len(empty) == len(looked)):
        raise DataError(f'source "{config.name}": {empty[0]}: the file is empty; remove it or put it back')
    if empty:
        notes.append(f'source "{config.name}": {len(empty)} empty files hold no document')
    files = tuple(file for file in looked if file.size)
    if shape is not None:
        field = SEPARATOR.join(columns_of(shape, config.name, format_name, files[0], access))
    else:
        field = _choose_field(config, FORMATS[format_name], files[0], access)
    if field and not config.ids and shape is None and config.text is None and field != DEFAULT_FIELDS[0]:
        notes.append(f'source "{config.name}": the text is field "{field}"')
    source_blocks = cut(FORMATS[format_name](files, field, access), len(files), lanes)
    if not len(source_blocks):
        raise DataError(f'source "{config.name}": {files[0].path}: no documents in its {len(files)} file(s)')
    return Source(
        config.name,
        config.weight,
        format_name,
        field,
        files,
        source_blocks,
        tuple(notes),
        access,
        validation,
        shape,
    )


def cut(reader: Format, files: int, lanes: int) -> Blocks:
    """The blocks of a source: its documents where it is small, else ranges of equal size."""
    total = sum(reader.decoded_bytes(file) for file in range(files))
    if total < cutting.INDEX_BELOW:
        return cutting.join([reader.documents(file) for file in range(files)], each_document=True)
    size = cutting.block_bytes(total, lanes)
    return cutting.join([reader.ranges(file, size) for file in range(files)], each_document=False)


# --------------------------------------------------------------------------------------- files


def list_files(config: SourceConfig, base: Path) -> list[tuple[str, Path | str]]:
    """(name, path) of every file, in byte order of the names. A directory stands for what it holds
    in the supported formats, at any depth."""
    remote = [pattern for pattern in config.files if is_url(pattern)]
    if remote:
        return _list_remote(config, remote)
    prefixes: list[str] = []
    found: set[str] = set()
    for pattern in config.files:
        whole = os.path.abspath(base / Path(pattern).expanduser())  # noqa: PTH100 (links keep their names)
        paths, prefix = _expand(whole, config)
        if not paths:
            what = "holds no file that can be read" if Path(whole).is_dir() else "no such file"
            if glob.has_magic(whole):
                what = "no file matches"
            hint = _supported(config) if Path(whole).is_dir() else f"relative paths start at {base}"
            raise DataError(f'source "{config.name}": files = "{pattern}": {what}; {hint}')
        prefixes.append(prefix)
        found.update(_not_indices(config, paths))
    root = os.path.commonpath(prefixes)
    named: list[tuple[str, Path | str]] = [
        (os.path.relpath(path, root).replace(os.sep, "/"), Path(path)) for path in found
    ]
    return sorted(named, key=lambda item: os.fsencode(item[0]))


def _list_remote(config: SourceConfig, patterns: list[str]) -> list[tuple[str, Path | str]]:
    """The same of URLs."""
    if len(patterns) < len(config.files):
        raise DataError(f'source "{config.name}": local and remote files: give each a source of its own')
    prefixes: list[list[str]] = []
    found: set[str] = set()
    for pattern in patterns:
        urls, prefix, directory = list_url(pattern)
        taken = [url for url in urls if not directory or _is_taken(url, config)]
        if not taken:
            what = (
                "no such file, and no directory that holds files of text" if directory else "no file matches"
            )
            raise DataError(f'source "{config.name}": files = "{pattern}": {what}; {_supported(config)}')
        prefixes.append(prefix.split("/"))
        found.update(_not_indices(config, taken))
    first = prefixes[0]
    common = [part for i, part in enumerate(first) if all(p[: i + 1] == first[: i + 1] for p in prefixes)]
    named: list[tuple[str, Path | str]] = [(url.split("/", len(common))[-1], url) for url in found]
    return sorted(named, key=lambda item: os.fsencode(item[0]))


def _not_indices(config: SourceConfig, paths: list[str]) -> list[str]:
    """The paths, those of Megatron's indices left out where ids are read: their .bin is named, or meant."""
    if not config.ids:
        return paths
    return [f"{path.removesuffix('.idx')}.bin" if path.endswith(".idx") else path for path in paths]


def _expand(whole: str, config: SourceConfig) -> tuple[list[str], str]:
    """The files that an absolute pattern names, and its fixed prefix."""
    path = Path(whole)
    if path.is_dir():
        saved = saved_files(path, config.split)
        if saved is not None:
            return [str(name) for name in saved], whole
        held = _glob(f"{glob.escape(whole)}/**/*")
        return [name for name in held if _is_taken(name, config)], whole
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


def _is_taken(name: str, config: SourceConfig) -> bool:
    """Whether a directory's file is taken: one of a known suffix, that of text compressed or not."""
    if config.ids:
        return Path(name).suffix.lower() in ID_SUFFIXES
    inner = Path(name).with_suffix("") if compression(name) else Path(name)
    return inner.suffix.lower() in SUFFIXES and _format_by_suffix(name) is not None


def _glob(pattern: str) -> list[str]:
    """The files that match, hidden ones left out as a shell does."""
    found = glob.glob(pattern, recursive=True)  # noqa: PTH207 (Path.glob takes hidden files too)
    return [name for name in found if Path(name).is_file()]


# ----------------------------------------------------------------------------- format and field


def _supported(config: SourceConfig) -> str:
    return ID_SUPPORTED if config.ids else SUPPORTED


def _check_ids_settings(config: SourceConfig) -> None:
    where = f'data.sources: source "{config.name}"'
    if not config.ids and (config.ids_column is not None or config.ids_dtype is not None):
        raise RecipeError(f"{where}: ids_column and ids_dtype are for token ids: set ids = true")
    if config.ids and config.text is not None:
        raise RecipeError(
            f'{where}: text = "{config.text}": it holds token ids; ids_column names their column'
        )


def _format_of_ids(config: SourceConfig, path: Path | str) -> str:
    """The format of a file of token ids. Raises DataError."""
    found = ID_SUFFIXES.get(Path(str(path).partition("?")[0]).suffix.lower())
    where = f'source "{config.name}": {path}'
    if found is None:
        raise DataError(f"{where}: ids = true, and its suffix says something else; {ID_SUPPORTED}")
    if found != "flat ids":
        return found
    index = index_path(path)
    has_index = index.exists() if isinstance(index, Path) else url_exists(index)
    if has_index and config.ids_dtype is not None:
        raise DataError(
            f"{where}: could be either: {index} lies beside it, as Megatron writes it, and ids_dtype says "
            "that it is flat; leave out ids_dtype, or move one of the two"
        )
    if not has_index and config.ids_dtype is None:
        raise DataError(
            f"{where}: no {Path(str(index)).name} beside it: put Megatron's index back, or say which ids a "
            'flat file holds: ids_dtype = "uint16" for one of nanoGPT'
        )
    return "megatron ids" if has_index else "flat ids"


def _format_of(config: SourceConfig, paths: list[Path | str]) -> str:
    source = config.name
    if config.ids:
        formats = {path: _format_of_ids(config, path) for path in paths}
    else:
        formats = {path: _format_by_suffix(path) or _sniff(source, path) for path in paths}
    first = paths[0]
    other = next((path for path in paths if formats[path] != formats[first]), None)
    if other is not None:
        raise DataError(
            f'source "{source}": {first} is {formats[first]}, {other} is {formats[other]}: '
            "give each format a source of its own"
        )
    return formats[first]


def _format_by_suffix(path: Path | str) -> str | None:
    """The format by the suffix, that of a compression taken off; compressed text is text."""
    inner = Path(str(path).partition("?")[0])
    kind = compression(path)
    if kind is not None:
        inner = inner.with_suffix("")
    known = SUFFIXES.get(inner.suffix.lower())
    if kind is None:
        return known
    return None if known in ("parquet", "arrow") or inner.suffix.lower() in CONTAINERS else known or "text"


def _sniff(source: str, path: Path | str) -> str:
    """`text` for a file of another suffix that looks like it: no null bytes, no known container."""
    raw = open_raw(path)
    try:
        head = raw.read(0, HASHED)
    finally:
        raw.close()
    suffix = Path(str(path).partition("?")[0]).suffix
    if suffix.lower() in CONTAINERS or compression(path) or b"\0" in head:
        kind = f"unsupported suffix {suffix}" if suffix else "not plain text"
        hint = "ids = true reads token ids; " if suffix.lower() in (".npy", ".bin", ".idx") else ""
        raise DataError(f'source "{source}": {path}: {kind}; {hint}{SUPPORTED}')
    return "text"


def _choose_field(config: SourceConfig, reader: type[Format], file: SourceFile, access: Access) -> str:
    fields = reader.fields(file, access)
    if fields is None:
        return config.ids_dtype or ""
    named = config.ids_column if config.ids else config.text
    wanted = (named,) if named is not None else DEFAULT_COLUMNS if config.ids else DEFAULT_FIELDS
    chosen = next((name for name in wanted if name in fields), None)
    if chosen is None:
        names = " or ".join(f'"{name}"' for name in wanted)
        found = f"{nearest(wanted[0], fields)}found: {', '.join(fields) or 'none'}"
        raise DataError(
            f'source "{config.name}": {file.path}: no {"column of ids" if config.ids else "text field"} '
            f'{names}; {found}; set {"ids_column" if config.ids else "text"} = "..." in this source'
        )
    return chosen


def document_id(file_name: str, position: int, part: int | None) -> str:
    """`<file>:<byte offset or row>`, and `#<part>` where the text was split."""
    return f"{file_name}:{position}" if part is None else f"{file_name}:{position}#{part}"

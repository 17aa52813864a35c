"""Kernels as one file that other machines of the same kind unpack: choices, and what was compiled for them.

An archive is a tar, compressed by zstd (`.tar.zst`) or xz (`.tar.xz`), with `manifest.json` first: the
platform, and the SHA-256 of every file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import lzma
import tarfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import zstandard

from flame.errors import FlameError
from flame.models.kernel_choices import Choices, Platform, locked, replace_file

MANIFEST = "manifest.json"
FORMAT = 1
PARTS: tuple[str, ...] = ("choices", "triton", "inductor")  # folders in an archive
NEEDED = "needed"  # in the user's folder: which compiled files each warmed recipe needs


class KernelError(FlameError):
    """Kernels that cannot be prepared, packed or unpacked."""


def keep_needed(folder: Path, recipe: str, fresh: dict[str, Path], into: dict[str, Path]) -> int:
    """Moves what was compiled into the empty `fresh` folders, by part, to their places, and notes in
    `folder` that `recipe` needs it. The number of files."""
    named: dict[str, list[str]] = {}
    for part, source in fresh.items():
        named[part] = []
        for path in sorted(p for p in source.rglob("*") if p.is_file()):
            name = path.relative_to(source).as_posix()
            place = into[part] / name
            place.parent.mkdir(parents=True, exist_ok=True)
            replace_file(place, relocated(name, path.read_bytes(), place.parent))
            named[part].append(name)
    notes = folder / NEEDED
    notes.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:16]
    replace_file(notes / f"{digest}.json", json.dumps(named, indent=1).encode())
    return sum(map(len, named.values()))


def relocated(name: str, content: bytes, folder: Path | None) -> bytes:
    """A file of Triton's cache as it must be in `folder`: its lists of files hold absolute paths, and a
    list of files that are elsewhere is no list. None: bare names, as an archive has them."""
    if not PurePosixPath(name).name.startswith("__grp__"):
        return content
    listed: dict[str, Any] = json.loads(content)
    listed["child_paths"] = {n: str(folder / n) if folder else n for n in listed["child_paths"]}
    return json.dumps(listed).encode()


def pack(archive: Path, platform: Platform, folder: Path, compiled: dict[str, Path]) -> dict[str, int]:
    """Writes the archive of the warmed recipes' kernels; the number of bytes of each part before
    compression. Raises KernelError where nothing was warmed."""
    files = dict(_files(folder, compiled))
    if not files:
        raise KernelError(
            f"{folder}: no kernels of a warmed recipe; run `flame kernels warm RECIPE.toml` on a machine "
            "with this GPU first"
        )
    hashes = {name: hashlib.sha256(_packed(name, path)).hexdigest() for name, path in files.items()}
    manifest = {"format": FORMAT, "platform": dataclasses.asdict(platform), "files": hashes}
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_name(f".{archive.name}.partial")
    sizes = dict.fromkeys(PARTS, 0)
    with _compressed(partial, archive.suffix, "wb") as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        _add(tar, MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode())
        for name, path in files.items():
            content, part = _packed(name, path), name.partition("/")[0]
            sizes[part] = sizes.get(part, 0) + len(content)
            _add(tar, name, content)
    partial.replace(archive)
    return sizes


def _packed(name: str, path: Path) -> bytes:
    return relocated(name, path.read_bytes(), None)


def _files(folder: Path, compiled: dict[str, Path]) -> Iterator[tuple[str, Path]]:
    """Archive name and place of everything that warmed recipes need."""
    notes = sorted((folder / NEEDED).glob("*.json"))
    if not notes:
        return
    for path in sorted((folder / "choices").glob("*.json")):
        yield f"choices/{path.name}", path
    seen: set[str] = set()
    for note in notes:
        yield f"{NEEDED}/{note.name}", note
        for part, names in cast("dict[str, list[str]]", json.loads(note.read_bytes())).items():
            for name in names:
                path = compiled[part] / name
                if f"{part}/{name}" in seen:
                    continue
                if not path.is_file():
                    raise KernelError(f"{path}: a compiled kernel is gone; warm the recipe again")
                seen.add(f"{part}/{name}")
                yield f"{part}/{name}", path


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), 0o755 if name.endswith(".so") else 0o644
    tar.addfile(entry, io.BytesIO(content))


@contextmanager
def _compressed(path: Path, suffix: str, mode: str) -> Generator[IO[bytes]]:
    if suffix == ".xz":
        with lzma.open(path, mode) as stream:
            yield cast("IO[bytes]", stream)
    elif suffix == ".zst":
        with path.open(mode) as file:
            codec: Any = zstandard.ZstdCompressor(level=19) if mode == "wb" else zstandard.ZstdDecompressor()
            stream = codec.stream_writer(file) if mode == "wb" else codec.stream_reader(file)
            with stream:
                yield stream
    else:
        raise KernelError(f"{path}: name the archive .tar.zst or .tar.xz")


def unpack(archive: Path, platform: Platform, folder: Path, compiled: dict[str, Path]) -> dict[str, int]:
    """Puts an archive's kernels where training finds them; the number of files of each part.

    Raises KernelError for an archive of another GPU or of other versions, or for one that is damaged;
    nothing is written then.
    """
    contents = _read(archive, platform)
    counts = dict.fromkeys(PARTS, 0)
    staged = folder / "unpacked"
    for name, content in contents.items():
        part, _, rest = name.partition("/")
        if part == "choices":
            place = staged / rest
        else:
            place = folder / NEEDED / rest if part == NEEDED else compiled[part] / rest
        place.parent.mkdir(parents=True, exist_ok=True)
        replace_file(place, relocated(name, content, place.parent))
        if name.endswith(".so"):
            place.chmod(0o755)
        if part in counts:
            counts[part] += 1
    Choices.read([staged]).write(folder / "choices", platform.triton)
    with locked(folder):
        for path in staged.glob("*.json"):
            path.unlink()
    return counts


def _read(archive: Path, platform: Platform) -> dict[str, bytes]:
    """All files, checked."""
    contents: dict[str, bytes] = {}
    manifest: dict[str, Any] | None = None
    try:
        with (
            _compressed(archive, archive.suffix, "rb") as stream,
            tarfile.open(fileobj=stream, mode="r|") as tar,
        ):
            for entry in tar:
                file = tar.extractfile(entry)
                content = file.read() if file is not None else b""
                if manifest is None:
                    manifest = _manifest(archive, entry.name, content, platform)
                else:
                    contents[_checked(archive, entry.name, content, manifest["files"])] = content
    except FileNotFoundError:
        raise KernelError(
            f"{archive}: no such archive; make one with `flame kernels pack {archive}`"
        ) from None
    except (OSError, ValueError, KeyError, tarfile.TarError, lzma.LZMAError, zstandard.ZstdError) as error:
        raise KernelError(f"{archive}: not a whole archive of kernels: {error}; pack it again") from None
    missing = sorted(manifest["files"].keys() - contents.keys()) if manifest else [MANIFEST]
    if missing:
        raise KernelError(f"{archive}: incomplete: {missing[0]} is missing; pack it again")
    return contents


def _manifest(archive: Path, name: str, content: bytes, platform: Platform) -> dict[str, Any]:
    """The manifest of an archive for this machine."""
    if name != MANIFEST:
        raise KernelError(f"{archive}: not an archive of kernels: it begins with {name}, not {MANIFEST}")
    manifest: dict[str, Any] = json.loads(content)
    if manifest["format"] != FORMAT:
        raise KernelError(f"{archive}: format {manifest['format']}, this flame reads {FORMAT}; pack it again")
    here, there = dataclasses.asdict(platform), manifest["platform"]
    other = [
        f"{what} {there.get(what)} (here {here[what]})" for what in here if there.get(what) != here[what]
    ]
    if other:
        raise KernelError(
            f"{archive}: packed for {', '.join(other)}; its kernels are of no use here: warm the recipe on "
            "a machine like this one and pack that"
        )
    return manifest


def _checked(archive: Path, name: str, content: bytes, hashes: dict[str, str]) -> str:
    pieces = PurePosixPath(name).parts
    if ".." in pieces or name.startswith("/") or len(pieces) < 2 or pieces[0] not in (*PARTS, NEEDED):
        raise KernelError(f"{archive}: {name}: not a place for kernels; nothing was unpacked")
    if hashes.get(name) != hashlib.sha256(content).hexdigest():
        raise KernelError(
            f"{archive}: {name}: damaged, its hash is not the manifest's; copy or pack it again"
        )
    return name

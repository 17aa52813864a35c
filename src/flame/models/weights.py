"""A folder of weights as Hugging Face's libraries write it, read slice by slice."""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flame.errors import ModelError

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
ENDS = 65_536  # bytes at each end of a file that tell it from others
FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


class Entries(Protocol):
    """The tensors of one file."""

    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def read(self, name: str, part: tuple[slice, ...]) -> Tensor: ...


class SafetensorsFile:
    """Mapped into memory; only what is asked for is read."""

    def __init__(self, path: Path) -> None:
        self._file: Any = safe_open(path, framework="pt")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()}  # noqa: SIM118

    def read(self, name: str, part: tuple[slice, ...]) -> Tensor:
        return self._file.get_slice(name)[part] if part else self._file.get_tensor(name)


class PickledFile:
    """A .bin file, of which nothing but tensors is unpickled; mapped into memory too."""

    def __init__(self, path: Path) -> None:
        self._tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, part: tuple[slice, ...]) -> Tensor:
        return self._tensors[name][part]


@dataclass(frozen=True)
class Weights:
    """All tensors of a folder, by the names that its files give them."""

    folder: Path
    files: list[Path]
    shapes: dict[str, tuple[int, ...]]
    entries: dict[str, Entries]

    def read(self, name: str, part: tuple[slice, ...]) -> Tensor:
        """A part of a tensor, on the CPU, as it is stored. Raises ModelError where it is quantised."""
        tensor = self.entries[name].read(name, part)
        if tensor.dtype not in FLOATS and (tensor.is_floating_point() or tensor.dtype in _PACKED):
            raise ModelError(
                f"{self.folder}: {name} is stored as {str(tensor.dtype).removeprefix('torch.')}; quantised "
                "weights cannot be trained on: take the float16, bfloat16 or float32 ones"
            )
        return tensor

    def digest(self) -> str:
        """Tells these weights from others, wherever they lie: of each file's name, size and ends."""
        content = hashlib.blake2b(digest_size=16)
        for path in self.files:
            size = path.stat().st_size
            content.update(f"{path.name}\0{size}\0".encode())
            with path.open("rb") as file:
                content.update(file.read(ENDS))
                file.seek(max(0, size - ENDS))
                content.update(file.read(ENDS))
        return content.hexdigest()


_PACKED = {torch.int8, torch.uint8}  # what quantised weights are packed into


def find_weights(spec: str) -> Path:
    """The folder that `spec` names, or the local copy of a model of the hub. Raises ModelError."""
    folder = Path(spec)
    if folder.is_dir():
        return folder
    if spec.startswith((".", "/", "~")) or spec.count("/") != 1:
        raise ModelError(
            f"model.init_from: {spec}: no such folder; give one with config.json and weights, or a hub name"
        )
    try:
        found = Path(snapshot_download(spec, allow_patterns=["*.json", "*.safetensors"]))
        if not any(found.glob("*.safetensors")):
            found = Path(snapshot_download(spec, allow_patterns=["*.json", "*.bin"]))
    except (OSError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise ModelError(
            f'model.init_from: "{spec}": no such folder, and the hub gave none: {said}'
        ) from None
    return found


def open_weights(folder: Path) -> Weights:
    """The weights in a folder: an index and its files, or files alone; safetensors before .bin.

    Raises ModelError where there are none or a file cannot be read.
    """
    files = _files(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    entries: dict[str, Entries] = {}
    for path in files:
        try:
            opened = SafetensorsFile(path) if path.suffix == ".safetensors" else PickledFile(path)
            found = opened.shapes()
        except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError, AttributeError) as error:
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ModelError(f"{path}: cannot be read as weights: {said}; fetch the file again") from None
        shapes |= found
        entries |= dict.fromkeys(found, opened)
    return Weights(folder, files, shapes, entries)


def _files(folder: Path) -> list[Path]:
    for name in INDEXES:
        if (folder / name).is_file():
            try:
                index = json.loads((folder / name).read_text(encoding="utf-8"))
                names = sorted(set(cast("dict[str, str]", index["weight_map"]).values()))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelError(f"{folder / name}: cannot be read as an index: {error!r}") from None
            missing = [file for file in names if not (folder / file).is_file()]
            if missing:
                raise ModelError(f"{folder}: {name} names {', '.join(missing)}, which is not there")
            return [folder / file for file in names]
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        found = sorted(folder.glob(pattern))
        if found:
            return found
    raise ModelError(f"{folder}: no weights there; expected .safetensors files, or pytorch_model.bin")

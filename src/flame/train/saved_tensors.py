"""A checkpoint's tensors, read one at a time: what is larger than memory can be gone through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import (
    _load_state_dict,  # pyright: ignore[reportPrivateUsage]  # dcp.load warns in every call that it reads alone
)


class SavedTensors(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint whose keys begin with `prefix`, by the rest of their keys.

    Each is read whole, on the CPU, when it is asked for, in this process alone, and is kept nowhere.
    """

    def __init__(self, path: Path, prefix: str = "model.") -> None:
        self._reader = _Reader(path)
        self._prefix = prefix
        self._saved = {
            key.removeprefix(prefix): meta
            for key, meta in self._reader.read_metadata().state_dict_metadata.items()
            if key.startswith(prefix) and isinstance(meta, TensorStorageMetadata)
        }

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape; nothing is read."""
        return tuple(self._saved[name].size)

    def __getitem__(self, name: str) -> torch.Tensor:
        meta = self._saved[name]
        tensor = torch.empty(meta.size, dtype=meta.properties.dtype)
        _load_state_dict({self._prefix + name: tensor}, self._reader, no_dist=True)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._saved)

    def __len__(self) -> int:
        return len(self._saved)


class _Reader(dcp.FileSystemReader):
    """Reads what is in the files once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._metadata = super().read_metadata()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

"""A checkpoint's tensors, read one at a time: what is larger than memory can be gone through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import (
    _load_state_dict,  # pyright: ignore[reportPrivateUsage]  # dcp.load warns in every call that it reads alone
)

from flame.errors import CheckpointError
from flame.train.safe_reader import Reader


class SavedTensors(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint whose keys begin with `prefix`, by the rest of their keys.

    Each is read whole, on the CPU, when it is asked for, in this process alone, and is kept nowhere.
    """

    def __init__(self, path: Path, prefix: str = "model.", *, averaged: bool = False) -> None:
        """`averaged`: of parameters that have a running average, that average. Raises CheckpointError where
        there is none."""
        self._reader = Reader(path)
        found = self._reader.read_metadata().state_dict_metadata
        tensors = {key: meta for key, meta in found.items() if isinstance(meta, TensorStorageMetadata)}
        keys = {key.removeprefix(prefix): key for key in tensors if key.startswith(prefix)}
        if averaged:
            averages = {name: key for name in keys if (key := f"optimizer.{name}.ema") in tensors}
            if not averages:
                raise CheckpointError(
                    f"{path}: no average of the weights; it was trained without optimizer.ema"
                )
            keys |= averages
        self._keys = keys
        self._saved = {name: tensors[key] for name, key in keys.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape; nothing is read."""
        return tuple(self._saved[name].size)

    def __getitem__(self, name: str) -> torch.Tensor:
        meta = self._saved[name]
        tensor = torch.empty(meta.size, dtype=meta.properties.dtype)
        try:
            _load_state_dict({self._keys[name]: tensor}, self._reader, no_dist=True)
        except CheckpointException as error:  # no Exception, but a BaseException
            why = "; ".join(f"{wrapped[0]}".partition("\n")[0] for wrapped in error.failures.values())
            raise CheckpointError(f"{self._reader.path}: {name} cannot be read: {why}") from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._saved)

    def __len__(self) -> int:
        return len(self._saved)

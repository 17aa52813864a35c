"""torch.distributed.checkpoint's files, read without running what they may hold.

`.metadata` is a pickle, which torch's own reader loads whatever it names, and a value that it calls bytes is
unpickled in the same way. Here it may name the records of tensors and of where they lie, and nothing else.
Tensors themselves torch reads with `weights_only=True`.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from flame.errors import CheckpointError

METADATA = ".metadata"
RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",  # and not BytesStorageMetadata: such values would be unpickled
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},  # a layout by its name
    "torch": {"Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # of Python 3.13
}


class Reader(dcp.FileSystemReader):
    """A checkpoint on disk; its metadata is read once. Raises CheckpointError where it names anything but
    the records above, or is none."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._found: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._found is None:
            self._found = read_metadata(Path(self.path) / METADATA)
            self._found.storage_meta = self._found.storage_meta or StorageMeta()
            self._found.storage_meta.load_id = self.load_id
        return self._found


def read_metadata(file: Path) -> Metadata:
    """What a checkpoint says of its tensors. Raises CheckpointError."""
    try:
        with file.open("rb") as stream:
            found = _Unpickler(stream).load()
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    except Exception as error:  # a damaged pickle raises whatever it comes upon
        raise CheckpointError(f"{file}: cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(found, Metadata):
        raise CheckpointError(f"{file}: holds a {type(found).__name__}, expected a checkpoint's metadata")
    return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in RECORDS.get(module, ()):
            raise CheckpointError(
                f"names {module}.{name}, which no checkpoint of flame's does; nothing of it was run; find "
                "out who wrote it, and take another checkpoint"
            )
        return super().find_class(module, name)

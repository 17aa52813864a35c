"""mosaicml-streaming, fed with rows that were tokenized and cut beforehand, in MDS shards."""

from __future__ import annotations

import importlib.machinery
import pickle
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import torch
from measure import Job
from rows import tokenized_rows

# Its package imports torchvision, whose wheel does not load beside a CPU build of torch. No image is read.
PARTS = ("", ".datasets", ".transforms", ".transforms.functional")
for name in (f"torchvision{part}" for part in PARTS):
    stand_in = types.ModuleType(name)
    stand_in.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    stand_in.__dict__.update(__path__=[], VisionDataset=object, to_tensor=None)
    sys.modules[name] = stand_in

from streaming import MDSWriter, StreamingDataLoader, StreamingDataset  # noqa: E402


def prepare(job: Job) -> int:
    """Write the shards; the number of tokens."""
    out = Path(job.folder) / "mds"
    shutil.rmtree(out, ignore_errors=True)
    rows = 0
    with MDSWriter(out=str(out), columns={"tokens": "bytes"}) as writer:
        for row in tokenized_rows(job):
            writer.write({"tokens": row.tobytes()})
            rows += 1
    return rows * job.sequence_length


class Rows(StreamingDataset):
    def __getitem__(self, at: int) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(super().__getitem__(at)["tokens"], dtype=np.int32).copy())


class Streaming:
    def __init__(self, job: Job, state: bytes | None) -> None:
        data = Rows(
            local=str(Path(job.folder) / "mds"),
            shuffle=True,
            batch_size=job.local_rows,
            num_canonical_nodes=1,
        )
        self.loader = StreamingDataLoader(data, batch_size=job.local_rows, num_workers=0)
        if state is not None:
            self.loader.load_state_dict(pickle.loads(state))
        self.batches = iter(self.loader)

    def next_rows(self) -> torch.Tensor:
        return next(self.batches)

    def state(self) -> bytes:
        return pickle.dumps(self.loader.state_dict())

    def settled(self) -> bool:
        return True


open_pipeline = Streaming

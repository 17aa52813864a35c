"""grain, fed with rows that were tokenized and cut beforehand, in an ArrayRecord file."""

from __future__ import annotations

import json
from pathlib import Path

import grain
import numpy as np
import torch
from array_record.python.array_record_module import ArrayRecordWriter
from measure import Job
from rows import tokenized_rows


def prepare(job: Job) -> int:
    """Write the file; the number of tokens."""
    writer = ArrayRecordWriter(str(Path(job.folder) / "rows.arrayrecord"), "group_size:1")
    rows = 0
    for row in tokenized_rows(job):
        writer.write(row.tobytes())
        rows += 1
    writer.close()
    return rows * job.sequence_length


class Grain:
    def __init__(self, job: Job, state: bytes | None) -> None:
        source = grain.sources.ArrayRecordDataSource([str(Path(job.folder) / "rows.arrayrecord")])
        data = grain.MapDataset.source(source).shuffle(seed=42)[job.rank :: job.world]
        data = data.map(lambda content: np.frombuffer(content, dtype=np.int32)).batch(job.local_rows)
        self.batches = iter(data.to_iter_dataset())
        if state is not None:
            self.batches.set_state(json.loads(state))

    def next_rows(self) -> torch.Tensor:
        return torch.from_numpy(next(self.batches))

    def state(self) -> bytes:
        return json.dumps(self.batches.get_state()).encode()

    def settled(self) -> bool:
        return True


open_pipeline = Grain

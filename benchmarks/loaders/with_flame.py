"""flame's own loader, in the same harness."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from measure import Job

from flame.data.catalog import fingerprint, open_catalog
from flame.data.config import DataConfig, SourceConfig, TokenizerConfig
from flame.data.loader import Loader
from flame.data.plan import DataPlan
from flame.data.state import DataState


class Flame:
    def __init__(self, job: Job, state: bytes | None) -> None:
        config = DataConfig([SourceConfig("text", [f"{job.text}/*.jsonl"])], job.sequence_length)
        self.plan = DataPlan.of(config, job.rows_per_step * job.sequence_length, seed=42)
        self.catalog = open_catalog(
            config, TokenizerConfig(job.tokenizer, backend=job.option), self.plan, Path()
        )
        resumed = None if state is None else DataState.from_json(json.loads(state))
        # without the thread that reads ahead: on one core it would only blur which step costs what
        self.loader = Loader(
            self.catalog, self.plan, job.rank, job.world, job.local_rows, resumed, prefetch=False
        )

    def next_rows(self) -> torch.Tensor:
        self.step = self.loader.next_step()
        (batch,) = self.step.micro_batches
        return batch.tokens

    def state(self) -> bytes:
        columns, seal = self.loader.columns, fingerprint(self.catalog, self.plan)
        return json.dumps(DataState(self.step.step + 1, self.step.state, columns, seal).to_json()).encode()

    def settled(self) -> bool:
        following = self.step.step + 1
        return self.plan.window_at(following)[1] == following


open_pipeline = Flame

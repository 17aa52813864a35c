"""A streamed data set of HF, shuffled in a buffer, tokenized in batches, laid end to end and cut, behind a
StatefulDataLoader: the pipeline that trainers for fla's models have used, written here anew.

The shuffle buffer is part of the state, as there, so that a resume is exact.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from measure import Job
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import AutoTokenizer

SHUFFLE_BUFFER = 1024  # documents
TOKENIZED = 64  # documents in one call


class PackedText(IterableDataset):
    def __init__(self, job: Job) -> None:
        streamed = load_dataset("json", data_files=f"{job.text}/*.jsonl", split="train", streaming=True)
        self.data = streamed.shard(job.world, job.rank) if job.world > 1 else streamed
        self.tokenizer = AutoTokenizer.from_pretrained(job.tokenizer)
        self.length = job.sequence_length
        self.draws = np.random.Generator(np.random.PCG64(42))
        self.buffer: list[str] = []
        self.tokens: list[int] = []
        self.source: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[torch.Tensor]:
        if self.source is not None:
            self.data.load_state_dict(self.source)
        while True:
            chosen: list[str] = []
            for sample in self.data:
                if len(self.buffer) < SHUFFLE_BUFFER:
                    self.buffer.append(sample["text"])
                    continue
                place = int(self.draws.integers(SHUFFLE_BUFFER))
                chosen.append(self.buffer[place])
                self.buffer[place] = sample["text"]
                if len(chosen) == TOKENIZED:
                    self.source = self.data.state_dict()
                    yield from self.packed(chosen)
                    chosen = []
            yield from self.packed(chosen)

    def packed(self, texts: list[str]) -> Iterator[torch.Tensor]:
        if texts:
            for ids in self.tokenizer(texts, return_attention_mask=False, add_special_tokens=False)[
                "input_ids"
            ]:
                self.tokens += ids
                self.tokens.append(self.tokenizer.eos_token_id)
        while len(self.tokens) >= self.length:
            row, self.tokens = self.tokens[: self.length], self.tokens[self.length :]
            yield torch.tensor(row, dtype=torch.long)

    def state_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "buffer": list(self.buffer),
            "tokens": list(self.tokens),
            "draws": self.draws.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source, self.buffer, self.tokens = state["source"], state["buffer"], state["tokens"]
        self.draws.bit_generator.state = state["draws"]


class Datasets:
    def __init__(self, job: Job, state: bytes | None) -> None:
        self.key = f"rank_{job.rank}"
        # a state at each step would be copied at each step: the buffer is some megabytes
        self.loader = StatefulDataLoader(PackedText(job), batch_size=job.local_rows, num_workers=0)
        if state is not None:
            self.loader.load_state_dict(pickle.loads(state)[self.key])
        self.batches = iter(self.loader)

    def next_rows(self) -> torch.Tensor:
        return next(self.batches)

    def state(self) -> bytes:
        return pickle.dumps({self.key: self.loader.state_dict()})

    def settled(self) -> bool:
        return True


open_pipeline = Datasets

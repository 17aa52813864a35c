"""torchtitan's own loader of text: a streamed data set of HF, as it reads C4."""

from __future__ import annotations

import pickle

import torch
from datasets import load_dataset
from measure import Job
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataLoader


class Torchtitan:
    def __init__(self, job: Job, state: bytes | None) -> None:
        DATASETS["text"] = DatasetConfig(
            path=job.text,
            loader=lambda path: load_dataset(
                "json", data_files=f"{path}/*.jsonl", split="train", streaming=True
            ),
            sample_processor=lambda sample: sample["text"],
        )
        self.loader = HuggingFaceTextDataLoader(
            HuggingFaceTextDataLoader.Config(dataset="text", dataset_path=job.text, infinite=True),
            dp_world_size=job.world,
            dp_rank=job.rank,
            tokenizer=HuggingFaceTokenizer(tokenizer_path=job.tokenizer),
            seq_len=job.sequence_length,
            local_batch_size=job.local_rows,
        )
        if state is not None:
            self.loader.load_state_dict(pickle.loads(state))
        self.batches = iter(self.loader)

    def next_rows(self) -> torch.Tensor:
        inputs, _ = next(self.batches)
        return inputs["input"]

    def state(self) -> bytes:
        return pickle.dumps(self.loader.state_dict())

    def settled(self) -> bool:
        return True


open_pipeline = Torchtitan

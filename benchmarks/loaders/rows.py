"""Rows made beforehand, for loaders that do not tokenize: documents end to end, cut every L tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from measure import Job
from tokenizers import Tokenizer

BATCH = 256  # documents tokenized in one call


def documents(job: Job) -> Iterator[str]:
    """The text of each record, file by file."""
    for path in sorted(Path(job.text).glob("*.jsonl")):
        with path.open() as file:
            for line in file:
                yield json.loads(line)["text"]


def tokenized_rows(job: Job) -> Iterator[np.ndarray]:
    """int32 [L] each."""
    tokenizer = Tokenizer.from_file(str(Path(job.tokenizer) / "tokenizer.json"))
    config = json.loads((Path(job.tokenizer) / "tokenizer_config.json").read_text())
    eos = tokenizer.token_to_id(config["eos_token"])
    waiting: list[str] = []
    kept = np.zeros(0, dtype=np.int32)
    for text in documents(job):
        waiting.append(text)
        if len(waiting) < BATCH:
            continue
        encoded = tokenizer.encode_batch_fast(waiting, add_special_tokens=False)
        waiting.clear()
        kept = np.concatenate([kept, *(np.array([*e.ids, eos], dtype=np.int32) for e in encoded)])
        whole = len(kept) // job.sequence_length * job.sequence_length
        yield from kept[:whole].reshape(-1, job.sequence_length)
        kept = kept[whole:]

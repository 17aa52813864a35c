"""Texts that a model writes while it is trained."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from flame.batch import IGNORED, Batch
from flame.train.journal import SAMPLES, append_line

MULTIPLE = 64  # rows are as long as the next multiple, so that few shapes are met


class Samples:
    """Continues prompts with the likeliest tokens, and writes them to RUN/samples.jsonl.

    A `flame.train.validation.Follower`. Every rank makes the same forward passes, as many whatever is
    chosen, so that a sharded model serves as well as one that lies on one rank.
    """

    def __init__(
        self,
        run: Path,
        model: nn.Module,
        device: torch.device,
        *,
        prompts: list[tuple[str, list[int]]],
        count: int,
        eos_id: int,
        decode: Callable[[list[int]], str],
        writes: bool,
    ) -> None:
        """`prompts`: texts and their ids. `count`: new tokens. `writes`: on rank 0."""
        self._path, self._model, self._device = run / SAMPLES, model, device
        self._prompts, self._count, self._eos, self._decode = prompts, count, eos_id, decode
        self._writes = writes

    def __call__(self, step: int, tokens: int) -> dict[str, Any]:
        continued = continue_all(self._model, [ids for _, ids in self._prompts], self._count, self._device)
        for (prompt, ids), new in zip(self._prompts, continued, strict=True):
            until = new.index(self._eos) if self._eos in new else len(new)
            before, whole = self._decode(ids), self._decode([*ids, *new[:until]])
            text = whole[len(before) :] if whole.startswith(before) else self._decode(new[:until])
            if self._writes:
                line = {
                    "step": step,
                    "tokens": tokens,
                    "prompt": prompt,
                    "text": text,
                    "ended": until < len(new),
                }
                append_line(self._path, line)
        return {}


def continue_all(
    model: nn.Module, prompts: list[list[int]], count: int, device: torch.device
) -> list[list[int]]:
    """`count` tokens after each prompt, the likeliest each time, by whole forward passes without a cache:
    what every family can do that trains. `model`: with its loss, in evaluation mode."""
    longest = max(map(len, prompts)) + count
    length = -(-longest // MULTIPLE) * MULTIPLE
    tokens = torch.zeros(len(prompts), length, dtype=torch.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    filled = [len(prompt) for prompt in prompts]
    for _ in range(count):
        ends = [row * length + size - 1 for row, size in enumerate(filled)]
        logits: torch.Tensor = model(_batch(tokens, filled).to(device), partial(_last_logits, ends))
        for row, token in enumerate(logits.argmax(-1).tolist()):
            tokens[row, filled[row]] = token
            filled[row] += 1
    return [row[size - count : size].tolist() for row, size in zip(tokens, filled, strict=True)]


def _last_logits(ends: list[int], states: torch.Tensor, head: nn.Linear, _: torch.Tensor) -> torch.Tensor:
    return F.linear(states[ends], head.weight, head.bias).float()


def _batch(tokens: torch.Tensor, filled: list[int]) -> Batch:
    """Rows of a text and, as a segment of its own that no text sees, what is not written yet."""
    length = tokens.shape[1]
    bounds = [0]
    positions = torch.empty_like(tokens)
    for row, size in enumerate(filled):
        bounds += [row * length + size, (row + 1) * length]
        positions[row, :size] = torch.arange(size)
        positions[row, size:] = torch.arange(length - size)
    return Batch(
        tokens=tokens.clone(),
        labels=torch.full_like(tokens, IGNORED),
        positions=positions,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        longest_segment=max(max(size, length - size) for size in filled),
        first_row=0,
    )

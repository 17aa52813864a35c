"""FLOPs of training, counted per architecture, and the peak of the device they are held against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class FlopCount:
    """FLOPs of forward and backward; a product and its sum are two."""

    per_token: float
    per_pair: float  # per pair (query, key) that a causal mask within segments leaves

    def total(self, tokens: int, attended: int) -> float:
        """For `tokens` tokens with `attended` pairs."""
        return self.per_token * tokens + self.per_pair * attended


def matrix_flops(model: nn.Module) -> float:
    """Per token: 6 for each weight of a linear layer or convolution (2 forward, 4 backward).

    That is 6 x non-embedding parameters, the head included (also where it shares the embedding's
    weight) and norms left out.
    """
    layers = (m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d)))
    return 6.0 * sum(layer.weight.numel() for layer in layers)


# dense bf16 and fp16 matrix FLOPs per second; the first name that the device's name contains
_PEAKS: tuple[tuple[str, float], ...] = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989.4e12),
    ("H200", 989.4e12),
    ("A100", 312e12),
    ("B200", 2250e12),
    ("MI300X", 1307.4e12),
)


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Dense FLOPs per second of the device named so by `torch.cuda.get_device_name`; None if unknown,
    and for other types than bfloat16 and float16."""
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    return next((peak for name, peak in _PEAKS if name in device_name), None)

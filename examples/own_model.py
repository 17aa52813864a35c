"""A model of your own for `flame train`: `[model] module = "examples/own_model.py"`.

A small transformer. flame asks for `forward` to the states before the head, and for `head`; documents are
packed into rows, and `cu_seqlens` tells where each begins.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame import varlen_attention


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        qkv = self.qkv(self.norms[0](x)).flatten(0, 1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(1)  # [b L, heads, D]
        attended = varlen_attention(q, k, v, cu_seqlens, len(q))
        x = x + self.out(attended.reshape_as(x))
        return x + self.down(F.relu(self.up(self.norms[1](x))).square())


class Model(nn.Module):
    def __init__(self, vocabulary: int = 4096, width: int = 128, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(4096, width)
        self.layers = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        x = self.embedding(input_ids) + self.places(position_ids.clamp(max=4095))
        for layer in self.layers:
            x = layer(x, cu_seqlens)
        return self.norm(x)

    def init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            torch.nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.RMSNorm):
            module.reset_parameters()

    def flops(self) -> tuple[float, float]:
        """Forward and backward: 6 a weight and token; q k^T and p v are 12 a channel and attended pair."""
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6.0 * weights, 12.0 * len(self.layers) * self.embedding.embedding_dim

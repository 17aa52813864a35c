"""Activation checkpointing: what a block computes is forgotten and computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# what "selective" keeps, for it costs most to compute again: products of matrices and attention. fla's
# kernels are no operators of torch's and always run again.
_KEPT_NAMES = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::linear",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "torch_attn::_varlen_attn",
)


def recompute_block(block: nn.Module, how: str) -> None:
    """Wraps a block's forward in place, inside of what FSDP2 hooks to it; names stay as they are.

    `how`: "full" keeps the block's inputs alone; "offload" keeps them in host memory; "selective" keeps also
    the results of matrix products and attention.
    """
    forward: Callable[..., Any] = block.forward
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    @wraps(forward)
    def again(*args: Any, **kwargs: Any) -> Any:
        with save_on_cpu(pin_memory=torch.cuda.is_available()) if how == "offload" else nullcontext():
            return checkpoint(forward, *args, **options, **kwargs)

    block.forward = again


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.name().partition(".")[0]
    return CheckpointPolicy.MUST_SAVE if name in _KEPT_NAMES else CheckpointPolicy.PREFER_RECOMPUTE

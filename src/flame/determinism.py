"""`run.deterministic`: only kernels whose results do not depend on which of their threads is first."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager

import torch

from flame.errors import RecipeError

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACE = ":4096:8"  # 8 buffers of 4 MiB: one of the two values with which cuBLAS gives the same bits again


def be_deterministic() -> None:
    """Lets torch take deterministic kernels alone, in this process. Before it touches a GPU: cuBLAS reads its
    workspace's size, which the user may have set, when it starts."""
    os.environ.setdefault(CUBLAS, WORKSPACE)
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(mode=True)


@contextmanager
def naming_kernels() -> Generator[None]:
    """Within, torch's error about a kernel that has no deterministic form is a RecipeError."""
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error) or not torch.are_deterministic_algorithms_enabled():
            raise
        reason = str(error).partition(". ")[0]
        raise RecipeError(
            f"run.deterministic: true, but the model needs a kernel that is not: {reason}; leave it out, or "
            "use a model without it"
        ) from error

"""No test here waits for kernels to be tuned."""

from __future__ import annotations

import pytest
import torch
from gpu.untuned import leave_untuned


@pytest.fixture(autouse=True)
def untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        leave_untuned(monkeypatch.setattr)

"""A Triton driver without a device: kernels are really compiled, for an H100, and launches are noted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget


class FakeUtils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    def load_binary(
        self, name: str, kernel: bytes, shared: int, device: int
    ) -> tuple[int, int, int, int, int]:
        return 1, 2, 32, 0, 1024

    def unload_module(self, module: int) -> None:
        pass


class FakeGpu:
    """`seconds` is what timing a launch (kernel's name, warps) gives."""

    def __init__(self, seconds: Callable[[str, int], float]) -> None:
        self.utils = FakeUtils()
        self.launches: list[tuple[str, int]] = []  # of kernels that ran, not of those that were timed
        self.timings: list[tuple[int, int]] = []  # (warps, milliseconds of measurement)
        self._seconds = seconds

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.launches.append((source.fn.__name__, metadata.num_warps))

        return launch

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def bench(call: Callable[[], Any], warmup: int = 25, rep: int = 100, quantiles: Any = None) -> Any:
            call()
            name, warps = self.launches.pop()
            self.timings.append((warps, rep))
            return [self._seconds(name, warps)] * 3

        return bench

"""Kernels for tests of what they compute: no tuning, one candidate each is compiled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any


def leave_untuned(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Autotuners take a known choice, else their first candidate that fits the GPU: what a kernel computes
    does not depend on it, and to time all of them takes minutes. `put` sets an attribute."""
    from triton.runtime.autotuner import Autotuner, OutOfResources

    prune, run = Autotuner.prune_configs, Autotuner.run

    def first_that_fits(self, *args, **kwargs):
        configs, (*others, last) = self.configs, prune_all(self, args, kwargs)
        try:
            for config in others:
                self.configs = [config]
                with suppress(OutOfResources):
                    return run(self, *args, **kwargs)
            self.configs = [last]
            return run(self, *args, **kwargs)
        finally:
            self.configs = configs

    def prune_all(self, args, kwargs):
        if len(self.configs) < 2:
            return self.configs
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        try:
            return prune(self, kwargs)
        finally:
            self.nargs = None

    put(Autotuner, "run", first_that_fits)

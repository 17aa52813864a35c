"""The learning rate at each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from flame.errors import RecipeError
from flame.schema import Duration
from flame.train.config import OptimizerConfig, ScheduleConfig


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear warm-up, then a decay from the peak to `final_fraction` of it at the last step.

    `total_steps` is None where nobody knows the last step; only a constant rate may follow the warm-up then.

    A function of the step alone, so that there is no state to save.
    """

    peak: float
    total_steps: int | None
    warmup_steps: int
    decay: str  # cosine, linear, sqrt, constant or wsd
    final_fraction: float
    decay_fraction: float
    decay_shape: str

    @staticmethod
    def of(
        schedule: ScheduleConfig,
        optimizer: OptimizerConfig,
        total_steps: int | None,
        steps_of: Callable[[Duration], int],
    ) -> Schedule:
        """`steps_of`: a length from the run's beginning in steps. Raises RecipeError for what cannot be."""
        warmup = steps_of(schedule.warmup)
        if total_steps is None and schedule.decay != "constant":
            raise RecipeError(
                f"schedule.decay: {schedule.decay} falls towards the run's last step, which nobody knows "
                'where the data end the run: set run.steps or run.tokens to a guess, or decay = "constant"'
            )
        if total_steps and warmup > total_steps:
            raise RecipeError(
                f"schedule.warmup: {schedule.warmup} is {warmup} steps, but the run has {total_steps}"
            )
        if not 0 <= schedule.final_fraction <= 1:
            raise RecipeError(f"schedule.final_fraction: found {schedule.final_fraction}, expected 0 to 1")
        if not 0 < schedule.decay_fraction <= 1:
            raise RecipeError(
                f"schedule.decay_fraction: found {schedule.decay_fraction}, expected above 0, at most 1"
            )
        return Schedule(
            peak=optimizer.learning_rate,
            total_steps=total_steps,
            warmup_steps=warmup,
            decay=schedule.decay,
            final_fraction=schedule.final_fraction,
            decay_fraction=schedule.decay_fraction,
            decay_shape=schedule.decay_shape,
        )

    def learning_rate(self, step: int) -> float:
        """The rate of the update that makes step `step`; steps count from 1."""
        if step <= self.warmup_steps:
            return self.peak * step / self.warmup_steps
        if self.decay == "constant" or self.total_steps is None:
            return self.peak
        decaying = self.total_steps - self.warmup_steps
        shape = self.decay
        if self.decay == "wsd":  # Hu et al. 2024, MiniCPM: warm up, stay, decay
            decaying = min(decaying, max(1, round(self.decay_fraction * self.total_steps)))
            shape = self.decay_shape
        done = (step - (self.total_steps - decaying)) / max(1, decaying)
        if done <= 0:
            return self.peak
        left = _remaining(shape, min(1.0, done))
        return self.peak * (self.final_fraction + (1 - self.final_fraction) * left)


def _remaining(shape: str, done: float) -> float:
    """1 at the decay's begin, 0 at its end."""
    if shape == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if shape == "sqrt":  # Haegele et al. 2024: 1 - sqrt
        return 1 - math.sqrt(done)
    return 1 - done

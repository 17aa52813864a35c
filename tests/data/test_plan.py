from __future__ import annotations

from typing import Any

import pytest

from flame.data.config import DataConfig
from flame.data.plan import DataPlan
from flame.errors import RecipeError


def plan_of(tokens_per_step: int = 60 * 64, **settings: Any) -> DataPlan:
    return DataPlan.of(DataConfig(sources=[], sequence_length=64, **settings), tokens_per_step, seed=1)


def test_defaults() -> None:
    plan = plan_of()
    (stage,) = plan.stages
    assert (stage.rows_per_step, stage.window_steps, stage.max_document_length) == (60, 32, 64)
    assert plan.lanes == 30
    assert plan_of(tokens_per_step=2**20).stages[0].window_steps == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens_per_step": 100}, "such as 64 or 128"),
        ({"tokens_per_step": 0}, "such as 64"),
        ({"lanes": 7}, "such as 6"),
        ({"lanes": 0}, "data.lanes"),
        ({"max_document_length": 65}, "max_document_length: found 65"),
        ({"window_steps": 0}, "window_steps: found 0"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan_of(**settings)


@pytest.mark.parametrize("window_steps", [1, 4, 5, 32])
def test_windows_grow_to_their_length_and_tile_the_steps(window_steps: int) -> None:
    plan = plan_of(window_steps=window_steps)
    step = 0
    for window in range(20):
        for within in range(plan.steps_in_window(window)):
            assert plan.window_at(step + within) == (window, step)
        step += plan.steps_in_window(window)
    assert plan.steps_in_window(0) == 1
    assert plan.steps_in_window(19) == window_steps

"""Learning-rate schedules."""

from __future__ import annotations

from functools import partial

import pytest

from flame.errors import RecipeError
from flame.schema import Duration
from flame.train.config import OptimizerConfig, ScheduleConfig
from flame.train.schedule import Schedule


def make(total: int = 100, warmup: int = 10, **settings: object) -> Schedule:
    config = ScheduleConfig(warmup=Duration(warmup, "steps"), **settings)  # type: ignore[arg-type]
    return Schedule.of(
        config, OptimizerConfig(learning_rate=2.0), total, partial(Duration.steps, tokens_per_step=50)
    )


def test_warm_up_rises_linearly_to_the_peak() -> None:
    schedule = make()
    assert schedule.learning_rate(1) == pytest.approx(0.2)
    assert schedule.learning_rate(5) == pytest.approx(1.0)
    assert schedule.learning_rate(10) == 2.0


@pytest.mark.parametrize("decay", ["cosine", "linear", "sqrt", "wsd"])
def test_every_decay_ends_at_the_final_fraction(decay: str) -> None:
    schedule = make(decay=decay, final_fraction=0.1)
    rates = [schedule.learning_rate(s) for s in range(10, 101)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.2)


def test_cosine_is_half_way_in_the_middle() -> None:
    assert make(final_fraction=0.0).learning_rate(55) == pytest.approx(1.0)


def test_wsd_stays_at_the_peak_until_its_decay() -> None:
    schedule = make(decay="wsd", decay_fraction=0.2, final_fraction=0.0)
    assert schedule.learning_rate(11) == schedule.learning_rate(80) == 2.0
    assert schedule.learning_rate(90) == pytest.approx(1.0)
    assert schedule.learning_rate(100) == 0.0


def test_constant_never_falls() -> None:
    assert make(decay="constant").learning_rate(100) == 2.0


def test_warm_up_in_tokens_is_rounded_up_to_steps() -> None:
    config = ScheduleConfig(warmup=Duration(101, "tokens"))
    assert (
        Schedule.of(config, OptimizerConfig(), 100, partial(Duration.steps, tokens_per_step=50)).warmup_steps
        == 3
    )


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"warmup": 101}, "warmup"), ({"final_fraction": 1.5}, "final"), ({"decay_fraction": 0.0}, "decay_")],
)
def test_impossible_schedules_are_refused(settings: dict[str, object], word: str) -> None:
    with pytest.raises(RecipeError, match=word):
        make(**settings)  # type: ignore[arg-type]

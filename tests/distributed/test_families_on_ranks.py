"""Every family trains the same on one rank and, sharded, on two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from distributed.ranks import metrics, train_on
from models.small_models import SMALL
from small_recipes import MODELS

from flame.models.registry import families

# one of each kind of layer in every run of the tests, the rest in `make test-all`: three seconds each
QUICK = ("kda", "mamba2", "hgrn2", "rwkv7", "qwen3")
NAMES = [
    pytest.param(family.name, marks=() if family.name in QUICK else pytest.mark.slow) for family in families()
]


@pytest.mark.parametrize("name", NAMES)
def test_a_family_trains_the_same_sharded_over_two_ranks(name, write_recipe, tmp_path: Path, monkeypatch):
    values = {**SMALL[name].to_dict(), "vocab_size": 384}
    monkeypatch.setitem(MODELS, name, json.loads(json.dumps(values)))
    once = {
        "steps = 30": "steps = 4",
        'warmup = "5 steps"': 'warmup = "2 steps"',
        "tokens_per_step = 768": "tokens_per_step = 512",
    }
    for ranks in (1, 2):
        recipe = write_recipe(f"on-{ranks}", name, replaced=once)
        trainer = train_on(ranks, recipe)
        assert trainer.codes() == [0] * ranks
    one, two = metrics(tmp_path / "on-1"), metrics(tmp_path / "on-2")
    assert len(one) == len(two) == 4
    for alone, sharded in zip(one, two, strict=True):
        assert alone["rows_digest"] == sharded["rows_digest"]
        assert sharded["loss"] == pytest.approx(alone["loss"], abs=2e-5)
        assert sharded["grad_norm"] == pytest.approx(alone["grad_norm"], rel=2e-4)


def test_blocks_computed_again_train_the_same_sharded_over_two_ranks(write_recipe, tmp_path: Path):
    for how in ("none", "full"):
        once = {"steps = 30": "steps = 6", "[checkpoint]": f'[memory]\nrecompute = "{how}"\n[checkpoint]'}
        recipe = write_recipe(how, "gla", replaced=once)
        assert train_on(2, recipe).codes() == [0, 0]
    plain, again = (
        [(line["loss"], line["grad_norm"]) for line in metrics(tmp_path / how)] for how in ("none", "full")
    )
    assert plain == again

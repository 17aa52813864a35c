"""A run through phases: steps, tokens, schedule and checkpoints are right where the batch size changes."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from distributed.ranks import metrics, train_on, wait_for_step

from flame.recipe import read_recipe
from flame.train.keeping import saved_steps

PHASES = """
[[data.phases]]
at = "5 steps"
tokens_per_step = 1536
[[data.phases]]
at = "17000 tokens"
sequence_length = 128
weights = { python = 2 }
"""
EXACT = ("step", "tokens", "epoch", "documents", "rows_digest", "learning_rate", "sources")
REPLACED = {
    "steps = 30": "tokens = 40_000",
    "[data]": "[data]\nwindow_steps = 2",
    "[batch]": f"{PHASES}[batch]",
    'warmup = "5 steps"': 'warmup = "7000 tokens"',
    'every = "4 steps"': 'every = "6000 tokens"\nkeep = 99',
}


def test_a_run_through_phases_is_the_same_on_other_ranks(write_recipe, tmp_path: Path) -> None:
    assert train_on(1, write_recipe("one", "llama", replaced=REPLACED)).codes() == [0]
    run, recipe = tmp_path / "run", write_recipe("run", "llama", replaced=REPLACED)
    for ranks, stop_at in ((2, 6), (3, 15)):
        trainer = train_on(ranks, recipe)
        wait_for_step(run, stop_at)
        trainer.signal(signal.SIGKILL if ranks == 2 else signal.SIGTERM)
        trainer.codes()
    assert train_on(2, recipe).codes() == [0, 0]

    one, other = metrics(tmp_path / "one"), metrics(run)
    assert [[r[k] for k in EXACT] for r in other] == [[r[k] for k in EXACT] for r in one]
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(one, other, strict=True)) < 1e-6

    # windows of 1, 2, 2, ... steps: the phases begin at steps 5 and 15, counted from 0
    sizes = [768] * 5 + [1536] * (len(one) - 5)
    assert [r["tokens"] for r in one] == [sum(sizes[: i + 1]) for i in range(len(one))]
    assert one[-1]["tokens"] - 1536 < 40_000 <= one[-1]["tokens"]
    assert read_recipe(recipe).total_steps == len(one)
    crossed = [r["step"] for r in one if r["tokens"] // 6000 > (r["tokens"] - sizes[r["step"] - 1]) // 6000]
    assert saved_steps(tmp_path / "one") == sorted({*crossed, len(one)})
    peak = max(one, key=lambda r: r["learning_rate"])
    assert peak["tokens"] - 1536 < 7000 <= peak["tokens"]
    assert peak["learning_rate"] == pytest.approx(3e-3)
    assert one[-1]["learning_rate"] == pytest.approx(3e-4)

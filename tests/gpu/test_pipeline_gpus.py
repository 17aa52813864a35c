"""Stages on two GPUs over NCCL, with fla's kernels, against one GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distributed.ranks import metrics, train_on
from models.small_models import larger
from small_recipes import MODELS

from flame.parallel.config import SCHEDULES

pytestmark = [
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["llama", "gla", "rwkv7"])
def test_two_gpus_train_what_one_does(name, schedule, write_recipe, tmp_path: Path, monkeypatch) -> None:
    values = {**larger(name).to_dict(), "vocab_size": 384, "num_hidden_layers": 4}
    values.pop("value_dim", None)
    monkeypatch.setitem(MODELS, name, json.loads(json.dumps(values)))
    for ranks in (1, 2):
        replaced = {
            "steps = 30": "steps = 5",
            "tokens_per_step = 768": "tokens_per_step = 768\nmicro_batch_rows = 1",
            "[checkpoint]": f'[parallel]\npipeline = {ranks}\npipeline_schedule = "{schedule}"\n[checkpoint]',
        }
        trainer = train_on(ranks, write_recipe(f"on-{ranks}", name, replaced=replaced))
        assert trainer.codes(timeout=600) == [0] * ranks
    one, two = metrics(tmp_path / "on-1"), metrics(tmp_path / "on-2")
    for alone, piped in zip(one, two, strict=True):
        assert alone["rows_digest"] == piped["rows_digest"]
        assert piped["loss"] == pytest.approx(alone["loss"], abs=2e-2)  # bfloat16
        assert piped["grad_norm"] == pytest.approx(alone["grad_norm"], rel=3e-2)

"""Two GPUs of tensor ranks over NCCL, with fla's kernels in bfloat16, against one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distributed.ranks import metrics, train_on
from models.small_models import larger
from small_recipes import MODELS

from flame.parallel.mesh import Layout

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize(
    "name", ["llama", "transformer", "gla", "gated_deltanet", "mamba2", "hgrn2", "rwkv7"]
)
def test_a_model_trains_alike_on_two_tensor_ranks(
    name, compiled, write_recipe, tmp_path: Path, monkeypatch
) -> None:
    if compiled == "true" and name not in ("llama", "transformer"):
        pytest.skip("compiled for no such family")
    values = {**larger(name).to_dict(), "vocab_size": 384}
    monkeypatch.setitem(MODELS, name, json.loads(json.dumps(values)))
    for tensor in (1, 2):
        replaced = {
            "steps = 30": "steps = 8",
            "tokens_per_step = 768": "tokens_per_step = 4096",
            "sequence_length = 64": "sequence_length = 512",
            "[tokenizer]": f"compile = {compiled}\n[tokenizer]",
            "[logging]": f"[parallel]\ntensor = {tensor}\n[logging]",
        }
        trainer = train_on(Layout(tensor=tensor).ranks, write_recipe(f"on-{tensor}", name, replaced=replaced))
        assert trainer.codes(timeout=900) == [0] * tensor
    one, two = metrics(tmp_path / "on-1"), metrics(tmp_path / "on-2")
    for alone, divided in zip(one, two, strict=True):
        assert alone["rows_digest"] == divided["rows_digest"]
        assert divided["loss"] == pytest.approx(alone["loss"], abs=0.02)  # bfloat16
    norms = [(alone["grad_norm"], divided["grad_norm"]) for alone, divided in zip(one, two, strict=True)]
    assert norms[0][1] == pytest.approx(norms[0][0], rel=0.02), norms
    for alone, divided in norms:  # of weights that have gone apart since
        assert divided == pytest.approx(alone, rel=0.1), norms

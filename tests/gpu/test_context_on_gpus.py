"""Rows that lie on two GPUs: the exchanges over NCCL, fla's kernels and torch's attention, in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distributed.context_ranks import Difference, compare, differences
from distributed.ranks import Ranks, metrics, train_on
from models.small_models import SMALL, larger
from small_recipes import MODELS

from flame.models.registry import family_of

pytestmark = [
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
]

ROWS = [[5, 163, 1, 71], [240], [80, 160]]  # cut at 360 of 720: within the second row's only document
ATTENTION = [name for name in SMALL if family_of(SMALL[name]).source == "transformers"]
RECURRENT = [name for name in SMALL if name not in ATTENTION]


NAMES = [*RECURRENT, "llama", "mistral"]


def hands_on(name: str) -> bool:
    plan = family_of(SMALL[name]).context
    return plan is not None and plan.hands_on


@pytest.fixture(scope="module", params=["heads", "state"])
def found(request, tmp_path_factory) -> dict[str, Difference]:
    """Of all models, by two ranks one after another: to begin takes longer than to compare."""
    names = [name for name in NAMES if request.param == "heads" or hands_on(name)]
    told = tmp_path_factory.mktemp("context") / "found.jsonl"
    Ranks(2, compare, names, ROWS, request.param, told, True).codes(timeout=900)
    return {difference.name: difference for difference in differences(told)}


@pytest.mark.parametrize("name", NAMES)
def test_a_document_cut_between_two_gpus_has_the_states_and_gradients_of_a_whole_one(name, found):
    if name not in found and not hands_on(name):
        pytest.skip("its state cannot be handed on")
    difference = found[name]
    # bfloat16 keeps eight bits; sums over the ranks round once more
    assert difference.hidden < 0.05, difference
    assert difference.gradients < 0.05, difference
    assert difference.leaked == 0.0, difference
    assert difference.ahead < 1e-5, difference  # kernels take sums from sums, which leaves roundings


@pytest.mark.parametrize("method", ["heads", "state"])
@pytest.mark.parametrize("name", ["llama", "gla", "gated_deltanet"])
def test_training_on_two_gpus_with_cut_rows_is_training_on_one(
    name, method, write_recipe, tmp_path: Path, monkeypatch
):
    values = {**larger(name).to_dict(), "vocab_size": 384}
    monkeypatch.setitem(MODELS, name, json.loads(json.dumps(values)))
    found = []
    for ranks, parallel in ((1, ""), (2, f'context = 2\ncontext_method = "{method}"')):
        settings = {
            "steps = 30": "steps = 5",
            "sequence_length = 64": "sequence_length = 256",
            "[logging]": f"[parallel]\n{parallel}\n[logging]",
        }
        assert train_on(ranks, write_recipe(f"on-{ranks}", name, replaced=settings)).codes(600) == [0] * ranks
        found.append(metrics(tmp_path / f"on-{ranks}"))
    for one, two in zip(*found, strict=True):
        assert one["rows_digest"] == two["rows_digest"]
        assert two["loss"] == pytest.approx(one["loss"], abs=5e-3)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-2)

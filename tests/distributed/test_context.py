"""Rows that lie on several ranks train as whole ones do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from distributed.context_ranks import compare, differences
from distributed.ranks import Ranks, metrics, train_on
from models.small_models import SMALL
from small_recipes import MODELS

from flame.models.registry import families, family_of
from flame.train.checkpoint import step_directory
from flame.train.saved_tensors import SavedTensors

# float32: attention gives the same bits, what is summed in another order does not
HIDDEN, GRADIENTS = 1e-5, 5e-5

ROWS = {
    "crossing": [[5, 43, 1, 71], [120], [80, 40]],  # cut at 180 by two ranks, at 90, 180 and 270 by four
    "one document": [[120]],
    "ending at the cut": [[30, 30, 60]],
    "a token before and after": [[59, 2, 59], [119, 1]],
}
QUICK = (
    "gla",
    "gated_deltanet-gva",
    "llama",
    "mamba2",
    "rwkv7",
    "gsa-conv",
    "transformer-gqa",
    "hgrn-hybrid",
)
OTHERS = tuple(name for name in SMALL if name not in QUICK)
HEADS_ONLY = [name for name, config in SMALL.items() if not family_of(config).context.hands_on]


def found(names, ranks: int, rows: str, method: str, tmp_path: Path):
    works = Ranks(ranks, compare, list(names), ROWS[rows], method, tmp_path / "found.json")
    assert works.codes(timeout=280) == [0] * ranks
    return differences(tmp_path / "found.json")


def assert_equal(found) -> None:
    for difference in found:
        assert difference.hidden < HIDDEN, difference
        assert difference.gradients < GRADIENTS, difference
        assert difference.leaked == difference.ahead == 0.0, difference


@pytest.mark.parametrize(
    ("ranks", "method"),
    [(2, "heads"), (2, "state"), (4, "state"), pytest.param(4, "heads", marks=pytest.mark.slow)],
)
def test_a_cut_document_has_the_states_and_gradients_of_a_whole_one(ranks, method, tmp_path):
    # two heads over four ranks: what does not divide hands its state on
    assert_equal(found(QUICK, ranks, "crossing", method, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["heads", "state"])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("half", [0, 1])
def test_it_does_so_in_every_family_and_setting(half, ranks, method, tmp_path):
    names = [n for n in OTHERS if n not in HEADS_ONLY or (method == "heads" and ranks == 2)]
    assert_equal(found(names[half::2], ranks, "crossing", method, tmp_path))


@pytest.mark.parametrize("method", [pytest.param("heads", marks=pytest.mark.slow), "state"])
@pytest.mark.parametrize("rows", [rows for rows in ROWS if rows != "crossing"])
def test_it_does_so_wherever_documents_end(rows, method, tmp_path):
    assert_equal(found(("gla-conv-mqa", "rwkv7", "llama"), 4, rows, method, tmp_path))


# ------------------------------------------------------------------------------------- training

SHORT = {"steps = 30": "steps = 5", 'warmup = "5 steps"': 'warmup = "2 steps"\ndecay = "constant"'}
LOSS, NORM = 1e-6, 1e-5  # measured: 3e-7 and 1e-6


def trained(write_recipe, tmp_path: Path, model: str, name: str, ranks: int, parallel: str):
    settings = {**SHORT, "[logging]": f"[parallel]\n{parallel}\n[logging]"}
    assert train_on(ranks, write_recipe(name, model, replaced=settings)).codes() == [0] * ranks
    return metrics(tmp_path / name)


def assert_same(one, other) -> None:
    assert len(one) == len(other) > 0
    for alone, shared in zip(one, other, strict=True):
        for key in ("rows_digest", "tokens", "documents", "learning_rate"):
            assert alone[key] == shared[key]
        assert shared["loss"] == pytest.approx(alone["loss"], abs=LOSS)
        assert shared["grad_norm"] == pytest.approx(alone["grad_norm"], rel=NORM)


def use_small(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {**SMALL[name].to_dict(), "vocab_size": 384}
    monkeypatch.setitem(MODELS, name, json.loads(json.dumps(values)))


@pytest.mark.parametrize("model", ["llama", pytest.param("gla", marks=pytest.mark.slow), "gated_deltanet"])
def test_training_on_two_context_ranks_is_training_on_one(model, write_recipe, tmp_path, monkeypatch):
    use_small(model, monkeypatch)
    one = trained(write_recipe, tmp_path, model, "one", 1, "")
    assert_same(one, trained(write_recipe, tmp_path, model, "two", 2, "context = 2"))
    # the same parameters under the same names, for any layout to load
    names = [
        dcp.FileSystemReader(step_directory(tmp_path / run, 5)).read_metadata() for run in ("one", "two")
    ]
    assert names[0].state_dict_metadata.keys() == names[1].state_dict_metadata.keys()
    saved = [dict(SavedTensors(step_directory(tmp_path / run, 5))) for run in ("one", "two")]
    for name, parameter in saved[0].items():
        assert saved[1][name].shape == parameter.shape
        assert (saved[1][name] - parameter).abs().max() < 2e-5, name


@pytest.mark.parametrize(
    "layout",
    [
        "shard = 2",
        "replicate = 2",
        pytest.param('context_method = "state"\nshard = 2', marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "model",
    [
        pytest.param("llama", marks=pytest.mark.slow),
        "gla",
        pytest.param("gated_deltanet", marks=pytest.mark.slow),
    ],
)
def test_with_sharding_and_replicas_too(layout, model, write_recipe, tmp_path, monkeypatch):
    use_small(model, monkeypatch)
    one = trained(write_recipe, tmp_path, model, "one", 1, "")
    assert_same(one, trained(write_recipe, tmp_path, model, "four", 4, f"context = 2\n{layout}"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [family.name for family in families()])
def test_every_family_trains_so(name, write_recipe, tmp_path, monkeypatch):
    use_small(name, monkeypatch)
    one = trained(write_recipe, tmp_path, name, "one", 1, "")
    two = trained(write_recipe, tmp_path, name, "two", 2, "context = 2")
    assert [r["rows_digest"] for r in one] == [r["rows_digest"] for r in two]
    for alone, shared in zip(one, two, strict=True):
        assert shared["loss"] == pytest.approx(alone["loss"], abs=2e-5)
        assert shared["grad_norm"] == pytest.approx(alone["grad_norm"], rel=2e-4)


@pytest.mark.parametrize(
    ("first", "second"), [pytest.param("", "context = 2", marks=pytest.mark.slow), ("context = 2", "")]
)
def test_a_run_goes_on_with_its_rows_whole_or_cut(first, second, write_recipe, tmp_path):
    whole = trained(write_recipe, tmp_path, "gla", "whole", 1, "")
    found = []
    for parallel, steps in ((first, 4), (second, 5)):
        settings = {
            **SHORT,
            "steps = 30": f"steps = {steps}",
            "[logging]": f"[parallel]\n{parallel}\n[logging]",
        }
        ranks = 2 if parallel else 1
        recipe = write_recipe("moved", "gla", replaced=settings)
        assert train_on(ranks, recipe).codes() == [0] * ranks
        found = metrics(tmp_path / "moved")
    assert_same(whole, found)


@pytest.mark.slow
def test_compiled_blocks_train_so(write_recipe, tmp_path):
    one = trained(write_recipe, tmp_path, "llama", "one", 1, "")
    settings = {
        **SHORT,
        "[logging]": "[parallel]\ncontext = 2\n[logging]",
        "[tokenizer]": "compile = true\n[tokenizer]",
    }
    assert train_on(2, write_recipe("two", "llama", replaced=settings)).codes(timeout=280) == [0, 0]
    for alone, shared in zip(one, metrics(tmp_path / "two"), strict=True):
        assert shared["loss"] == pytest.approx(alone["loss"], abs=2e-5)


def test_what_cannot_be_cut_is_refused_before_anything_is_loaded(write_recipe, tmp_path):
    for parallel, words in (
        ("context = 3", "sequence_length: found 64"),
        ('context = 4\ncontext_method = "heads"', "num_heads, 2"),
    ):
        ranks = int(parallel[10])
        settings = {**SHORT, "[logging]": f"[parallel]\n{parallel}\n[logging]"}
        works = train_on(ranks, write_recipe("refused", "gla", replaced=settings))
        assert works.codes() == [1] * ranks
        assert words in works.error()

"""Every family trains the same on one rank and with its matrices and sequence divided over several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from distributed.ranks import metrics, train_on
from models.small_models import SMALL
from small_recipes import MODELS

from flame.models.registry import families, family_of
from flame.parallel.mesh import Layout
from flame.parallel.support import check_layout

ONCE = {
    "steps = 30": "steps = 4",
    'warmup = "5 steps"': 'warmup = "2 steps"',
    "tokens_per_step = 768": "tokens_per_step = 512",
}
# one key head for two query heads: refused
UNDIVIDED = {"gla-conv-mqa", "retnet-hybrid", "linear_attn-hybrid", "gsa-conv"}
DIVIDED = [name for name in SMALL if name not in UNDIVIDED]
QUICK = ("llama", "gla", "gated_deltanet", "mamba2", "mamba2-groups", "hgrn2", "retnet", "rwkv7", "phi3")


def quick_or_slow(names: list[str], quick: tuple[str, ...]) -> list:
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


def settings(name: str, **others) -> dict:
    values = {**SMALL[name].to_dict(), "vocab_size": 384, **others}
    return json.loads(json.dumps(values))


def train_and_compare(write_recipe, tmp_path: Path, model: str, *layouts: dict[str, int]) -> None:
    for number, layout in enumerate(({}, *layouts)):
        lines = "\n".join(f"{name} = {size}" for name, size in layout.items())
        recipe = write_recipe(
            f"run-{number}", model, replaced={**ONCE, "[logging]": f"[parallel]\n{lines}\n[logging]"}
        )
        ranks = Layout(**layout).ranks
        trainer = train_on(ranks, recipe)
        assert trainer.codes() == [0] * ranks
    alone = metrics(tmp_path / "run-0")
    assert len(alone) == 4
    for number in range(1, len(layouts) + 1):
        divided = metrics(tmp_path / f"run-{number}")
        losses = [abs(a["loss"] - b["loss"]) for a, b in zip(alone, divided, strict=True)]
        norms = [abs(1 - b["grad_norm"] / a["grad_norm"]) for a, b in zip(alone, divided, strict=True)]
        print(f"{model} {layouts[number - 1]}: losses differ by {max(losses):.1e}, norms {max(norms):.1e}")
        assert [a["rows_digest"] for a in alone] == [b["rows_digest"] for b in divided]
        assert max(losses) < 2e-5
        assert max(norms) < 2e-4


def test_every_family_has_a_plan_and_only_what_cannot_be_divided_is_left_out() -> None:
    assert {family.name for family in families() if family.tensor is None} == set()
    for name, config in SMALL.items():
        try:
            check_layout(family_of(config), config, Layout(tensor=2))
        except Exception:
            assert name in UNDIVIDED, name
        else:
            assert name not in UNDIVIDED, name


@pytest.mark.parametrize("name", quick_or_slow(DIVIDED, QUICK))
def test_a_model_trains_the_same_on_two_tensor_ranks(name, write_recipe, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(MODELS, name, settings(name))
    train_and_compare(write_recipe, tmp_path, name, {"tensor": 2})


@pytest.mark.parametrize("name", quick_or_slow(["llama", "gla", "gated_deltanet", "mamba2"], ("gla",)))
def test_tensor_ranks_beside_shards_and_replicas_train_the_same(
    name, write_recipe, tmp_path: Path, monkeypatch
):
    monkeypatch.setitem(MODELS, name, settings(name))
    layouts = {"tensor": 2, "shard": 2}, {"tensor": 2, "shard": 1, "replicate": 2}
    train_and_compare(write_recipe, tmp_path, name, *layouts)


@pytest.mark.parametrize("name", quick_or_slow(["transformer", "mamba2", "rwkv6", "llama-tied"], ("mamba2",)))
def test_four_tensor_ranks_train_the_same(name, write_recipe, tmp_path: Path, monkeypatch):
    heads = {"num_heads": 4, "num_key_value_heads": 4}
    values = settings(name)
    values |= {key: size for key, size in heads.items() if key in values}
    monkeypatch.setitem(MODELS, name, values)
    train_and_compare(write_recipe, tmp_path, name, {"tensor": 4})


@pytest.mark.slow
def test_compiled_blocks_train_the_same_on_tensor_ranks(write_recipe, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(MODELS, "llama", settings("llama", num_hidden_layers=1))
    monkeypatch.setitem(ONCE, "[tokenizer]", "compile = true\n[tokenizer]")
    train_and_compare(write_recipe, tmp_path, "llama", {"tensor": 2})


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_vocabulary_that_does_not_divide_trains_the_same(tied, write_recipe, tmp_path: Path, monkeypatch):
    values = settings("llama", vocab_size=385, tie_word_embeddings=tied, pad_token_id=380)
    monkeypatch.setitem(MODELS, "llama", values)
    train_and_compare(write_recipe, tmp_path, "llama", {"tensor": 2}, {"tensor": 2, "shard": 2})

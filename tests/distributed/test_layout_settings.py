"""Pairs of ways beside other settings: what goes together trains the same, what does not is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from distributed.layouts import assert_same, named, recipes, trained
from distributed.ranks import metrics, train_on

from flame.parallel.mesh import Layout

recipe_of = pytest.fixture(recipes)

RECOMPUTE = '[memory]\nrecompute = "{}"\n[checkpoint]'
CUT_AND_DIVIDED = {"context": 2, "tensor": 2}
DIVIDED_STAGES = {"tensor": 2, "pipeline": 2}
CUT_STAGES = {"context": 2, "pipeline": 2}
TAKEN_APART = {"tensor": 2, "pipeline": 2, "pipeline_schedule": "zero_bubble"}
VALIDATION = {"[checkpoint]": '[validation]\nevery = "2 steps"\nfraction = 0.2\n[checkpoint]'}
Z_LOSS = {"[checkpoint]": "[loss]\nz_loss = 1e-2\n[checkpoint]"}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["full", "selective"])
@pytest.mark.parametrize("parallel", [CUT_AND_DIVIDED, DIVIDED_STAGES, CUT_STAGES, TAKEN_APART], ids=named)
@pytest.mark.parametrize("family", ["gla", "rwkv7"])
def test_activations_that_are_computed_again_train_the_same(
    family: str, parallel: dict[str, Any], how: str, recipe_of
) -> None:
    """What ranks tell each other in a block, they tell again."""
    alone = trained(recipe_of("alone", family, {}), {})
    replaced = {"[checkpoint]": RECOMPUTE.format(how)}
    found = trained(recipe_of("again", family, parallel, replaced=replaced), parallel)
    assert_same(alone, found, parallel)


@pytest.mark.parametrize(
    "parallel",
    [pytest.param({"context": 2}, marks=pytest.mark.slow), CUT_STAGES, DIVIDED_STAGES],
    ids=named,
)
def test_the_penalty_on_logits_is_counted_once(parallel: dict[str, Any], recipe_of) -> None:
    replaced = Z_LOSS
    alone = trained(recipe_of("alone", "llama", {}, replaced=replaced), {})
    found = trained(recipe_of("laid-out", "llama", parallel, replaced=replaced), parallel)
    assert_same(alone, found, parallel)
    for a, b in zip(alone, found, strict=True):
        assert b["z_loss"] == pytest.approx(a["z_loss"], rel=1e-6) and a["z_loss"] > 0


MUON = 'learning_rate = 3e-3\nname = "muon"\nema = 0.9'


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel", [{"shard": 2, "pipeline": 2}, DIVIDED_STAGES, CUT_AND_DIVIDED, CUT_STAGES], ids=named
)
def test_muon_trains_the_same(parallel: dict[str, Any], recipe_of) -> None:
    replaced = {"learning_rate = 3e-3": MUON}
    alone = trained(recipe_of("alone", "gla", {}, replaced=replaced), {})
    found = trained(recipe_of("laid-out", "gla", parallel, replaced=replaced), parallel)
    assert_same(alone, found, parallel, loss=1e-4, norm=1e-3)  # Muon's bfloat16 rounds the last bit otherwise


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{"shard": 2, "context": 2}], ids=named)
def test_validation_sees_whole_rows_where_training_cuts_them(parallel, recipe_of, tmp_path: Path) -> None:
    replaced = VALIDATION
    alone = trained(recipe_of("alone", "gla", {}, replaced=replaced), {})
    found = trained(recipe_of("laid-out", "gla", parallel, replaced=replaced), parallel)
    assert_same(alone, found, parallel)
    first, second = (validations(tmp_path / run) for run in ("alone", "laid-out"))
    assert len(first) == len(second) > 0
    assert second == pytest.approx(first, abs=1e-6)


def validations(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["event"] == "validation"]


@pytest.mark.parametrize(
    "parallel", [pytest.param({"shard": 2, "pipeline": 2}, marks=pytest.mark.slow), DIVIDED_STAGES], ids=named
)
def test_a_run_branches_off_one_process(parallel: dict[str, Any], recipe_of, tmp_path: Path) -> None:
    trained(recipe_of("trunk", "llama", {}, steps=3), {})
    start = f'start_from = "{tmp_path / "trunk"}@3"\nstart_from_parts = ["model", "optimizer"]'
    replaced = {"seed = 7": f"seed = 7\n{start}"}
    alone = trained(recipe_of("alone", "llama", {}, replaced=replaced), {})
    found = trained(recipe_of("laid-out", "llama", parallel, replaced=replaced), parallel)
    assert_same(alone, found, parallel)


@pytest.mark.parametrize(
    ("family", "parallel", "replaced", "words"),
    [
        (
            "llama",
            {"context": 4, "tensor": 2, "context_method": "heads"},
            {},
            [
                "parallel.context: 4",
                "over parallel.tensor = 2",
                'these do: 1, 2; or context_method = "state"',
            ],
        ),
        ("lightnet", {"context": 4, "tensor": 2}, {}, ["parallel.context: 4", "these do: 1, 2"]),
        (
            "llama",
            {"context": 2, "tensor": 2},
            {
                "sequence_length = 64": "sequence_length = 66",
                "tokens_per_step = 768": "tokens_per_step = 792",
            },
            ["data.sequence_length: found 66", "4 ranks of context x tensor", "take 64 or 68"],
        ),
        ("llama", {"tensor": 3, "pipeline": 2}, {}, ["parallel.tensor: 3", "sizes that do: 1, 2"]),
        ("llama", {"tensor": 2, "pipeline": 4}, {}, ["parallel.pipeline: 4", "2 blocks", "use at most 2"]),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_does(
    family: str,
    parallel: dict[str, Any],
    replaced: dict[str, str],
    words: list[str],
    recipe_of,
    tmp_path: Path,
) -> None:
    recipe = recipe_of("refused", family, parallel, replaced=replaced)
    ranks = Layout(**{way: n for way, n in parallel.items() if way != "context_method"}).ranks
    works = train_on(ranks, recipe)
    assert works.codes() == [1] * ranks
    message = works.error()
    for word in words:
        assert word in message
    assert metrics(tmp_path / "refused") == []

"""A run that is killed and goes on elsewhere is the run that was never disturbed."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from distributed.ranks import metrics, train_on, wait_for_step

from flame.train.journal import read_lines
from flame.train.keeping import saved_steps, step_directory

STEPS = 30
TOLERANCE = 1e-6  # in the loss: on CPU any number of ranks sums to the same bits, but for rare roundings
EXACT = ("step", "tokens", "epoch", "documents", "records_skipped", "rows_digest", "learning_rate")


def undisturbed(recipe: Path, run: Path) -> list[dict[str, object]]:
    assert train_on(1, recipe).codes() == [0]
    return metrics(run)


def refusal(recipe: Path) -> str:
    ranks = train_on(1, recipe)
    assert ranks.codes() == [1]
    return ranks.error()


@pytest.mark.parametrize("model", ["gla", "llama"])
def test_killed_on_two_resumed_on_one_and_on_three_ranks_trains_the_same_rows(
    write_recipe, tmp_path: Path, model: str
) -> None:
    reference = undisturbed(write_recipe("reference", model, STEPS), tmp_path / "reference")
    recipe, run = write_recipe("run", model, STEPS), tmp_path / "run"

    ranks = train_on(2, recipe)
    wait_for_step(run, 10)
    ranks.signal(signal.SIGKILL)
    ranks.codes()
    assert max(saved_steps(run)) < max(r["step"] for r in metrics(run)) < STEPS

    ranks = train_on(1, recipe)
    wait_for_step(run, 18)
    ranks.signal(signal.SIGTERM)
    assert ranks.codes() == [75]
    assert max(saved_steps(run)) == metrics(run)[-1]["step"] < STEPS

    assert train_on(3, recipe).codes() == [0, 0, 0]
    found = metrics(run)
    assert [r["step"] for r in found] == list(range(1, STEPS + 1))
    for a, b in zip(reference, found, strict=True):
        assert [a[k] for k in EXACT] == [b[k] for k in EXACT]
        assert abs(a["loss"] - b["loss"]) < TOLERANCE
    events = [e["event"] for e in read_lines(run / "events.jsonl")]
    assert events.count("start") == 1
    assert events.count("resume") == 2
    assert events[-1] == "done"
    assert list(read_lines(run / "logs" / "superseded.jsonl")), (
        "steps after the last checkpoint are kept aside"
    )


def test_resume_on_the_same_layout_is_bitwise_equal(write_recipe, tmp_path: Path) -> None:
    reference = undisturbed(write_recipe("reference"), tmp_path / "reference")
    recipe, run = write_recipe("run"), tmp_path / "run"
    for stop_at in (6, 13):  # twice: the second resume starts from a resumed run's checkpoint
        ranks = train_on(1, recipe)
        wait_for_step(run, stop_at)
        ranks.signal(signal.SIGTERM)
        assert ranks.codes() == [75]
    assert train_on(1, recipe).codes() == [0]
    keys = (*EXACT, "loss", "grad_norm", "updates_skipped")
    assert [[r[k] for k in keys] for r in metrics(run)] == [[r[k] for k in keys] for r in reference]
    ends = [step_directory(r, STEPS) for r in (run, tmp_path / "reference")]
    manifests = [json.loads((end / "manifest.json").read_text())["files"] for end in ends]
    assert manifests[0]["__0_0.distcp"] == manifests[1]["__0_0.distcp"], (
        "parameters and optimizer, bit by bit"
    )


def test_other_rows_would_be_noticed(write_recipe, tmp_path: Path) -> None:
    one = undisturbed(write_recipe("one", steps=5), tmp_path / "one")
    other = write_recipe("other", steps=5, replaced={"seed = 7": "seed = 8"})
    two = undisturbed(other, tmp_path / "other")
    assert all(a["rows_digest"] != b["rows_digest"] for a, b in zip(one, two, strict=True))


def test_a_broken_checkpoint_is_passed_over_for_the_one_before(write_recipe, tmp_path: Path) -> None:
    recipe, run = write_recipe("run", steps=8), tmp_path / "run"
    reference = undisturbed(recipe, run)
    shard = step_directory(run, 8) / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert train_on(2, recipe).codes() == [0, 0]
    events = list(read_lines(run / "events.jsonl"))
    rejected = [e for e in events if e["event"] == "checkpoint_rejected"]
    assert rejected[0]["step"] == 8
    assert "corrupt" in rejected[0]["why"]
    assert [e["step"] for e in events if e["event"] == "resume"] == [4]
    assert [r["rows_digest"] for r in metrics(run)] == [r["rows_digest"] for r in reference]


def test_a_run_without_a_whole_checkpoint_is_never_begun_again(write_recipe, tmp_path: Path) -> None:
    recipe, run = write_recipe("run", steps=8), tmp_path / "run"
    undisturbed(recipe, run)
    for step in saved_steps(run):
        (step_directory(run, step) / ".metadata").unlink()
    assert "none of its checkpoints is whole" in refusal(recipe)
    assert len(metrics(run)) == 8


def test_another_model_or_other_data_is_refused(write_recipe, tmp_path: Path) -> None:
    recipe, run = write_recipe("run", steps=8), tmp_path / "run"
    undisturbed(recipe, run)
    longer = write_recipe("longer", steps=12, replaced={str(tmp_path / "longer"): str(run)})
    config = tmp_path / "gla.json"
    before = config.read_text()
    config.write_text(before.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    assert "num_hidden_layers" in refusal(longer)
    config.write_text(before)
    moved = tmp_path / "moved"
    shutil.copytree(Path(longer.read_text().split('files = "')[1].split('"')[0]).parent, moved)
    with (moved / "text.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    text = longer.read_text()
    longer.write_text(text.replace(text.split('files = "')[1].split('"')[0], str(moved / "text.jsonl")))
    assert "other data" in refusal(longer)

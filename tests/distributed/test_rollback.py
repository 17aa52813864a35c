"""Bad steps: left out, gone back before, and never trained again."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

from distributed.poison import write_poisoned
from distributed.ranks import metrics, train_on, wait_for_step

from flame.cli import run as flame
from flame.train.journal import read_lines
from flame.train.keeping import saved_steps
from flame.train.rollback import FILE, read_skipped

STEPS = 70
BAD = 50  # a data step, from 0
EXACT = ("step", "tokens", "rows_digest", "learning_rate", "loss", "grad_norm")


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [e for e in read_lines(run / "events.jsonl") if e["event"] == name]


def digests(run: Path) -> list[str]:
    return [record["rows_digest"] for record in metrics(run)]


def stream(write_recipe, tmp_path: Path, steps: int) -> list[str]:
    """The digests of the row stream, data step by data step."""
    recipe = write_poisoned(write_recipe, "sound", steps, {})
    assert train_on(1, recipe).codes() == [0]
    assert not events(tmp_path / "sound", "rollback")
    return digests(tmp_path / "sound")


def test_an_update_that_is_not_finite_is_left_out_with_its_rows_named(write_recipe, tmp_path: Path) -> None:
    recipe = write_poisoned(write_recipe, "run", 12, {5: "nan"})
    assert train_on(2, recipe).codes() == [0, 0]
    (skipped,) = events(tmp_path / "run", "update_skipped")
    assert (skipped["step"], skipped["data_step"], skipped["rows"]) == (6, 5, [60, 72])
    assert (skipped["loss"], skipped["grad_norm"]) == (None, None)
    found = metrics(tmp_path / "run")
    assert [r["updates_skipped"] for r in found] == [0] * 5 + [1] * 7
    assert [r["step"] for r in found] == list(range(1, 13))
    assert not (tmp_path / "run" / FILE).exists()


def test_a_spike_takes_all_ranks_back_and_its_rows_are_never_trained_again(
    write_recipe, tmp_path: Path
) -> None:
    recipe, run = write_poisoned(write_recipe, "run", STEPS, {BAD: "300"}), tmp_path / "run"
    ranks = train_on(2, recipe)
    while not events(run, "rollback"):
        wait_for_step(run, 1)
    (gone_back,) = events(run, "rollback")
    assert (gone_back["step"], gone_back["steps"]) == (51, [36, 52])
    assert gone_back["rows"] == [35 * 12, 51 * 12]
    assert "above" in gone_back["why"]
    wait_for_step(run, 40)
    while len(metrics(run)) > 45:  # until the metrics begin again
        pass
    wait_for_step(run, 46)
    ranks.signal(signal.SIGKILL)  # a later resume honours it, too
    ranks.codes()
    assert train_on(1, recipe).codes() == [0]
    skipped = read_skipped(run)
    assert len(skipped.ranges) == 1
    expected = stream(write_recipe, tmp_path, STEPS + 16)
    assert digests(run) == [expected[d] for d in (*range(35), *range(51, STEPS + 16))]
    assert [r["step"] for r in metrics(run)] == list(range(1, STEPS + 1))
    names = [p.name for p in sorted((run / "checkpoints").iterdir())]
    assert "step-00000048.rolled-back" in names
    assert "step-00000036.rolled-back" in names
    assert events(run, "resume")[0]["step"] < 36
    assert (
        json.loads((run / "checkpoints" / f"step-{STEPS:08d}" / "data.json").read_text())["skipped_rows"]
        == json.loads((run / FILE).read_text())["ranges"]
    )


def test_preview_of_a_run_shows_what_it_trains(write_recipe, tmp_path: Path, capsys) -> None:
    recipe, run = write_poisoned(write_recipe, "run", 6, {}), tmp_path / "run"
    run.mkdir()
    bad = {"rows": [24, 48], "data_steps": [2, 4], "steps": [3, 5], "why": "", "time": 0.0}
    (run / FILE).write_text(json.dumps({"ranges": [bad]}))

    def shown(steps: str, *options: str) -> list[Any]:
        capsys.readouterr()
        assert flame(["data", "preview", str(recipe), "--steps", steps, "--json", *options]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    whole = [step["rows"] for step in shown("0:7")]
    left = shown("1:5", "--run", str(run), "--ranks", "2")
    assert [step["step"] for step in left] == [1, 2, 3, 4]
    assert [step["rows"] for step in left] == [whole[1], whole[4], whole[5], whole[6]]


def test_a_branch_passes_over_what_its_trunk_skips(write_recipe, tmp_path: Path) -> None:
    recipe, trunk = write_poisoned(write_recipe, "trunk", 10, {}), tmp_path / "trunk"
    assert train_on(1, recipe).codes() == [0]
    bad = {"rows": [108, 132], "data_steps": [9, 11], "steps": [10, 12], "why": "", "time": 0.0}
    (trunk / FILE).write_text(json.dumps({"ranges": [bad]}))  # after the checkpoint of step 8
    run = tmp_path / "run"
    lines = f'start_from = "{trunk}@8"\nstart_from_parts = ["model", "data"]\n[model]'
    replaced = {"[model]": lines, 'every = "4 steps"': 'every = "20 steps"'}
    settings = "[recovery]\nskipped_updates = 0\nmax_rollbacks = 1\n"
    branch = write_poisoned(write_recipe, "run", 16, {14: "nan"}, settings, replaced)
    assert train_on(2, branch).codes() == [0, 0]
    expected = stream(write_recipe, tmp_path, 26)
    (gone_back,) = events(run, "rollback")  # step 13, before which the run itself has begun with step 9
    assert gone_back["steps"] == [9, 14]
    assert digests(run) == expected[15:23]
    assert [r.inherited for r in read_skipped(run).ranges] == [True, False]
    assert read_skipped(run).trained(range(8, 16)) == list(range(15, 23))


def test_a_rollback_that_a_crash_cut_short_is_done_by_the_next_start(write_recipe, tmp_path: Path) -> None:
    recipe, run = write_poisoned(write_recipe, "run", 10, {}), tmp_path / "run"
    longer = write_poisoned(write_recipe, "longer", 30, {}, replaced={str(tmp_path / "longer"): str(run)})
    module = str(recipe.with_suffix(".py"))
    longer.write_text(longer.read_text().replace(str(longer.with_suffix(".py")), module))
    assert train_on(1, recipe).codes() == [0]
    assert saved_steps(run) == [4, 8, 10]
    bad = {"rows": [84, 120], "data_steps": [9, 10], "steps": [10, 11], "why": "", "time": 0.0}
    (run / FILE).write_text(json.dumps({"ranges": [bad]}))
    assert train_on(1, longer).codes() == [0]
    assert events(run, "resume")[0]["step"] == 8
    expected = stream(write_recipe, tmp_path, 31)
    assert digests(run) == [expected[d] for d in (*range(9), *range(10, 31))]


def test_too_many_bad_updates_take_the_run_back_and_too_many_rollbacks_end_it(
    write_recipe, tmp_path: Path
) -> None:
    settings = "[recovery]\nskipped_updates = 1\nmax_rollbacks = 1\n"
    poison = {20: "nan", 23: "nan", 40: "nan", 42: "nan"}
    recipe, run = write_poisoned(write_recipe, "run", STEPS, poison, settings), tmp_path / "run"
    ranks = train_on(2, recipe)
    assert ranks.codes() == [1, 1]  # of these test ranks; a supervised one says 4
    said = ranks.error()
    (gone_back,) = events(run, "rollback")
    assert (gone_back["step"], gone_back["steps"]) == (24, [9, 25])
    assert [e["step"] for e in events(run, "update_skipped")] == [21, 24, 25, 27]
    assert "gone back 1 time(s) already" in said
    assert "flame data preview" in said


def test_a_resumed_run_judges_a_spike_as_an_undisturbed_one(write_recipe, tmp_path: Path) -> None:
    recipe, run = write_poisoned(write_recipe, "run", STEPS, {BAD: "300"}), tmp_path / "run"
    ranks = train_on(1, recipe)
    wait_for_step(run, 35)
    ranks.signal(signal.SIGTERM)
    assert ranks.codes() == [75]
    assert metrics(run)[-1]["step"] < BAD
    assert train_on(1, recipe).codes() == [0]
    (gone_back,) = events(run, "rollback")
    undisturbed = write_poisoned(write_recipe, "undisturbed", STEPS, {BAD: "300"})
    assert train_on(1, undisturbed).codes() == [0]
    (as_undisturbed,) = events(tmp_path / "undisturbed", "rollback")
    assert gone_back["why"] == as_undisturbed["why"]
    figures = [[[r[k] for k in EXACT] for r in metrics(tmp_path / name)] for name in ("run", "undisturbed")]
    assert figures[0] == figures[1]

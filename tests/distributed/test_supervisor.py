"""`flame train` as people start it: killed, stopped and broken in every way, it goes on or says why not,
and no process outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed.ranks import metrics, train_on, wait_for_step

from flame.train.journal import read_lines
from flame.train.keeping import saved_steps

RANKS = 2
STEPS = 60
# a row for each rank, few checkpoints
SMALL_STEPS = {
    "tokens_per_step = 768": "tokens_per_step = 128",
    'every = "4 steps"': 'every = "10 steps"',
}
EXACT = ("step", "tokens", "documents", "rows_digest", "learning_rate", "loss", "grad_norm")


class Launcher:
    """`flame train` as a process of its own, whose offspring carries a mark in its environment."""

    def __init__(self, recipe: Path, *options: str, command: tuple[str, ...] = ("-m", "flame")) -> None:
        self.mark = f"TEST_MARK={uuid.uuid4().hex}"
        self.output = recipe.with_suffix(".out")
        name, _, value = self.mark.partition("=")
        with self.output.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, *command, "train", str(recipe), *options],
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {name: value, "OMP_NUM_THREADS": "1"},
            )

    def code(self, timeout: float = 60) -> int:
        return self.process.wait(timeout)

    def said(self) -> str:
        return self.output.read_text()

    def alive(self) -> list[int]:
        """Processes of this start that live, itself included."""
        return [int(p.name) for p in Path("/proc").glob("[0-9]*") if self.mark in environment_of(p)]

    def assert_nothing_lives(self, within: float = 2) -> None:
        deadline = time.monotonic() + within
        while left := self.alive():
            assert time.monotonic() < deadline, f"processes {left} of a stopped run still live"
            time.sleep(0.02)


def environment_of(process: Path) -> str:
    try:
        zombie = (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        return "" if zombie else (process / "environ").read_text(errors="replace")
    except OSError:  # it has just gone, or is not ours
        return ""


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture
def launch(request: pytest.FixtureRequest) -> Callable[..., Launcher]:
    """Starts launchers that do not outlive the test."""

    def start(*args: Any, **kwargs: Any) -> Launcher:
        launcher = Launcher(*args, **kwargs)
        request.addfinalizer(lambda: (launcher.process.kill(), launcher.process.wait()))
        return launcher

    return start


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [e for e in read_lines(run / "events.jsonl") if e["event"] == name]


def pids(run: Path) -> list[int]:
    """Of the ranks that train now, in their order."""
    return beginnings(run)[-1]["pids"]


def beginnings(run: Path) -> list[dict[str, Any]]:
    """Of the whole run, and after each interruption; a crash before the first checkpoint starts anew."""
    return [*events(run, "start"), *events(run, "resume")]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[Any]]]:
    """Where the undisturbed run's figures are kept, once some test has made them."""
    return {}


def assert_is_undisturbed(run: Path, write_recipe: Any, reference: dict[str, list[list[Any]]]) -> None:
    """The run's figures are, bit by bit, those of a run on as many ranks that nothing befell."""
    if not reference:
        recipe = write_recipe("undisturbed", steps=STEPS, replaced=SMALL_STEPS)
        assert train_on(RANKS, recipe).codes() == [0] * RANKS
        reference["rows"] = figures(run.parent / "undisturbed")
    assert figures(run) == reference["rows"]


def figures(run: Path) -> list[list[Any]]:
    return [[record[key] for key in EXACT] for record in metrics(run)]


def test_a_killed_rank_is_named_and_the_run_ends_as_if_nothing_had_happened(
    write_recipe, tmp_path: Path, launch, reference
) -> None:
    recipe, run = write_recipe(steps=STEPS, replaced=SMALL_STEPS), tmp_path / "run"
    launcher = launch(recipe, "--nproc", str(RANKS))
    wait_for_step(run, 10)
    victim = pids(run)[1]
    os.kill(victim, signal.SIGKILL)
    assert launcher.code() == 0
    launcher.assert_nothing_lives()
    (lost,) = events(run, "rank_lost")
    assert (lost["rank"], lost["pid"], lost["how"]) == (1, victim, "SIGKILL")
    assert lost["step"] >= 10
    assert [e["attempt"] for e in events(run, "restart")] == [1]
    assert len(beginnings(run)) == 2
    assert "rank 1 was lost (SIGKILL)" in launcher.said()
    assert_is_undisturbed(run, write_recipe, reference)

    before = (run / "metrics.jsonl").read_bytes(), (run / "events.jsonl").read_bytes()
    again = launch(recipe, "--nproc", str(RANKS))
    assert again.code() == 0
    assert again.said() == f"{run} is finished: step {STEPS} of {STEPS}\n"
    assert ((run / "metrics.jsonl").read_bytes(), (run / "events.jsonl").read_bytes()) == before


@pytest.mark.parametrize("warm_parent_too", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_killed_launcher_leaves_no_process_and_the_run_goes_on(
    write_recipe, tmp_path: Path, launch, reference, warm_parent_too: bool
) -> None:
    recipe, run = write_recipe(steps=STEPS, replaced=SMALL_STEPS), tmp_path / "run"
    launcher = launch(recipe, "--nproc", str(RANKS))
    wait_for_step(run, 6)
    if warm_parent_too:  # it takes its ranks with it; another one takes its place
        (warm,) = {parent_of(pid) for pid in pids(run)}
        assert warm != launcher.process.pid
        os.kill(warm, signal.SIGKILL)
        wait_for_step(run, metrics(run)[-1]["step"] + 6)
        assert len(events(run, "rank_lost")) == 1
        assert len(beginnings(run)) == 2
    assert len(launcher.alive()) >= 2 + RANKS
    launcher.process.kill()
    launcher.code()
    launcher.assert_nothing_lives()
    assert metrics(run)[-1]["step"] < STEPS, "it was killed in the middle"
    assert train_on(RANKS, recipe).codes() == [0] * RANKS
    assert_is_undisturbed(run, write_recipe, reference)


def test_sigterm_ends_with_75_and_a_checkpoint_of_the_last_step(
    write_recipe, tmp_path: Path, launch, reference
) -> None:
    recipe, run = write_recipe(steps=STEPS, replaced=SMALL_STEPS), tmp_path / "run"
    launcher = launch(recipe, "--nproc", str(RANKS))
    wait_for_step(run, 6)
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.code(30) == 75
    launcher.assert_nothing_lives()
    assert 6 <= metrics(run)[-1]["step"] == saved_steps(run)[-1] < STEPS
    assert [e["signal"] for e in events(run, "signal")] == ["SIGTERM"]
    assert not events(run, "restart")
    assert not events(run, "failed")
    assert train_on(RANKS, recipe).codes() == [0] * RANKS
    assert_is_undisturbed(run, write_recipe, reference)


@pytest.mark.parametrize(
    "begun",
    [
        pytest.param(lambda launcher, run: len(launcher.alive()) >= 2, id="while-importing"),
        # the launcher, its warm parent and the tracker of that, and the first rank
        pytest.param(lambda launcher, run: len(launcher.alive()) >= 4, id="while-forking"),
        pytest.param(
            lambda launcher, run: (run / "lock").exists(), id="while-building", marks=pytest.mark.slow
        ),
    ],
)
def test_sigterm_before_the_first_step_ends_with_75_at_once(
    write_recipe, tmp_path: Path, launch, begun: Callable[[Launcher, Path], bool]
) -> None:
    recipe, run = write_recipe(steps=10_000), tmp_path / "run"
    launcher = launch(recipe, "--nproc", str(RANKS))
    while not begun(launcher, run):
        assert launcher.process.poll() is None, launcher.said()
        time.sleep(0.005)
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.code(10) == 75, launcher.said()
    launcher.assert_nothing_lives()
    assert "Traceback" not in launcher.said()


def test_a_bug_ends_with_3_after_few_restarts_and_says_where_to_look(
    write_recipe, tmp_path: Path, launch
) -> None:
    recipe, run = write_recipe(model="llama"), tmp_path / "run"
    config = json.loads((tmp_path / "llama.json").read_text())
    # builds, and fails in its first forward pass: 3 heads of keys for 4 of queries
    config |= {"num_attention_heads": 4, "num_key_value_heads": 3}
    (tmp_path / "llama.json").write_text(json.dumps(config))
    launcher = launch(recipe, "--nproc", str(RANKS))
    assert launcher.code() == 3
    launcher.assert_nothing_lives()
    assert metrics(run) == []
    assert len(events(run, "rank_lost")) == 3
    assert len(events(run, "restart")) == 2
    assert events(run, "failed")
    said = launcher.said()
    assert said.count("starting again") == 2
    assert said.count("giving up") == 1
    assert "training failed" in said
    assert str(run / "logs") in said
    assert "Traceback" in (run / "logs" / "rank-1.log").read_text()


@pytest.mark.slow
def test_under_torchrun_it_joins_and_trains(write_recipe, tmp_path: Path, launch, reference) -> None:
    recipe, run = write_recipe(steps=STEPS, replaced=SMALL_STEPS), tmp_path / "run"
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), "-m", "flame")
    launcher = launch(recipe, command=torchrun)
    assert launcher.code(180) == 0, launcher.said()
    assert [e["ranks"] for e in events(run, "start")] == [RANKS]
    assert_is_undisturbed(run, write_recipe, reference)

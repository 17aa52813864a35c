"""The benchmarks of the data plane run, and print JSON with the figures that the tables show."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def ran(script: str, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARKS / script), "--quick", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("script", ["packing", "shuffle", "resume", "gil", "memory"])
def test_a_benchmark_prints_its_figures_with_the_machine(script: str, tmp_path: Path) -> None:
    folder = [] if script == "shuffle" else ["--folder", str(tmp_path / "made")]
    result = ran(f"{script}.py", "--json", str(tmp_path / "out.json"), *folder)
    assert result == json.loads((tmp_path / "out.json").read_text())
    assert {"processor", "cores", "load", "python", "packages", script} <= result.keys()
    figures = result[script]
    if script == "packing":
        assert {row["documents"] for row in figures} == {"files", "web-like"}
        assert all(row["waste"] == 0 and row["cut"] < row["chopped_cut"] for row in figures)
    if script == "shuffle":
        assert all(0 < row["variance_ratio"] < 3 for row in figures)
    if script == "resume":
        assert figures["resume_seconds"].keys() == {"1%", "50%", "99%"}
        assert figures["reached"]["exact"]
    if script == "gil":
        assert figures["python_us"] > 0 and figures["tokens_per_second"] > 0
    if script == "memory":
        assert figures["resident_mib"].keys() == {"100", "150", "300"}


def test_the_loader_is_compared_in_processes_that_resume_and_share_rows(tmp_path: Path) -> None:
    result = ran("data.py", "--rivals", "flame/tokenizers", "--folder", str(tmp_path))
    (backend,), (loader,) = result["results"], result["loaders"]
    assert backend["backend"] == "tokenizers"
    assert backend["share_of_tokenizer"] > 0
    assert "error" not in loader
    assert loader["tokens_per_second"] > 0
    assert [part["exact"] for part in loader["resume"].values()] == [True, True]
    assert loader["same_rows_on_two_ranks"] == loader["resumed_on_two_ranks"] == "yes"


@pytest.mark.slow
def test_a_short_campaign_of_faults_loses_nothing_and_goes_on_where_it_was(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "faults.py"), "--folder", str(tmp_path)]
    for faults, kinds in ((2, "kill,crash_in_save"), (4, "corrupt,disk_full")):
        options = ["--faults", str(faults), "--kinds", kinds]
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 0, done.stderr
    found = {row["kind"]: row for row in json.loads(done.stdout)["faults"]}
    assert found.keys() == {"kill", "crash_in_save", "corrupt", "disk_full"}
    assert all(row["survived"] == row["count"] == 1 for row in found.values()), found

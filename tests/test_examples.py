"""The examples run, and do what they say."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys) -> list[str]:
    """The lines that an example prints."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_the_data_plane_in_another_loop_goes_on_where_it_stopped(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def steps(count: int, saved: str) -> list[str]:
        data = [str(text_folder / "*.jsonl"), str(text_folder / "tokenizer")]
        name = "data_in_your_own_loop.py"
        return run(name, [*data, str(count), str(tmp_path / saved)], monkeypatch, capsys)

    whole = steps(9, "whole.pt")
    assert [line.split(":")[0] for line in whole] == [f"step {n}" for n in range(9)]
    losses = [float(line.split()[-1]) for line in whole]
    assert losses[-1] < losses[0]
    assert steps(4, "parts.pt") + steps(5, "parts.pt") == whole


def test_an_example_is_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert path.read_text().count("\n") < 60, path

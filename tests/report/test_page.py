"""The page holds what the run was, and needs nothing outside itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report.recorded_run import RunWriter

from flame import cli
from flame.commands.report import report
from flame.errors import Exit, FlameError
from flame.report.attempts import Mark
from flame.report.pieces import big, duration
from flame.report.plots import LABEL_ROWS, place_labels
from flame.train.journal import append_line

New = Callable[[str], RunWriter]
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Reader(HTMLParser):
    """Collects text and attributes; fails where a tag is closed that was not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style" and data.strip():
            self.words.append(data.strip())


def read(run: Path) -> tuple[str, Reader]:
    assert report(str(run), None) == Exit.DONE
    text = (run / "report.html").read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    return text, reader


def test_the_page_shows_figures_marks_and_tables(interrupted: Path) -> None:
    text, reader = read(interrupted)
    for expected in (
        "interrupted",
        "done",
        "of 12 (100.0 %)",
        "36,864",
        "4.8000",
        "36 s",
        "and 1 resumed by hand",
    ):
        assert expected in reader.words
    for label in ("4 restart, resume", "6 rank lost", "8 signal, resume"):
        assert label in reader.words
    assert text.count("<svg") == 6
    assert "2 logged steps lost to an interruption and trained again" in text
    for meaning in ("training", "lost", "starting", "saving", "recovery", "stopped"):
        assert meaning in reader.words
    assert "rank 1, pid 12, how SIGKILL" in reader.words
    assert "torch 2.13.0+cpu" in reader.words
    assert any("tokens_per_step = 3072" in word for word in reader.words)


def test_the_page_references_nothing_outside_itself(interrupted: Path) -> None:
    text, reader = read(interrupted)
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link|<img", text.replace("/somewhere", ""))
    for tag, name, value in reader.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith("#"), (tag, name, value)
        assert all(found.startswith("#") for found in re.findall(r"url\(([^)]*)\)", value))
    ids = [value for _, name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_sources_are_shown_with_their_share_and_what_their_weight_asks_for(interrupted: Path) -> None:
    _, reader = read(interrupted)
    words = reader.words[reader.words.index("by weight") :]
    web, code = words.index("web"), words.index("code")
    assert words[web : web + 8] == ["web", "24,576", "66.7 %", "54.2 %", "84", "2", "3", "4,321"]
    assert words[code : code + 8] == ["code", "12,288", "33.3 %", "45.8 %", "12", "0", "0", "5"]


def test_text_of_the_run_is_escaped(interrupted: Path) -> None:
    text, reader = read(interrupted)
    assert "<run>" not in text and "a <CPU>" in reader.words


def test_values_that_are_not_finite_are_gaps_and_said(new_run: New) -> None:
    run = new_run("nulls")
    run.event(0, "start", step=0)
    for step in range(1, 6):
        run.step(step, loss=None if step > 2 else 5.0, grad_norm=None, step_seconds=None, updates_skipped=3)
    text, reader = read(run.path)
    assert "The loss was not finite at 3 logged steps (3, 4, 5): gaps in the curve." in reader.words
    assert "3 updates left out for a gradient that was not finite." in reader.words
    assert "not finite" in reader.words
    assert ">nan<" not in text.lower()


def test_a_run_without_a_step_says_so(new_run: New) -> None:
    run = new_run("empty")
    text, reader = read(run.path)
    assert "no step yet" in reader.words
    assert "No step has been logged yet: there are no curves." in reader.words
    assert "<svg" not in text


def test_a_run_that_is_starting_says_so(new_run: New) -> None:
    run = new_run("starting")
    run.event(0, "start", step=0, ranks=1)
    assert "no step yet" in read(run.path)[1].words


def test_a_running_run_is_shown_as_it_is(new_run: New) -> None:
    run = new_run("running")
    run.event(0, "start", step=0, ranks=1)
    run.step(1)
    _, reader = read(run.path)
    assert "running" in reader.words and "last loss" in reader.words
    assert any(word.startswith("This page shows the run as it was") for word in reader.words)


def test_a_directory_that_is_no_run_is_an_error_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["report", str(tmp_path)]) == Exit.WRONG_INPUT
    assert "no run here" in capsys.readouterr().err


def test_the_page_goes_where_it_is_told(interrupted: Path, tmp_path: Path) -> None:
    target = tmp_path / "pages" / "run.html"
    assert report(str(interrupted), str(target)) == Exit.DONE
    assert target.read_text().endswith("</html>\n")
    assert [p.name for p in target.parent.iterdir()] == ["run.html"]
    with pytest.raises(FlameError, match="is a directory"):
        report(str(interrupted), str(tmp_path))


def test_no_label_is_crossed_by_the_line_of_another() -> None:
    marks = [Mark(step, "rank_lost") for step in (10, 11, 12, 13, 14, 15, 50, 99)]
    labels = place_labels(marks, (0, 100), 700)
    assert {label.step for label in labels} >= {50, 99}
    for label in labels:
        assert label.row < LABEL_ROWS
        if not label.to_left:
            covered = [o for o in labels if label.step < o.step <= label.step + 6 and not o.to_left]
            assert all(other.row < label.row for other in covered)


def test_quantities_are_written_as_people_read_them() -> None:
    written = [duration(s) for s in (0.021, 34.2, 125, 12_000, 187_200)]
    assert written == ["0.02 s", "34 s", "2 min 05 s", "3 h 20 min", "2 d 04 h"]
    assert [big(n) for n in (512, 184_320, 20_971_520_000)] == ["512", "184 k", "21.0 B"]


def validated(run: RunWriter, after: float, step: int, loss: float | None, **more: object) -> None:
    """A validation of a second and a half."""
    figures = {"loss": loss, "bits_per_byte": 1.25, "predicted": 1000, "bytes": 4200, "documents": 7}
    sources = {name: {**figures, "loss": 4.5} for name in ("web", "<code>")}
    run.event(after, "validation", step=step, seconds=1.5, **figures, sources=sources, **more)


def test_validations_are_drawn_and_told_by_source(new_run: New) -> None:
    run = new_run("validated")
    run.event(0, "start", step=0)
    for step in range(1, 5):
        run.step(step)
    validated(run, 4.5, 2, 5.0)
    validated(run, 6, 4, 4.0)
    run.event(6.5, "resume", step=2)  # what was measured after step 4 is lost
    validated(run, 9, 3, 4.75)
    validated(run, 10, 4, 4.9, hook={"<accuracy>": 0.5})
    _, reader = read(run.path)
    assert "With dots: on the held out documents." in " ".join(reader.words)
    caption = next(
        word for word in reader.words if word.startswith("3 validations; the last one after step 4.")
    )
    assert "The lowest loss, 4.7500, was after step 3." in caption
    row = reader.words.index("all")
    assert reader.words[row : row + 6] == ["all", "4.9000", "1.2500", "1,000", "4,200", "7"]
    assert "<code>" in reader.words and "The hook: <accuracy> 0.5" in reader.words
    assert "4 validations, each in 1.50 s" in " ".join(reader.words)


def test_samples_are_shown_over_the_run(new_run: New) -> None:
    run = new_run("samples")
    run.step(1)
    for step in range(0, 100, 10):
        append_line(run.path / "samples.jsonl", {"step": step, "prompt": "<a>", "text": f"text {step}"})
    _, reader = read(run.path)
    shown = [word for word in reader.words if word.startswith("text ")]
    assert shown == ["text 0", "text 20", "text 40", "text 50", "text 70", "text 90"]
    assert reader.words.count("<a>") == 1


def test_status_shows_the_last_validation(new_run: New, capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run("status")
    run.step(1)
    validated(run, 1, 1, None)
    assert cli.run(["status", str(run.path)]) == 0
    said = capsys.readouterr().out
    assert "validation   step 1: loss none, 1.2500 bits per byte, web 4.5000, <code> 4.5000" in said

"""A run goes on with changed files when it is told to, and notes what changed."""

from __future__ import annotations

import shutil
from pathlib import Path

from distributed.ranks import metrics, train_on

from flame.train.journal import read_lines


def test_a_run_goes_on_with_appended_files_where_that_is_accepted(
    write_recipe, text_folder: Path, tmp_path: Path
) -> None:
    here = tmp_path / "data"
    here.mkdir()
    shutil.copy(text_folder / "text.jsonl", here)
    files = {str(text_folder / "text.jsonl"): str(here / "*.jsonl")}
    assert train_on(1, write_recipe("run", steps=5, replaced=files)).codes() == [0]
    (here / "more.jsonl").write_text('{"text": "one more document"}\n')

    same_run = files | {str(tmp_path / "longer"): str(tmp_path / "run")}
    longer = write_recipe("longer", steps=8, replaced=same_run)
    ranks = train_on(2, longer)
    assert ranks.codes() == [1, 1]
    assert "--data.accept-changed-sources" in ranks.error()

    accepting = same_run | {"[data]": "[data]\naccept_changed_sources = true"}
    assert train_on(2, write_recipe("longer", steps=8, replaced=accepting)).codes() == [0, 0]
    assert [r["step"] for r in metrics(tmp_path / "run")] == list(range(1, 9))
    events = list(read_lines(tmp_path / "run" / "events.jsonl"))
    changed = [e for e in events if e["event"] == "sources_changed"]
    assert [(e["step"], e["changes"]) for e in changed] == [(5, ['source "python": more.jsonl is new'])]

    again = write_recipe("longer", steps=9, replaced=same_run)
    assert train_on(1, again).codes() == [0], "it is asked once"

"""Writes a run directory as a trainer does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flame.train.journal import append_line, replace_file

BEGAN = 1_700_000_000.0
STEP_SECONDS = 1.0
PAUSE_SECONDS = 0.25
RECIPE = """
[run]
directory = "/somewhere/<run> & co"
seed = 7
steps = 12
[model]
config = "model.json"
[tokenizer]
path = "tokenizer"
[data]
sequence_length = 256
[[data.sources]]
name = "web"
files = ["web.jsonl"]
text = "text"
weight = 3.0
[[data.sources]]
name = "code"
files = ["code.jsonl"]
text = "text"
weight = 1.0
[[data.phases]]
at = "4 steps"
weights = { code = 9.0 }
[batch]
tokens_per_step = 3072
[optimizer]
learning_rate = 2e-3
[schedule]
warmup = "5 steps"
"""


def step_line(step: int, **changed: Any) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    return {
        "step": step,
        "tokens": 3072 * step,
        "epoch": 0,
        "loss": 6.0 - 0.1 * step,
        "grad_norm": 0.5,
        "learning_rate": 2e-3,
        "tokens_per_second": 3072.0,
        "mfu": None,
        "step_seconds": STEP_SECONDS,
        "data_seconds": 0.25,
        "memory_gib": None,
        "documents": step,
        "records_skipped": 0,
        "updates_skipped": 0,
        "documents_cut": 0,
        "rows_digest": "00ff",
        "sources": {
            "web": {"tokens": 2048 * step, "documents": 7 * step, "epoch": 2, "skipped": 3, "cut": 4321},
            "code": {"tokens": 1024 * step, "documents": step, "epoch": 0, "skipped": 0, "cut": 5},
        },
        **changed,
    }


class RunWriter:
    """Writes the files of a run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        replace_file(path / "recipe.toml", RECIPE.encode())

    def environment(self) -> None:
        text = '{"flame": "0.1.0", "git": null, "packages": {"torch": "2.13.0+cpu"}, "device": "a <CPU>"}'
        replace_file(self.path / "environment.json", text.encode())

    def step(self, step: int, **changed: Any) -> None:
        append_line(self.path / "metrics.jsonl", step_line(step, **changed))

    def superseded(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            append_line(self.path / "logs" / "superseded.jsonl", step_line(step))

    def event(self, after: float, name: str, **fields: Any) -> None:
        append_line(self.path / "events.jsonl", {"time": BEGAN + after, "event": name, **fields})

    def saved(self, after: float, step: int) -> None:
        self.event(after, "checkpoint_saved", step=step, seconds=0.5, pause_seconds=PAUSE_SECONDS)

"""`flame report`: a run's curves and events as one HTML page."""

from __future__ import annotations

import time
from pathlib import Path

from flame.commands.status import state
from flame.errors import Exit, FlameError
from flame.report.history import read_history
from flame.report.page import page
from flame.train.journal import read_lines, replace_file


def report(run: str, to: str | None) -> Exit:
    """Writes the page of a run directory, to RUN/report.html unless told otherwise.

    Raises FlameError where there is no run or the page cannot be written.
    """
    path = Path(run)
    target = Path(to) if to is not None else path / "report.html"
    history = read_history(path)
    now = state(path, list(read_lines(path / "metrics.jsonl")), list(read_lines(path / "events.jsonl")))
    text = page(history, now, time.time())
    if target.is_dir():
        raise FlameError(
            f"{target} is a directory; give --to the name of a file, such as {target}/report.html"
        )
    try:
        replace_file(target, text.encode())
    except OSError as error:
        raise FlameError(f"{target} cannot be written: {error.strerror}; give another --to FILE") from None
    print(f"{target}: {len(text.encode()) / 1024:.0f} KiB")
    return Exit.DONE

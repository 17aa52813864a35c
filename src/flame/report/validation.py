"""What a run's validations measured, and what its model wrote at them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from flame.report.history import History
from flame.report.pieces import counted, number, section, table

SHOWN_SAMPLES = 6  # of a prompt: the first, the last, and some between


def losses_of(history: History) -> list[tuple[int, float]]:
    """(step, loss) of each validation; NaN where it was not finite."""
    found = [(one["step"], one["loss"]) for one in history.validations]
    return [(step, math.nan if loss is None else float(loss)) for step, loss in found]


def validation_section(history: History) -> str:
    """The last validation and the best one, in all and by source; empty where there is none."""
    if not history.validations:
        return ""
    last = history.validations[-1]
    finite = [one for one in history.validations if one["loss"] is not None]
    best = min(finite, key=lambda one: one["loss"]) if finite else None
    several = len(last["sources"]) > 1
    rows = [_row("all" if several else next(iter(last["sources"])), last)]
    if several:
        rows += [_row(name, figures) for name, figures in last["sources"].items()]
    caption = (
        f"{counted(len(history.validations), 'validation')}; the last one after step {last['step']:,}. Per "
        "predicted token, and in bits per byte of the text that these tokens stand for."
    )
    if best is not None and best is not last:
        caption += f" The lowest loss, {best['loss']:.4f}, was after step {best['step']:,}."
    heads = [
        number(head, "th") for head in ("loss", "bits per byte", "predicted tokens", "bytes", "documents")
    ]
    below = _hook(last)
    return section("Validation", caption, table(["source", *heads], rows) + below)


def _row(name: str, figures: dict[str, Any]) -> list[str]:
    counts = [number(f"{figures[key]:,}") for key in ("predicted", "bytes", "documents")]
    return [escape(name), number(_shown(figures["loss"])), number(_shown(figures["bits_per_byte"])), *counts]


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _hook(last: dict[str, Any]) -> str:
    """What the hook returned with the last validation, or why it did not."""
    if last.get("hook_error"):
        return f'<p class="caption bad">The hook failed: {escape(str(last["hook_error"]))}</p>'
    numbers = last.get("hook") or {}
    if not numbers:
        return ""
    said = ", ".join(f"{escape(str(name))} {value}" for name, value in numbers.items())
    return f'<p class="caption">The hook: {said}</p>'


def samples_section(history: History) -> str:
    """What the model wrote after each prompt, over the run; empty where it wrote nothing."""
    written: dict[str, dict[int, str]] = {}
    for line in history.samples:
        written.setdefault(str(line["prompt"]), {})[int(line["step"])] = str(line["text"])
    rows = [
        [
            escape(prompt) if i == 0 else "",
            number(f"{step:,}"),
            f'<td class="sample">{escape(texts[step])}</td>',
        ]
        for prompt, texts in written.items()
        for i, step in enumerate(spread(sorted(texts)))
    ]
    if not rows:
        return ""
    caption = "The likeliest continuation of each prompt, some steps of the run; samples.jsonl has all."
    return section("Samples", caption, table(["prompt", number("step", "th"), "continuation"], rows))


def spread(steps: Sequence[int]) -> list[int]:
    """At most SHOWN_SAMPLES of them, evenly, the first and the last among them."""
    if len(steps) <= SHOWN_SAMPLES:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (SHOWN_SAMPLES - 1))] for i in range(SHOWN_SAMPLES)]

"""Pieces of a page: sections, tables, and numbers as a reader writes them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable
from typing import Any


def section(title: str, caption: str, body: str, *, wide: bool = False) -> str:
    said = f'<p class="caption">{caption}</p>' if caption else ""
    if "<svg" in body:
        svg, _, rest = body.partition("</svg>")
        body = f'<div class="chart{" wide" if wide else ""}">{svg}</svg></div>{rest}'
    return f"<section><h2>{title}</h2>{said}{body}</section>"


def table(heads: list[str], rows: Iterable[list[str]]) -> str:
    """Cells are HTML; those that are not `<td …>` already become one."""

    def cells(row: list[str], tag: str) -> str:
        return "".join(c if c.startswith(f"<{tag}") else f"<{tag}>{c}</{tag}>" for c in row)

    head = f"<thead><tr>{cells(heads, 'th')}</tr></thead>" if any(heads) else ""
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def number(text: str, tag: str = "td") -> str:
    return f'<{tag} class="number">{text}</{tag}>'


def plain(value: Any) -> str:
    """A JSON value as a reader writes it."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(plain(inner) for inner in value)
    return str(value)


def median(values: Iterable[float]) -> float:
    """Of the finite ones; NaN where there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else math.nan


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def big(value: float) -> str:
    """`1.23 B`, `184 k`: three digits."""
    if not math.isfinite(value):
        return "–"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            scaled = value / size
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {letter}"
    return f"{value:.0f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %" if math.isfinite(share) else "–"


def duration(seconds: float) -> str:
    """`0.02 s`, `34 s`, `2 min 05 s`, `3 h 20 min`, `2 d 4 h`."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    for size, unit, part, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part:02d} {smaller}"
    return f"{whole} s"


def clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))

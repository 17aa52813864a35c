"""The report's charts, as inline SVG whose colours are the page's CSS variables."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from flame.report.attempts import INTERRUPTIONS, Attempt, Mark
from flame.report.history import StepRecord
from flame.report.series import smooth, thin
from flame.report.timeline import KINDS, Layout, Span, Timeline

# each is a placeholder in matplotlib's output, replaced by var(--name) so that dark mode is CSS alone
COLOURS = {
    "ink": "#010203",
    "muted": "#020304",
    "grid": "#030405",
    "line": "#040506",
    "bad": "#050607",
    "warn": "#060708",
    "good": "#070809",
    "training": "#08090a",
    "lost": "#090a0b",
    "starting": "#0a0b0c",
    "saving": "#0b0c0d",
    "recovery": "#0c0d0e",
    "stopped": "#0d0e0f",
    "validating": "#0e0f10",
}
MARK_COLOURS = {"rank_lost": "bad", "hang": "bad", "rollback": "bad", "failed": "bad", "signal": "warn"}
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.edgecolor": COLOURS["grid"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.6,
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
}
TICKS = [1, 2, 2.5, 5, 10]
BAR_PIXELS = 1000
WIDE, NARROW = 10.4, 5.2  # inches
ROW_POINTS, POINTS_PER_LETTER = 11, 4.6
WHOLE_LENGTH = {"shrinkA": 0, "shrinkB": 0}  # of a line
LABEL_ROWS = 4  # of marks above a chart; what finds no room there is in the table of events


def loss_chart(
    steps: list[StepRecord],
    attempts: list[Attempt],
    marks: list[Mark],
    validated: Sequence[tuple[int, float]] = (),
) -> str:
    """Loss by step: raw, smoothed, trained twice, validated; every interruption marked and labelled."""

    def draw(axes: Axes) -> None:
        _raw_and_smooth(axes, [(r.step, r.loss) for r in steps])
        if validated:
            x, y = thin(*_arrays(validated))
            marker = "o" if len(x) < 100 else ""
            axes.plot(x, y, color=COLOURS["warn"], lw=1.4, marker=marker, ms=3.5, zorder=4)
        for attempt in attempts:
            again = [(r.step, r.loss) for r in attempt.lost]
            if again:
                x, y = thin(*_arrays(again))
                axes.plot(
                    x,
                    y,
                    color=COLOURS["bad"],
                    lw=1,
                    ls=":",
                    marker="." if len(again) < 40 else "",
                    ms=3.5,
                    alpha=0.6,
                    zorder=3,
                )
        _label_marks(axes, marks)

    return _chart("loss", (WIDE, 3.6), draw, top=0.80)


def step_chart(name: str, points: Sequence[tuple[int, float]], marks: list[Mark], *, raw: bool = True) -> str:
    """A small chart of one number by step; `raw`: faint, with its smoothed curve over it."""

    def draw(axes: Axes) -> None:
        _mark_lines(axes, marks, alpha=0.35)
        if raw:
            _raw_and_smooth(axes, points)
        else:
            x, y = thin(*_arrays(points))
            axes.plot(x, y, color=COLOURS["line"], lw=1.4)
        if len(points) and np.nanmin(_arrays(points)[1], initial=np.inf) >= 0:
            axes.set_ylim(bottom=0)

    return _chart(name, (NARROW, 2.0), draw, top=0.95)


def timeline_chart(timeline: Timeline) -> str:
    """One bar over the wall time, coloured by what it was spent on."""
    unit, seconds = next(
        (
            (u, s)
            for u, s in (("days", 86400), ("hours", 3600), ("minutes", 60))
            if timeline.wall_seconds > 3 * s
        ),
        ("seconds", 1),
    )

    spans = visible(timeline)

    def draw(axes: Axes) -> None:
        for kind in KINDS:
            bars = [(s.begin / seconds, s.seconds / seconds) for s in spans if s.kind == kind]
            if bars:
                axes.broken_barh(bars, (0, 1), facecolors=COLOURS[kind], linewidth=0, antialiased=False)
        axes.set_xlim(0, timeline.wall_seconds / seconds)
        axes.set_ylim(0, 1)
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"{unit} since the first start")

    return _chart("timeline", (WIDE, 1.0), draw, top=0.95, bottom=0.45, left=0.1 / WIDE, by_step=False)


def visible(timeline: Timeline) -> list[Span]:
    """The spans that a screen can show; one too short for a pixel becomes part of the one before it."""
    layout = Layout(0.0)
    for span in timeline.spans:
        long_enough = span.seconds * BAR_PIXELS >= timeline.wall_seconds
        layout.until(span.end, span.kind if long_enough or not layout.spans else layout.spans[-1].kind)
    return layout.spans


def _raw_and_smooth(axes: Axes, points: Sequence[tuple[int, float]]) -> None:
    x, y = _arrays(points)
    marker = "." if len(x) < 3 else ""  # a single point draws no line
    axes.plot(*thin(x, y), color=COLOURS["line"], lw=0.9, alpha=0.3, marker=marker)
    axes.plot(*thin(x, smooth(y)), color=COLOURS["line"], lw=1.6)


def _arrays(points: Sequence[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(points, np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _mark_lines(axes: Axes, marks: list[Mark], alpha: float) -> None:
    for step, colour in sorted({(m.step, MARK_COLOURS.get(m.name, "good")) for m in marks}):
        axes.axvline(step, color=COLOURS[colour], lw=0.9, alpha=alpha)


def _label_marks(axes: Axes, marks: list[Mark]) -> None:
    """Lines that reach above the chart to their labels, and room for these."""
    _mark_lines(axes, marks, alpha=0.7)
    labels = place_labels(marks, axes.get_xlim(), WIDE * 72)
    rows = 1 + max((label.row for label in labels), default=-1)
    figure = cast("Figure", axes.get_figure())
    figure.subplots_adjust(top=1 - (6 + ROW_POINTS * rows) / (72 * figure.get_figheight()))
    for label in labels:
        colour, height = COLOURS[label.colour], 3 + ROW_POINTS * label.row
        axes.annotate(
            label.text,
            (label.step, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-3 if label.to_left else 3, height),
            textcoords="offset points",
            ha="right" if label.to_left else "left",
            color=colour,
            annotation_clip=False,
        )
        axes.annotate(
            "",
            (label.step, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, height + 8),
            textcoords="offset points",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.9, "alpha": 0.7, **WHOLE_LENGTH},
            annotation_clip=False,
        )


@dataclass(frozen=True, slots=True)
class Label:
    """What happened at a step, above a chart; row 0 is the lowest."""

    step: int
    text: str
    colour: str
    row: int
    to_left: bool  # of its line


def place_labels(marks: list[Mark], limits: tuple[float, float], width: float) -> list[Label]:
    """One label a step, placed so that no line of another crosses it; `width` of the axis is in points.

    From right to left: a label is one row above all that begin within its length. What finds no row is
    left out.
    """
    low, high = limits
    labels: list[Label] = []
    begins: list[float] = []  # of the labels' lines, in points
    free = width + ROW_POINTS  # nothing may reach past it
    for step in sorted({mark.step for mark in marks}, reverse=True):
        names = list(dict.fromkeys(mark.name for mark in marks if mark.step == step))
        text = f"{step:,} {', '.join(INTERRUPTIONS[name] for name in names)}"
        at, size = (step - low) / (high - low) * width, POINTS_PER_LETTER * len(text) + 8
        to_left = at + size > width and not labels
        within = [label.row for label, begin in zip(labels, begins, strict=True) if begin < at + size]
        row = max(within, default=-1) + 1
        if not to_left and (at > free or row >= LABEL_ROWS):
            continue
        if to_left:
            free = at - size
        colour = next((MARK_COLOURS[name] for name in names if name in MARK_COLOURS), "good")
        labels.append(Label(step, text, colour, 0 if to_left else row, to_left))
        begins.append(at - size if to_left else at)
    return labels


def _chart(
    name: str,
    size: tuple[float, float],
    draw: Callable[[Axes], None],
    *,
    top: float,
    bottom: float | None = None,
    left: float | None = None,
    by_step: bool = True,
) -> str:
    """A figure with one pair of axes, as SVG to be put into a page."""
    settings: Any = {**STYLE, "svg.hashsalt": f"flame {name}"}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size)
        figure.subplots_adjust(
            left=left if left is not None else 0.6 / size[0],
            right=1 - 0.25 / size[0],
            top=top,
            bottom=bottom if bottom is not None else 0.4 / size[1],
        )
        axes = figure.add_subplot()
        axes.margins(x=0.01)
        draw(axes)
        if by_step:
            most = 12 if size[0] > NARROW else 6
            axes.xaxis.set_major_locator(MaxNLocator(nbins=most, steps=[1, 2, 5, 10], integer=True))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=TICKS))
            axes.yaxis.set_major_formatter(FuncFormatter(short))
            axes.set_xlabel("step")
        buffer = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    return _inline(buffer.getvalue(), name)


def short(value: float, _: object = None) -> str:
    """`12k`, `3.4M`, `0.002`: a number as an axis shows it."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:.4g}"


def _inline(svg: str, name: str) -> str:
    """Only the <svg>, without its size, namespaces and group names: a page does not need them."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(
        r'^<svg[^>]*? viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{name}">', svg
    )
    for colour, code in COLOURS.items():
        svg = svg.replace(code, f"var(--{colour})")
    # sizes stay, the page's own font is used
    return re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)

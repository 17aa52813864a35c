"""The page: one HTML file that needs nothing outside itself."""

from __future__ import annotations

import math
import statistics
from html import escape

from flame.recipe import Recipe
from flame.report.attempts import Attempt, Mark, attempts_of, marks_of, steps_of_events
from flame.report.history import Event, History, StepRecord
from flame.report.pieces import big, clock, counted, duration, median, number, percent, plain, section, table
from flame.report.plots import MARK_COLOURS, loss_chart, step_chart, timeline_chart
from flame.report.style import CSS
from flame.report.timeline import KINDS, Timeline, timeline_of
from flame.report.validation import losses_of, samples_section, validation_section

# told in a sentence below the table of events: there may be thousands
COUNTED = ("checkpoint_saved", "record_skipped", "validation")
UNFINISHED = "This page shows the run as it was when the page was written; write it again for a later state."


def page(history: History, state: str, written: float) -> str:
    """The whole page. `state`: a word or two; `written`: now, in seconds since the epoch."""
    attempts = attempts_of(history)
    marks = marks_of(history, attempts)
    timeline = timeline_of(attempts)
    name = escape(history.run.absolute().name)
    parts = [
        header(history, state, name),
        notes(history, state),
        key_figures(history, attempts, timeline),
        curves(history, attempts, marks),
        validation_section(history),
        samples_section(history),
        sources_table(history),
        time_spent(timeline),
        events_table(history, attempts),
        recipe_text(history),
        environment(history),
        f"<footer>Written by <code>flame report</code>, {clock(written)} UTC.</footer>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name} · flame</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


# ------------------------------------------------------------------------------------------ top


def header(history: History, state: str, name: str) -> str:
    kind = state if state in ("done", "failed") else ""
    return (
        f'<header><h1>{name}</h1><span class="state {kind}">{escape(state)}</span>'
        f'<p class="path">{escape(str(history.run.absolute()))}</p></header>'
    )


def notes(history: History, state: str) -> str:
    """What the reader must know before the figures."""
    found: list[str] = []
    if not history.steps:
        found.append("No step has been logged yet: there are no curves.")
    if state != "done":
        found.append(UNFINISHED)
    bad = [r.step for r in history.steps if not math.isfinite(r.loss)]
    if bad:
        named = ", ".join(f"{step:,}" for step in bad[:10]) + (" …" if len(bad) > 10 else "")
        found.append(
            f"The loss was not finite at {counted(len(bad), 'logged step')} ({named}): gaps in the curve."
        )
    last = history.steps[-1] if history.steps else None
    if last and last.updates_skipped:
        found.append(
            f"{counted(last.updates_skipped, 'update')} left out for a gradient that was not finite."
        )
    if last and last.records_skipped:
        found.append(
            f"{counted(last.records_skipped, 'record')} of the data could not be used and were skipped."
        )
    return f'<p class="note">{"<br>".join(found)}</p>' if found else ""


def key_figures(history: History, attempts: list[Attempt], timeline: Timeline) -> str:
    steps = history.steps
    total = history.recipe.total_steps
    done = steps[-1].step if steps else 0
    ended = any(event.name == "done" for event in history.events) or (total is not None and done >= total)
    restarts = sum(event.name == "restart" for event in history.events)
    by_hand = max(0, len(attempts) - 1 - restarts)
    figures = [
        (
            "steps",
            f"{done:,}",
            f"of {total:,} ({100 * done / total:.1f} %)" if total else "until the data end",
        ),
        ("tokens", big(steps[-1].tokens) if steps else "–", f"{steps[-1].tokens:,}" if steps else ""),
        ("final loss" if ended else "last loss", f"{steps[-1].loss:.4f}" if steps else "–", ""),
        ("tokens/s", big(median(r.tokens_per_second for r in steps)), "median"),
        (
            "wall time",
            duration(timeline.wall_seconds) if timeline.spans else "–",
            "first start to last sign of life",
        ),
        ("goodput", percent(timeline.goodput), "of the time it was up"),
        ("restarts", f"{restarts}", f"and {by_hand} resumed by hand" if by_hand else "none by hand"),
    ]
    mfu = median(r.mfu for r in steps)
    if math.isfinite(mfu):
        figures.insert(4, ("MFU", percent(mfu), "median"))
    cells = (
        f"<div><dt>{label}</dt><dd>{value.replace('nan', 'not finite')}<small>{small}</small></dd></div>"
        for label, value, small in figures
    )
    return f'<dl class="figures">{"".join(cells)}</dl>'


# --------------------------------------------------------------------------------------- charts


def curves(history: History, attempts: list[Attempt], marks: list[Mark]) -> str:
    steps = history.steps
    if not steps:
        return ""
    twice = sum(len(attempt.lost) for attempt in attempts)
    caption = "Per predicted token, over all ranks. Faint: each logged step; strong: a centred mean."
    if twice:
        caption += f" Dotted: {counted(twice, 'logged step')} lost to an interruption and trained again."
    validated = losses_of(history)
    if validated:
        caption += " With dots: on the held out documents."
    loss = section("Loss", caption, loss_chart(steps, attempts, marks, validated), wide=True)
    small = [
        (
            "Learning rate",
            "as the schedule gave it",
            step_chart("learning rate", [(r.step, r.learning_rate) for r in steps], marks, raw=False),
        ),
        (
            "Gradient norm",
            "before clipping",
            step_chart("gradient norm", [(r.step, r.grad_norm) for r in steps], marks),
        ),
        (
            "Tokens per second",
            "over all ranks",
            step_chart("tokens per second", [(r.step, r.tokens_per_second) for r in steps], marks),
        ),
        (
            "Waiting for data",
            "percent of a step's time",
            step_chart("waiting for data", [(r.step, 100 * waiting(r)) for r in steps], marks),
        ),
    ]
    return loss + '<div class="pair">' + "".join(section(*parts) for parts in small) + "</div>"


def waiting(record: StepRecord) -> float:
    """Share of a step's time spent waiting for data."""
    return record.data_seconds / record.step_seconds if record.step_seconds else math.nan


def time_spent(timeline: Timeline) -> str:
    wall = timeline.wall_seconds
    if not wall:
        return ""
    rows = [
        [
            f'<td class="time"><i class="swatch" style="background: var(--{kind})"></i>{kind}</td>',
            meaning,
            number(duration(timeline.total(kind))),
            number(percent(timeline.total(kind) / wall)),
        ]
        for kind, meaning in KINDS.items()
        if timeline.total(kind) > 0
    ]
    caption = (
        f"{duration(wall)} from the first start to the last sign of life. Goodput, the share of the time "
        f"that the run was up in which it trained steps that count: {percent(timeline.goodput)}. "
        "Step times come from the metrics, the rest from the times of events."
    )
    body = timeline_chart(timeline) + table(["", "", number("time", "th"), number("share", "th")], rows)
    return section("Where the time went", caption, body, wide=True)


# --------------------------------------------------------------------------------------- tables


def sources_table(history: History) -> str:
    """What each source gave, against what its weight asks for."""
    given = history.steps[-1].sources if history.steps else {}
    if not given:
        return ""
    total = sum(counts["tokens"] for counts in given.values())
    wanted = shares_by_weight(history.recipe, total)
    rows = [
        [
            escape(name),
            number(f"{counts['tokens']:,}"),
            number(percent(counts["tokens"] / total if total else math.nan)),
            number(percent(wanted.get(name, math.nan))),
            number(f"{counts['documents']:,}"),
            number(f"{counts['epoch']:,}"),
            number(f"{counts['skipped']:,}"),
            number(f"{counts['cut']:,}"),
        ]
        for name, counts in given.items()
    ]
    heads = ["tokens", "share", "by weight", "documents", "epochs", "skipped", "cut"]
    caption = (
        "Since the run began. By weight: the share that the weights ask for, those of the phases until now. "
        "Epochs: finished by every lane. Skipped: records without text. Cut: documents cut by packing."
    )
    return section("Sources", caption, table(["source", *(number(h, "th") for h in heads)], rows))


def shares_by_weight(recipe: Recipe, tokens: int) -> dict[str, float]:
    """The share of a run's first `tokens` that each source's weight asks for, phase by phase."""
    plan = recipe.plan
    ends = [*(stage.first_token for stage in plan.stages[1:]), tokens]
    asked = [0.0] * len(recipe.data.sources)
    for stage, end in zip(plan.stages, ends, strict=True):
        within = max(0, min(end, tokens) - stage.first_token)
        for i, weight in enumerate(stage.weights):
            asked[i] += within * weight / sum(stage.weights)
    names = [source.name for source in recipe.data.sources]
    return {name: part / tokens if tokens else math.nan for name, part in zip(names, asked, strict=True)}


def events_table(history: History, attempts: list[Attempt]) -> str:
    if not history.events:
        return section("Events", "None yet.", "")
    steps = steps_of_events(history, attempts)
    origin = history.events[0].time
    rows = [
        [
            f'<td class="time">{clock(event.time)}</td>',
            number(f"+{duration(event.time - origin)}"),
            f'<td class="{MARK_COLOURS.get(event.name, "good")}">{escape(event.name.replace("_", " "))}</td>'
            if event.name in (*MARK_COLOURS, "done")
            else escape(event.name.replace("_", " ")),
            number(f"{steps[index]:,}" if index in steps else "–"),
            details(event),
        ]
        for index, event in enumerate(history.events)
        if event.name not in COUNTED
    ]
    heads = ["time (UTC)", number("after", "th"), "event", number("step", "th"), "details"]
    below = "".join(f'<p class="caption">{text}</p>' for text in counted_events(history.events))
    return section("Events", "", table(heads, rows) + below)


def details(event: Event) -> str:
    """`ranks 2, host vm`: what an event says besides its time and step."""
    return ", ".join(
        f"{escape(key.replace('_', ' '))} {escape(plain(value))}"
        for key, value in event.fields.items()
        if key != "step" and value is not None
    )


def counted_events(events: list[Event]) -> list[str]:
    """A sentence for each kind of event that is not in the table."""
    sentences: list[str] = []
    saved = [event.fields for event in events if event.name == "checkpoint_saved"]
    if saved:
        took = [float(fields.get("seconds") or 0) for fields in saved]
        paused = [float(fields.get("pause_seconds") or 0) for fields in saved]
        sentences.append(
            f"{counted(len(saved), 'checkpoint')} saved in the background, each in "
            f"{duration(statistics.median(took))} (median; longest {duration(max(took))}), with training "
            f"paused for {duration(statistics.median(paused))} (longest {duration(max(paused))})."
        )
    validated = [float(event.fields.get("seconds") or 0) for event in events if event.name == "validation"]
    if validated:
        sentences.append(
            f"{counted(len(validated), 'validation')}, each in {duration(statistics.median(validated))} "
            f"(median; longest {duration(max(validated))})."
        )
    skipped = [event.fields for event in events if event.name == "record_skipped"]
    if skipped:
        records = sum(int(fields.get("records") or 0) for fields in skipped)
        sentences.append(f"{counted(records, 'record')} skipped, at {counted(len(skipped), 'step')}.")
    return sentences


def recipe_text(history: History) -> str:
    text = escape(history.recipe_text)
    return f"<section><details open><summary>Recipe, resolved</summary><pre>{text}</pre></details></section>"


def environment(history: History) -> str:
    if not history.environment:
        return section("Environment", "Not written yet.", "")
    rows: list[list[str]] = []
    for key, value in history.environment.items():
        if key == "git" and isinstance(value, dict):
            changed = str(value.get("diff", "")).count("\n+") + str(value.get("diff", "")).count("\n-")
            note = "; with uncommitted changes, see environment.json" if changed else ""
            value = f"{value.get('commit', '')}{note}"
        if value is not None:
            rows.append([escape(key), escape(plain(value))])
    return section("Environment", "", table(["", ""], rows))

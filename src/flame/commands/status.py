"""`flame status`: how far a run is, in a few lines."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from flame.errors import Exit
from flame.recipe import run_recipe
from flame.report.attempts import attempts_of
from flame.report.history import read_history, validations
from flame.report.timeline import timeline_of
from flame.train.journal import read_lines
from flame.train.keeping import saved_steps

NAMES = {"lost": "recomputed", "data": "waiting for data (in the steps)"}
QUIET_SECONDS = 120  # without a new line in metrics.jsonl, after which a run counts as not running


def status(run: str) -> Exit:
    """Prints what a run directory says of itself."""
    path = Path(run)
    recipe = run_recipe(path)
    metrics = list(read_lines(path / "metrics.jsonl"))
    events = list(read_lines(path / "events.jsonl"))
    total = recipe.total_steps
    print(f"{path}: {state(path, metrics, events)}")
    if metrics:
        last = metrics[-1]
        of = f" of {total} ({100 * last['step'] / total:.1f} %)" if total else ", until the data end"
        print(f"  step         {last['step']}{of}")
        print(f"  tokens       {last['tokens']:,}, epoch {last['epoch']}")
        print(
            f"  loss         {last['loss']:.4f}" if last["loss"] is not None else "  loss         not finite"
        )
        for name, source in last.get("sources", {}).items():
            print(f"  source       {name}: {described(source)}")
        print(f"  speed        {last['tokens_per_second']:,.0f} tokens/s")
        if last["records_skipped"] or last["updates_skipped"]:
            print(f"  skipped      {last['records_skipped']} records, {last['updates_skipped']} updates")
        print(f"  goodput      {goodput(path)}")
    if validated := validations(events):
        print(f"  validation   {in_a_line(validated[-1])}")
    steps = saved_steps(path)
    print(f"  checkpoints  {', '.join(f'step {s}' for s in steps) if steps else 'none yet'}")
    counts: dict[str, int] = {}
    for entry in events:
        counts[entry["event"]] = counts.get(entry["event"], 0) + 1
    print(f"  events       {', '.join(f'{name} {n}' for name, n in sorted(counts.items())) or 'none'}")
    return Exit.DONE


def goodput(run: Path) -> str:
    """The share of the time the run was up in which steps that count were made, and where the rest went."""
    history = read_history(run)
    timeline = timeline_of(attempts_of(history))
    up = timeline.wall_seconds - timeline.total("stopped")
    if up <= 0:
        return "not known yet"
    waits = [step.data_seconds for step in history.steps if not math.isnan(step.data_seconds)]
    shares = {
        kind: timeline.total(kind) / up for kind in ("starting", "saving", "validating", "recovery", "lost")
    }
    if waits:
        shares["data"] = sum(waits) / len(waits) * history.steps[-1].step / up
    listed = ", ".join(f"{NAMES.get(kind, kind)} {100 * share:.1f} %" for kind, share in shares.items())
    return f"{100 * timeline.goodput:.1f} % of {up:,.0f} s; {listed}"


def in_a_line(validation: dict[str, Any]) -> str:
    """The last validation: in all, and the loss of each source where there are several."""
    figures = [f"loss {number(validation['loss'])}", f"{number(validation['bits_per_byte'])} bits per byte"]
    sources = validation["sources"]
    each = [f"{name} {number(source['loss'])}" for name, source in sources.items() if len(sources) > 1]
    return f"step {validation['step']}: {', '.join([*figures, *each])}"


def number(value: float | None) -> str:
    """Four digits, or that there is none."""
    return "none" if value is None else f"{value:.4f}"


def described(source: dict[str, int]) -> str:
    """What a source has given."""
    documents = source["documents"]
    cut = f" ({100 * source['cut'] / documents:.1f} % cut)" if documents else ""
    skipped = f", {source['skipped']} records skipped" if source["skipped"] else ""
    skipped += f", {source['held_out']} held out" if source.get("held_out") else ""
    skipped += f", {source['overlong']} longer than a document may be" if source.get("overlong") else ""
    return f"{source['tokens']:,} tokens, {documents:,} documents{cut}, epoch {source['epoch']}{skipped}"


def state(run: Path, metrics: list[dict[str, Any]], events: list[dict[str, Any]]) -> str:
    """One word or two for what a run does now."""
    names = [entry["event"] for entry in events]
    for name in reversed(names):
        if name in ("done", "failed"):
            return name
        if name in ("start", "resume", "restart"):
            break
        if name == "signal":
            return "stopped by a signal"
    file = run / "metrics.jsonl"
    if not metrics or not file.exists():
        return "no step yet"
    quiet = time.time() - file.stat().st_mtime
    return "running" if quiet < QUIET_SECONDS else f"no new step for {quiet:.0f} s"

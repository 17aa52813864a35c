"""What a run's validations say: those that count, their table, and what the model wrote."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def validations(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The validations that count, by step: of lines of events.jsonl. What was measured after a step that a
    resume left out does not count, and of a step that was validated twice the last one does."""
    found: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["event"] in ("start", "resume"):
            kept = event.get("step") or 0
            found = {step: one for step, one in found.items() if step <= kept}
        elif event["event"] == "validation":
            found[event["step"]] = dict(event)
    return [found[step] for step in sorted(found)]

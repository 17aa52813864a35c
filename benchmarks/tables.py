"""The tables of docs/data.md, made from a result of data.py.

    python benchmarks/tables.py benchmarks/results/data.json docs/data.md

Puts each table between its marks, `<!-- NAME -->` and `<!-- /NAME -->`, in the page.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def table(head: str, rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown; `head`: its columns, with bars between."""
    columns = head.count("|") + 1
    lines = [f"| {head} |", "|" + "---|" * columns, *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def packing(rows: list[dict[str, Any]]) -> str:
    head = "documents | L | tokens each | rows a window | waste | cut | chopped | segments a row | chopped"
    return table(
        head,
        (
            (
                row["documents"],
                f"{row['sequence_length']:,}",
                f"{row['tokens_a_document']:,.0f}",
                str(row["rows_in_a_lanes_window"]),
                percent(row["waste"]),
                percent(row["cut"]),
                percent(row["chopped_cut"]),
                f"{row['segments_a_row']:.1f}",
                f"{row['chopped_segments_a_row']:.1f}",
            )
            for row in rows
        ),
    )


def shuffle(rows: list[dict[str, Any]]) -> str:
    head = "source | blocks | variance ratio | KS | autocorrelation | buffer: ratio | KS | autocorrelation"
    return table(
        head,
        (
            (
                row["source"],
                f"{row['blocks']:,}",
                *(
                    f"{row[f'{way}{name}']:.2f}"
                    for way in ("", "buffer_")
                    for name in ("variance_ratio", "worst_ks", "autocorrelation")
                ),
            )
            for row in rows
        ),
    )


def loaders(rows: list[dict[str, Any]]) -> str:
    head = (
        "loader | tokens/s | per processor second | first batch | resume at 10 % | at 90 % | state | exact | "
        "same rows on 2 ranks | resumed on 2 ranks | tokenized beforehand"
    )
    return table(head, (loader(row) for row in rows))


def loader(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [row["loader"], f"{row['error']}".replace("|", "/"), *[""] * 9]
    early, late = row["resume"]["10%"], row["resume"]["90%"]
    return [
        row["loader"],
        f"{row['tokens_per_second'] / 1e6:.2f}M",
        f"{row['tokens_per_processor_second'] / 1e6:.2f}M",
        f"{row['first_seconds']:.2f} s",
        f"{early['seconds']:.2f} s",
        f"{late['seconds']:.2f} s",
        f"{late['state_bytes']:,} B",
        "yes" if early["exact"] and late["exact"] else "no",
        row["same_rows_on_two_ranks"].replace("|", "/"),
        row["resumed_on_two_ranks"].replace("|", "/"),
        f"{row['prepare_seconds']:.0f} s" if "prepare_seconds" in row else "",
    ]


def resume(row: dict[str, Any]) -> str:
    """Seconds, and beside each resume the time of tokenizing one window, measured right after it."""
    head = "fresh | " + " | ".join(f"resume at {share}" for share in row["resume_seconds"])
    head += " | reached by reading"
    resumed = [
        f"{seconds:.1f} s ({row['beside_seconds'][share]:.1f} s)"
        for share, seconds in row["resume_seconds"].items()
    ]
    return table(head, [[f"{row['fresh_seconds']:.1f} s", *resumed, f"{row['reached']['seconds']:.1f} s"]])


def memory(row: dict[str, Any]) -> str:
    held = row["resident_mib"]
    return table(
        " | ".join(f"after {int(s):,} steps" for s in held), [[f"{m:.1f} MiB" for m in held.values()]]
    )


MADE = {"packing": packing, "shuffle": shuffle, "loaders": loaders, "resume": resume, "memory": memory}


def main() -> None:
    result, page = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    text = page.read_text()
    for name in MADE.keys() & result.keys():
        marked = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        assert marked.search(text), f"{page} has no place for {name}"
        made = MADE[name](result[name])
        text = marked.sub(lambda found, made=made: f"{found[1]}\n{made}\n\n{found[2]}", text)
    page.write_text(text)


if __name__ == "__main__":
    main()

"""`flame models`: which families train, and what the tests prove of each, from the registry's records."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import orjson

from flame.errors import Exit
from flame.models.family import ContextPlan, Family
from flame.models.registry import families, refused


@dataclass(frozen=True, slots=True)
class Support:
    """One row of the matrix. What is "yes" for all families is what the tests run on every registered
    one (tests/models); the rest comes from the family's record, which they hold it to."""

    family: str
    source: str
    trains: str
    packed_rows_proven: str
    sharded: str  # FSDP and HSDP
    tensor_parallel: str
    pipeline_parallel: str
    context_parallel: str
    compile: str
    export: str
    decodes_with_a_cache: str
    cpu: str
    gpu: str


# for a terminal
SHORT = {
    "packed_rows_proven": "packed",
    "decodes_with_a_cache": "cache",
    "tensor_parallel": "tensor",
    "pipeline_parallel": "pipeline",
    "context_parallel": "context",
}


def support(family: Family) -> Support:
    """What is proven of a family."""
    return Support(
        family=family.name,
        source=family.source,
        trains="yes",
        packed_rows_proven="yes",
        sharded="yes",
        tensor_parallel="yes" if family.tensor is not None else "no",
        pipeline_parallel="yes" if family.pipeline else "no",
        context_parallel=context_support(family.context),
        compile="yes" if family.compiles else "not tried",
        export="yes",
        decodes_with_a_cache="yes" if family.cached else "no",
        cpu="yes",
        gpu="yes" if family.gpu else "not run yet",
    )


def context_support(plan: ContextPlan | None) -> str:
    """By which methods of `[parallel] context_method`."""
    if plan is None:
        return "no"
    return "heads, state" if plan.hands_on else "heads"


def models(json: bool, markdown: bool) -> Exit:
    """Prints the matrix: a table, one JSON object, or the table of docs/models.md."""
    rows = [support(family) for family in families()]
    if json:
        record = {"families": [asdict(row) for row in rows], "refused": refused()}
        print(orjson.dumps(record, option=orjson.OPT_INDENT_2).decode())
    elif markdown:
        print(table(rows))
    else:
        print(columns(rows))
        print("\nrefused:")
        for name, reason in refused().items():
            print(f"  {name}: {reason}")
    return Exit.DONE


def columns(rows: list[Support]) -> str:
    """The matrix for a terminal."""
    kept = list(asdict(rows[0]))
    lines = [[SHORT.get(name, name) for name in kept]]
    lines += [[asdict(row)[name] for name in kept] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def table(rows: list[Support]) -> str:
    """The matrix in Markdown."""
    titles = [_title(name) for name in asdict(rows[0])]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        name, *rest = asdict(row).values()
        lines.append(f"| `{name}` | {' | '.join(rest)} |")
    return "\n".join(lines)


def _title(name: str) -> str:
    return {"cpu": "CPU", "gpu": "GPU", "sharded": "sharded (FSDP, HSDP)"}.get(name, name.replace("_", " "))

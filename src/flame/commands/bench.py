"""`flame data bench`: how fast a recipe's rows can be made on this machine."""

from __future__ import annotations

import json
from pathlib import Path

from flame.data.bench import bench as measure
from flame.data.catalog import open_catalog
from flame.errors import Exit, RecipeError
from flame.recipe import read_recipe


def bench(path: str, flags: dict[str, str], ranks: int, seconds: float, as_json: bool) -> Exit:
    """Measures one rank of `ranks` for about `seconds` and prints what came of it."""
    if ranks < 1:
        raise RecipeError(f"--ranks: found {ranks}, expected at least 1")
    if not seconds > 0:
        raise RecipeError(f"--seconds: found {seconds}, expected more than 0")
    recipe = read_recipe(Path(path), flags)
    plan = recipe.plan
    catalog = open_catalog(recipe.data, recipe.tokenizer, plan, Path())
    got = measure(catalog, plan, ranks, seconds)
    if as_json:
        print(json.dumps(got.to_json()))
        return Exit.DONE
    alone, share = got.tokenizer_tokens_per_second, got.share_of_tokenizer
    rows = {
        "loader": f"{got.tokens_per_second:,.0f} tokens/s, raw text to batches",
        "tokenizer alone": "no text" if alone is None else f"{alone:,.0f} tokens/s on the same text",
        "share": "none to speak of: a source holds token ids"
        if share is None
        else f"{100 * share:.1f} % of the tokenizer's speed comes through",
        "processor": f"{100 * got.cpu_share:.0f} % of one core while loading",
        "first rows": f"after {got.first_rows_seconds:.2f} s",
        "resume": f"in {got.resume_seconds:.2f} s, at step {got.resumed_step}",
        "state": f"{got.state_bytes:,} bytes, {got.state_microseconds:.1f} microseconds a step",
        "memory": f"{got.memory_mib:,.0f} MiB at most",
    }
    if got.padding_share:
        rows["padding"] = f"{100 * got.padding_share:.2f} % of the rows' places"
    stage = plan.stages[0]
    print(f"rank 0 of {ranks}, {got.steps:,} steps of {stage.rows_per_step} x {stage.sequence_length} tokens")
    for name, value in rows.items():
        print(f"  {name:<16} {value}")
    return Exit.DONE

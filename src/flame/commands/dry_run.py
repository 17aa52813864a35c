"""`flame train --dry-run`: what a recipe needs on so many ranks, without a GPU and without reading data."""

from __future__ import annotations

import json
from dataclasses import asdict

from flame.errors import Exit
from flame.memory_plan import RESERVED, LayoutPlan, plan_layout
from flame.recipe import Recipe

GIB = 2**30


def dry_run(recipe: Recipe, ranks: int, gpu_memory_gib: float, *, as_json: bool) -> Exit:
    """Prints the plan. Exit code 1 where it does not fit a GPU of so much memory."""
    plan = plan_layout(recipe, ranks)
    fits = plan.most.total <= gpu_memory_gib * GIB
    if as_json:
        print(json.dumps({**plan.record(), "gpu_memory_gib": gpu_memory_gib, "fits": fits}, indent=2))
    else:
        print("\n".join([*lines(plan), verdict(recipe, plan, gpu_memory_gib, fits=fits)]))
    return Exit.DONE if fits else Exit.WRONG_INPUT


def lines(plan: LayoutPlan) -> list[str]:
    """The plan as text."""
    layout = plan.layout
    sizes = " x ".join(f"{name} {getattr(layout, name)}" for name in ORDER)
    rows: list[tuple[str, ...]] = [("rank", "stage", "parameters", *MEMORY, "total")]
    for rank in plan.ranks:
        amounts = [gib(getattr(rank, name)) for name in (*MEMORY, "total")]
        rows.append((str(rank.rank), str(rank.pipeline_stage), f"{rank.parameters:,}", *amounts))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    sent = [f"{gib(count)} GiB {name}" for name, count in asdict(plan.traffic).items() if count]
    return [
        f"layout: {sizes}: {layout.ranks:,} rank(s)",
        f"model: {plan.model_parameters:,} parameters",
        f"step: {plan.tokens_per_step:,} tokens; on a rank {plan.micro_batches} micro-batch(es) of "
        f"{plan.micro_batch_rows} row(s)",
        "memory in GiB (activations are an estimate):",
        *("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows),
        f"a rank sends in a step: {', '.join(sent) or 'nothing'}",
    ]


def verdict(recipe: Recipe, plan: LayoutPlan, gpu_memory_gib: float, *, fits: bool) -> str:
    """Whether it fits, and what would help."""
    most = plan.most
    said = f"{gib(most.total)} GiB on rank {most.rank}, {gib(RESERVED)} of them set aside"
    said += f", of {gpu_memory_gib:g} GiB"
    if fits:
        return f"fits: {said}"
    kept = most.masters + most.gradients + most.optimizer + most.gathered
    if kept > most.activations:
        ways = "share the model over more ranks: parallel.shard, tensor or pipeline"
        if recipe.parallel.reduce == "step" and plan.micro_batches > 1 and plan.layout.ranks > 1:
            ways += '; or, without a pipeline, parallel.reduce = "micro_batch"'
        return f"does not fit: {said}; {ways}"
    return (
        f"does not fit: {said}; lower batch.micro_batch_rows, set memory.recompute, or share rows "
        "(parallel.context)"
    )


ORDER = ("pipeline", "replicate", "shard", "context", "tensor")
MEMORY = ("masters", "gradients", "optimizer", "gathered", "activations")


def gib(count: int) -> str:
    return f"{count / GIB:.2f}"

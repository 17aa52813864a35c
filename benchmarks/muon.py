"""What Muon costs beside a step, counted from the matrices of published models; nothing is timed.

    python benchmarks/muon.py

For each model and number of ranks that share it (FSDP), a rank and a step:

- `gib`: sent in all. `owner`: flame's way, the momentum's shards to the rank that owns a matrix and the
  result back, in bfloat16. `gather`: every matrix to every rank. `fsdp`: what training itself sends,
  parameters in bfloat16 twice and gradients in float32 once.
- `tflop`: of orthogonalising. `owner`: on the busiest rank of each exchange, by flame's plan. `gather`: on
  every rank.
- `share`: of `tflop` in training's own, with TOKENS tokens a rank.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from flame.models.registry import family_of, load_config
from flame.train.muon import newton_schulz_flops, owners_of, split_evenly

MODELS = ("gla_340M", "transformer_1.3B", "transformer_7B")
RANKS = (1, 8, 64)
TOKENS = 32768
CONFIGS = Path(__file__).parents[1] / "configs" / "models"


def main() -> None:
    print(json.dumps([figures(name, ranks) for name in MODELS for ranks in RANKS], indent=1))


def figures(name: str, ranks: int) -> dict[str, Any]:
    """Of one model on so many ranks."""
    config = load_config(str(CONFIGS / f"{name}.json"))
    family = family_of(config)
    model = family.build(config)
    chosen = family.matrices(model)
    shapes = [tuple(p.shape) for n, p in model.named_parameters() if n in chosen]
    values = sum(map(math.prod, shapes))
    parameters = sum(p.numel() for p in model.parameters())
    busiest, whole = 0, sum(map(newton_schulz_flops, shapes))
    for bucket in split_evenly(shapes, ranks):
        part, loads = [shapes[i] for i in bucket], [0] * ranks
        for shape, owner in zip(part, owners_of(part, ranks), strict=True):
            loads[owner] += newton_schulz_flops(shape)
        busiest += max(loads)  # the others wait for it at the bucket's end
    away = 1 - 1 / ranks  # the share of what is exchanged that leaves a rank
    training = TOKENS * family.count(model).per_token
    return {
        "model": name,
        "ranks": ranks,
        "matrices": len(shapes),
        "share_of_parameters": round(values / parameters, 3),
        "gib": {
            "owner": round(2 * 2 * values / ranks * away / 2**30, 3),
            "gather": round(2 * values * away / 2**30, 3),
            "fsdp": round((2 * 2 + 4) * parameters * away / 2**30, 3),
        },
        "tflop": {"owner": round(busiest / 1e12, 2), "gather": round(whole / 1e12, 2)},
        "share": {
            "owner": round(busiest / training, 4),
            "gather": round(whole / training, 4),
        },
    }


if __name__ == "__main__":
    main()

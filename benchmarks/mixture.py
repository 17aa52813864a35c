"""How far two rules for the next source stray from the shares: the one flame uses, and the obvious one.

    python benchmarks/mixture.py --json benchmarks/results/mixture.json

Prints a line for each number of sources: the worst distance between the tokens a source has given and its
share of all tokens, in units of the longest turn, over random mixtures and at every turn.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from flame.data.mixture import next_source

TURN = 4096  # tokens a turn gives at most
Rule = Callable[[Sequence[int], Sequence[float], int], int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mixtures", type=int, default=300)
    parser.add_argument("--turns", type=int, default=3000)
    parser.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    options = parser.parse_args()
    rules: dict[str, Rule] = {"smallest_given_over_weight": smallest_ratio, "flame": next_source}
    results: list[dict[str, float]] = []
    print("sources  smallest given / weight  flame")
    for sources in (2, 3, 4, 8, 16):
        worst = dict.fromkeys(rules, 0.0)
        for seed in range(options.mixtures):
            for name, rule in rules.items():
                found = worst_distance(rule, sources, options.turns, seed)
                worst[name] = max(worst[name], found)
        print(f"{sources:7}  {worst['smallest_given_over_weight']:23.3f}  {worst['flame']:5.3f}", flush=True)
        results.append({"sources": sources, **{name: round(w, 4) for name, w in worst.items()}})
    if options.json:
        settings = {"turn_tokens": TURN, "mixtures": options.mixtures, "turns": options.turns}
        options.json.write_text(json.dumps({**settings, "worst_distance_in_turns": results}, indent=1) + "\n")


def smallest_ratio(given: Sequence[int], weights: Sequence[float], turn_tokens: int) -> int:
    """The source that has given least for its weight."""
    return min(range(len(given)), key=lambda i: given[i] / weights[i])


def worst_distance(rule: Rule, sources: int, turns: int, seed: int) -> float:
    """Of one random mixture: weights and the lengths of turns are drawn, the rule chooses."""
    draw = random.Random(seed)
    weights = [10 ** draw.uniform(-2, 0) for _ in range(sources)]  # from 1 to 100 times another's
    total_weight = sum(weights)
    given, total, worst = [0] * sources, 0, 0.0
    for _ in range(turns):
        tokens = draw.randint(1, TURN) if draw.random() < 0.5 else TURN
        given[rule(given, weights, TURN)] += tokens
        total += tokens
        distance = max(abs(g - total * w / total_weight) for g, w in zip(given, weights, strict=True))
        worst = max(worst, distance)
    return worst / TURN


if __name__ == "__main__":
    main()

"""Which source gives next."""

from __future__ import annotations

from collections.abc import Sequence


def next_source(given: Sequence[int], weights: Sequence[float], turn_tokens: int) -> int:
    """The source whose turn it is. `given`: tokens each gave so far; a turn gives at most `turn_tokens`.

    Of the sources that are not ahead of their share, the one that would first fall a whole turn behind
    (Tijdeman's chairman assignment). Every source then stays within `turn_tokens` of its share at all
    times, with any number of sources; the smallest given / weight alone keeps that for two only.
    """
    if len(weights) == 1:
        return 0
    tokens, total = sum(g for g, weight in zip(given, weights, strict=True) if weight > 0), sum(weights)
    best, best_key = -1, (True, float("inf"))
    for i, weight in enumerate(weights):
        if weight > 0:
            key = (given[i] * total > weight * tokens, (given[i] + turn_tokens) / weight)
            if best < 0 or key < best_key:
                best, best_key = i, key
    return best

"""Curves made fit to be drawn."""

from __future__ import annotations

import numpy as np

MOST_POINTS = 1600  # of a curve: more than a screen has pixels for
SMOOTH_SHARE = 50  # the smoothing window reaches to each side over one of so many parts of the curve


def smooth(values: np.ndarray) -> np.ndarray:
    """A centred mean, float64 [n]; its window shrinks towards both ends, most where a run begins and
    its curve is steep, so that it never lags.

    NaN is left out of the means; where a window holds nothing else, the mean is NaN.
    """
    count = len(values)
    place = np.arange(count)
    reach = np.minimum(np.minimum(-(-place // 4), count - 1 - place), -(-count // SMOOTH_SHARE))
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    first, last = place - reach, place + reach + 1
    found = counts[last] - counts[first]
    return np.where(found > 0, (sums[last] - sums[first]) / np.maximum(found, 1), np.nan)


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS of a curve, [n] each: the lowest and the highest of every stretch, so that no
    spike is lost; and where a stretch holds a NaN, it stays a gap."""
    count = len(x)
    if count <= MOST_POINTS:
        return x, y
    kept: set[int] = {0, count - 1}
    for part in np.array_split(np.arange(count), MOST_POINTS // 3):
        values = y[part]
        missing = ~np.isfinite(values)
        kept.add(int(part[np.argmin(np.where(missing, np.inf, values))]))
        kept.add(int(part[np.argmax(np.where(missing, -np.inf, values))]))
        if missing.any():
            kept.add(int(part[np.argmax(missing)]))
    chosen = np.array(sorted(kept))
    return x[chosen], y[chosen]

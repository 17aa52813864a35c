"""Curves keep what matters when they are smoothed and thinned."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flame.report.series import MOST_POINTS, smooth, thin

VALUES = arrays(np.float64, st.integers(1, 300), elements=st.floats(-1e3, 1e3) | st.just(np.nan))


@given(VALUES)
def test_a_smoothed_curve_stays_within_the_raw_one(values: np.ndarray) -> None:
    smoothed = smooth(values)
    assert len(smoothed) == len(values)
    finite = values[np.isfinite(values)]
    if len(finite):
        known = smoothed[np.isfinite(smoothed)]
        assert known.min() >= finite.min() - 1e-6 and known.max() <= finite.max() + 1e-6


def test_a_smoothed_line_is_the_line() -> None:
    line = np.arange(500.0)
    assert np.allclose(smooth(line), line)


def test_thinning_keeps_spikes_ends_and_gaps() -> None:
    y = np.zeros(100_000)
    y[33_333], y[44_444], y[55_555] = 9.0, -9.0, np.nan
    x, thinned = thin(np.arange(100_000.0), y)
    assert len(x) <= MOST_POINTS + 2
    assert (x[0], x[-1]) == (0, 99_999)
    assert thinned[x == 33_333] == 9 and thinned[x == 44_444] == -9 and np.isnan(thinned[x == 55_555])

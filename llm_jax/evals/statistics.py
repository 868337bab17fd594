"""Means with their standard errors: KEY, and KEY_stderr beside it where it can be known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def mean(key: str, values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """The mean of independent values, float [n], and its standard error s / √n, with the n - 1 of
    Bessel in s.

    Returns:
      `key`, absent without values; `key`_stderr, absent under two.
    """
    values = np.asarray(values, np.float64)
    return ratio(key, values, np.ones(len(values)))


def ratio(key: str, totals: np.ndarray, sizes: np.ndarray) -> dict[str, float]:
    """A ratio of two sums over sampled units, R = Σ totals / Σ sizes, and its standard error.

    To first order its variance is D / (D - 1) · Σ (total - R · size)² / (Σ sizes)² for D units
    (Cochran 1977, "Sampling Techniques", section 2.11). With sizes of 1 it is that of a mean.

    Args:
      totals, sizes: float [units].

    Returns:
      `key`, absent where the sizes sum to 0; `key`_stderr, absent under two units.
    """
    whole = float(np.sum(sizes))
    if not whole:
        return {}
    value = float(np.sum(totals)) / whole
    result = {key: value}
    if len(sizes) > 1:
        squares = float(np.sum((totals - value * sizes) ** 2))
        result[f"{key}_stderr"] = float(np.sqrt(len(sizes) / (len(sizes) - 1) * squares)) / whole
    return result

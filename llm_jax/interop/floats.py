"""Casts between float32 and the narrow floats that leave every bit that fits as it is.

Casts to a narrow float may make one NaN of all; here a NaN keeps its sign and payload, so that what
is read and written in one dtype comes out byte for byte.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

BFLOAT16 = np.dtype(jnp.bfloat16)
FLOAT16 = np.dtype(np.float16)


def widen(x: np.ndarray) -> np.ndarray:
    """float32 of an array of float32, bfloat16 or float16: exact, NaNs included."""
    wide = x.astype(np.float32, copy=False)
    # Processors that convert float16 themselves may make a signalling NaN quiet.
    if x.dtype == FLOAT16 and (nan := np.isnan(x)).any():
        bits = x[nan].view(np.uint16).astype(np.uint32)
        wide.view(np.uint32)[nan] = (bits & 0x8000) << 16 | 0x7F800000 | (bits & 0x3FF) << 13
    return wide


def narrow(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """An array of float32 in float32, bfloat16 or float16, rounded to nearest even.

    What is too large becomes infinite; a NaN loses the low bits of its payload.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = x.astype(dtype, copy=False)
    if dtype != np.float32 and (nan := np.isnan(x)).any():
        bits = x[nan].view(np.uint32)
        if dtype == BFLOAT16:
            short = bits >> 16
            mantissa, quiet = short & 0x7F, 0x40
        else:
            mantissa, quiet = bits >> 13 & 0x3FF, 0x200
            short = bits >> 16 & 0x8000 | 0x7C00 | mantissa
        # A payload in the lost bits alone must not leave an infinity.
        short |= np.where(mantissa == 0, np.uint32(quiet), np.uint32(0))
        rounded.view(np.uint16)[nan] = short
    return rounded

"""Values in words, as tables, axes and texts show them."""

from __future__ import annotations

import json
import math
from typing import Any

from llm_jax.config import ABSENT
from llm_jax.console import clock_time

NOTHING = "\N{EN DASH}"  # in a table, where nothing was measured


def minus(text: str) -> str:
    """The number with the sign that is as wide as a plus, and is no hyphen."""
    return text.replace("-", "\N{MINUS SIGN}")


def number(value: float) -> str:
    """Four significant figures, or whole ones."""
    if not math.isfinite(value):
        return "not finite"
    if abs(value) < 1e6 and (value == int(value) or abs(value) >= 1e3):
        return minus(f"{value:,.0f}")
    if abs(value) >= 1e6 or (value and abs(value) < 1e-3):
        return minus(f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e"))
    return minus(f"{value:,.4g}")


def short(value: float) -> str:
    """For an axis: 0, 500, 1.5k, 2M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return minus(f"{value / size:g}{suffix}")
    return minus(f"{value:g}")


def count(value: float | None) -> str:
    """A whole number: 12,345, or 1.23 M from a million on."""
    if value is None:
        return NOTHING
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g}\u202f{suffix}"
    return f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """28 s, m:ss min, h:mm:ss h."""
    if seconds is None:
        return NOTHING
    if seconds < 60:
        return f"{seconds:.0f}\u202fs"
    return f"{clock_time(seconds)}\u202f{'h' if seconds >= 3600 else 'min'}"


def hours(seconds: float | None) -> str:
    return NOTHING if seconds is None else f"{seconds / 3600:,.3g}"


def money(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.2f}" if value >= 0.995 else f"{value:.2g}"


def measured(value: float | None, stderr: float | None = None) -> str:
    """A figure with its standard error, to the decimals that this leaves."""
    if value is None:
        return NOTHING
    if stderr is None or not math.isfinite(stderr) or not math.isfinite(value) or not stderr:
        return number(value)
    decimals = max(0, 1 - math.floor(math.log10(abs(stderr))))
    return minus(f"{value:,.{decimals}f}\u202f±\u202f{stderr:,.{decimals}f}")


def setting(value: Any) -> str:
    """The value of a setting as a config file would say it."""
    if value == ABSENT:
        return NOTHING
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

"""The layout of every projection's kernel, and the named parts that one matrix product makes.

A leading axis of stacked layers may stand before the dimensions named here; everything in this file
counts axes from the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Layout:
    """axes: logical names of the kernel's dimensions. contracted: how many of them, the first ones,
    the product sums over. parts: names of what the product makes, side by side along "fused"."""

    axes: tuple[str, ...]
    parts: tuple[str, ...]
    contracted: int = 1

    @property
    def outputs(self) -> tuple[str, ...]:
        """Logical names of the product's dimensions."""
        return self.axes[self.contracted :]

    def stacked(self, kernel: Any) -> int:
        """How many axes of stacked layers a kernel has: 0 or 1."""
        return kernel.ndim - len(self.axes)

    def split(self, x: jax.Array) -> dict[str, jax.Array]:
        """The parts of an array [..., F...] whose last dimensions are the product's, by name.

        They keep the fused axis. All but the first part have size 1 along it.
        """
        if "fused" not in self.axes:
            return {self.parts[0]: x}
        first = x.shape[self._fused] - len(self.parts) + 1
        cuts = tuple(range(first, x.shape[self._fused]))
        return dict(zip(self.parts, jnp.split(x, cuts, self._fused), strict=True))

    def join(self, parts: Mapping[str, jax.Array]) -> jax.Array:
        """The inverse of `split`."""
        if "fused" not in self.axes:
            return parts[self.parts[0]]
        return jnp.concatenate([parts[name] for name in self.parts], self._fused)

    @property
    def _fused(self) -> int:
        return self.axes.index("fused") - len(self.axes)


LAYOUTS = {
    "qkv": Layout(("embed", "heads", "fused", "head_dim"), ("query", "key", "value")),
    "output": Layout(("heads", "head_dim", "embed"), ("output",), contracted=2),
    "gate_up": Layout(("embed", "fused", "mlp"), ("gate", "up")),
    "up": Layout(("embed", "mlp"), ("up",)),
    "down": Layout(("mlp", "embed"), ("down",)),
}


def map_projections(
    function: Callable[[str, Layout, Mapping[str, Any]], Any], params: Any, path: str = ""
) -> Any:
    """The tree with each projection's dict replaced by `function(where, layout, dict)`.

    `where` is the path of the module that holds the projection, such as "layer_0/attention". All
    else stays as it is, the kernel of a reward head among it.
    """

    def replaced(name: str, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        if name in LAYOUTS and "kernel" in value:
            return function(path, LAYOUTS[name], value)
        return map_projections(function, value, f"{path}/{name}" if path else name)

    return {name: replaced(name, value) for name, value in params.items()}

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
    """axes: logical names of the kernel's dimensions. contracted: which of them, by place, the
    product sums over; the others are its result's. parts: names of what the product makes, side by
    side along "fused"."""

    axes: tuple[str, ...]
    contracted: tuple[int, ...]
    parts: tuple[str, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Logical names of the dimensions that the product sums over."""
        return tuple(self.axes[place] for place in self.contracted)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Logical names of the product's dimensions."""
        return tuple(self.axes[place] for place in self.kept)

    @property
    def contracted_axes(self) -> tuple[int, ...]:
        """`contracted` from the end, for kernels of stacked layers, too."""
        return tuple(place - len(self.axes) for place in self.contracted)

    @property
    def kept(self) -> tuple[int, ...]:
        """Places of the product's dimensions among the kernel's."""
        return tuple(place for place in range(len(self.axes)) if place not in self.contracted)

    def stacked(self, kernel: Any) -> int:
        """How many axes of stacked layers a kernel has: 0 or 1."""
        return kernel.ndim - len(self.axes)

    def split(self, x: jax.Array, axes: tuple[str, ...]) -> dict[str, jax.Array]:
        """The parts, by name, of an array whose last dimensions are `axes` or `outputs`.

        They keep the fused axis. All but the first part have size 1 along it.
        """
        if "fused" not in axes:
            return {self.parts[0]: x}
        fused = axes.index("fused") - len(axes)
        first = x.shape[fused] - len(self.parts) + 1
        cuts = tuple(range(first, x.shape[fused]))
        return dict(zip(self.parts, jnp.split(x, cuts, fused), strict=True))

    def join(self, parts: Mapping[str, jax.Array], axes: tuple[str, ...]) -> jax.Array:
        """The inverse of `split`."""
        if "fused" not in axes:
            return parts[self.parts[0]]
        fused = axes.index("fused") - len(axes)
        return jnp.concatenate([parts[name] for name in self.parts], fused)


# What a product sums over stands second to last and the last dimension of its result last: a TPU
# lays an array out in tiles of its last two dimensions, and multiplies tiles. With a small axis
# among the two, the kernels of all layers would be copied to another layout ahead of the loop.
LAYOUTS = {
    "qkv": Layout(("heads", "fused", "embed", "head_dim"), (2,), ("query", "key", "value")),
    "output": Layout(("heads", "head_dim", "embed"), (0, 1), ("output",)),
    "gate_up": Layout(("fused", "embed", "mlp"), (1,), ("gate", "up")),
    "up": Layout(("embed", "mlp"), (0,), ("up",)),
    "down": Layout(("mlp", "embed"), (0,), ("down",)),
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

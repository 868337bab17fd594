"""What a model takes on a mesh, told from shapes alone: neither weights nor devices are needed."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
from jax.sharding import PartitionSpec

from llm_jax import sharding
from llm_jax.console import align
from llm_jax.mesh import MeshConfig, make_abstract_mesh
from llm_jax.models import ModelConfig
from llm_jax.weights import shapes


@dataclasses.dataclass(frozen=True)
class PlannedParameter:
    """A parameter, or one of every layer.

    name: the path, "layer_*" where layers have the same. count: of the layers. shape: of one.
    spec: over the mesh. chip_shape: of the part that a chip holds of one.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    spec: PartitionSpec
    chip_shape: tuple[int, ...]

    @property
    def values(self) -> int:
        """Of all layers."""
        return self.count * math.prod(self.shape)

    @property
    def chip_values(self) -> int:
        """Of all layers, on one chip."""
        return self.count * math.prod(self.chip_shape)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The parameters of a model on a mesh. mesh: axis → size."""

    mesh: dict[str, int]
    parameters: tuple[PlannedParameter, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def values(self) -> int:
        return sum(parameter.values for parameter in self.parameters)

    @property
    def float32_bytes(self) -> int:
        """A chip's parameters as they are trained, and as an import loads them."""
        return 4 * sum(parameter.chip_values for parameter in self.parameters)

    @property
    def bfloat16_bytes(self) -> int:
        """A chip's share of a copy to compute or serve with."""
        return self.float32_bytes // 2

    def table(self) -> str:
        """A line a parameter and the totals, for the terminal."""
        head = ("parameter", "count", "shape", "partition", "MiB a chip")
        rows = [head] + [
            (
                p.name,
                str(p.count),
                " x ".join(map(str, p.shape)),
                " ".join(self._axes(entry) for entry in p.spec),
                f"{4 * p.chip_values / 2**20:,.2f}",
            )
            for p in self.parameters
        ]
        axes = ", ".join(f"{axis} {size}" for axis, size in self.mesh.items() if size > 1)
        where = f"{self.chips} chips ({axes})" if axes else "one chip"
        totals = {
            "float32 parameters": self.float32_bytes,
            "a bfloat16 copy": self.bfloat16_bytes,
        }
        return "\n".join([
            *align(rows, right=(1, 4)),
            "",
            f"{self.values:,} parameters on {where}; each holds",
            *(f"  {size / 2**30:8.2f} GiB of {what}" for what, size in totals.items()),
        ])  # fmt: skip

    def _axes(self, entry: Any) -> str:
        """The mesh axes that split a dimension, or a dash."""
        axes = (entry,) if isinstance(entry, str) else entry or ()
        return "+".join(axis for axis in axes if self.mesh[axis] > 1) or "-"


def plan(model: ModelConfig, mesh: MeshConfig) -> Plan:
    """Shapes, partitions and bytes of a model on a mesh that need not exist.

    Raises:
      UserError: the mesh does not divide the model, or leaves too much of it replicated.
    """
    abstract_mesh = make_abstract_mesh(mesh)
    boxed = shapes(model)
    shardings = sharding.parameter_shardings(abstract_mesh, boxed)
    counted: dict[PlannedParameter, int] = {}
    leaves = jax.tree_util.tree_leaves_with_path(sharding.unbox(boxed))
    for (path, leaf), where in zip(leaves, jax.tree.leaves(shardings), strict=True):
        name = "/".join(re.sub(r"^layer_\d+$", "layer_*", key.key) for key in path)
        found = PlannedParameter(name, 1, leaf.shape, where.spec, where.shard_shape(leaf.shape))
        counted[found] = counted.get(found, 0) + 1
    return Plan(
        mesh=dict(abstract_mesh.shape),
        parameters=tuple(dataclasses.replace(p, count=n) for p, n in counted.items()),
    )

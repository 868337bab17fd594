"""The one table of rules from logical axes to mesh axes.

Models name logical axes only; all that is laid out over the mesh is laid out by this table.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from llm_jax.errors import UserError

# Logical axis → mesh axes. Parameters first, then activations, which have names of their own
# because the same dimension is laid out differently in the two.
RULES: dict[str, tuple[str, ...]] = {
    # The devices that share a row by the context axis share the parameters, too.
    "embed": ("fsdp", "context"),
    "heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
    "router_experts": (),  # the router's outputs: every token meets all of them
    "layers": ("stage",),
    "fused": (),  # the small axis of parts that one matrix product makes together: q/k/v, gate/up
    "norm": (),
    "positions": (),  # rows of a table of learned positions
    "rank": (),  # the narrow middle of adapters
    "head_output": (),  # of a reward or value head
    # Before and after the layers the devices of all stages share the rows.
    "activation_rows": ("stage", "data", "fsdp", "expert"),
    "activation_batch": ("data", "fsdp", "expert"),
    "activation_stages": ("stage",),  # what each stage of the pipeline works on
    "activation_time": ("context",),
    # The residual stream between the products, which the tensor axis does not split otherwise.
    "activation_residual_time": ("context", "tensor"),
    "activation_embed": (),
    "activation_heads": ("tensor",),
    "activation_head_dim": (),
    "activation_mlp": ("tensor",),
    "activation_vocab": ("tensor",),
    # Tokens that have gone to their experts: what the expert axis held of the batch, it now holds
    # of the experts.
    "activation_experts": ("expert",),
    "activation_expert_batch": ("data", "fsdp"),
}

TIME_AXES = ("activation_time", "activation_residual_time")

# Start-up is refused when more than this share of the parameters has no sharded axis.
MAX_REPLICATED_SHARE = 0.25


@flax.struct.dataclass
class Named(nn.meta.AxisMetadata):
    """A parameter in a box that holds the logical name of each of its dimensions.

    flax's own boxes read the names as mesh axes as soon as a mesh is set; here `RULES` stand
    between the two.
    """

    value: Any
    names: tuple[str, ...] = flax.struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, value: Any) -> Named:
        return dataclasses.replace(self, value=value)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Named:
        names = list(self.names)
        names.insert(index, params[nn.PARTITION_NAME])
        return dataclasses.replace(self, names=tuple(names))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Named:
        return dataclasses.replace(self, names=self.names[:index] + self.names[index + 1 :])


def spec(axes: Sequence[str | None]) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions have the logical names `axes`.

    Raises:
      ValueError: an unknown logical name, or two dimensions that map to one mesh axis.
    """
    entries: list[Any] = []
    used: set[str] = set()
    for axis in axes:
        if axis is not None and axis not in RULES:
            raise ValueError(f"unknown logical axis {axis!r} in {tuple(axes)}")
        found = () if axis is None else RULES[axis]
        if used & set(found):
            raise ValueError(f"two dimensions of {tuple(axes)} map to mesh axis {found}")
        used |= set(found)
        entries.append(found if len(found) > 1 else (found[0] if found else None))
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins the layout of an activation; does nothing where no mesh is set (`jax.set_mesh`)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, fitting_spec(axes, x.shape))


def fitting_spec(axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """`spec`, without the mesh axes of time that do not divide it."""
    mesh = jax.sharding.get_abstract_mesh()
    entries = [
        _fitting(mesh, entry, size) if axis in TIME_AXES else entry
        for axis, entry, size in zip(axes, spec(axes), shape, strict=True)
    ]
    return PartitionSpec(*entries)


def _fitting(mesh: AbstractMesh, entry: Any, size: int) -> Any:
    """As many of the leading mesh axes as divide a dimension: rows that are decoded one token at a
    time are not cut."""
    axes = mesh_axes(entry)
    while size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return axes or None


def time_shards(time: int) -> int:
    """How many ways `constrain` splits the residual stream of rows of `time` tokens."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    entry = _fitting(mesh, RULES["activation_residual_time"], time)
    return math.prod(mesh.shape[axis] for axis in mesh_axes(entry))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a `[batch, ...]` array over the axes of the batch."""
    return NamedSharding(mesh, spec(("activation_rows",)))


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """How many ways the batch dimension is split; every batch must be a multiple of it."""
    return math.prod(mesh.shape[axis] for axis in RULES["activation_rows"])


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def in_space(where: NamedSharding, space: Any) -> NamedSharding:
    """The same shards in a `jax.memory.Space`: the devices' own memory, or that of their host."""
    return where.with_memory_kind("pinned_host") if space == jax.memory.Space.Host else where


def parameter_shardings(mesh: Mesh | AbstractMesh, boxed: Any) -> Any:
    """NamedShardings of a tree whose leaves are `Named` boxes.

    `boxed` comes from `jax.eval_shape(model.init, ...)`, so no array is made.

    Raises:
      UserError: a dimension that its mesh axes do not divide, an expert axis without experts, or a
        large share of the parameters that no axis shards although the mesh has axes for them.
    """

    def sharding(path: Any, box: Any) -> NamedSharding:
        names, shape = _names_and_shape(box)
        partition = spec(names)
        for dimension, (size, entry) in enumerate(zip(shape, partition, strict=True)):
            axes = mesh_axes(entry)
            ways = math.prod(mesh.shape[axis] for axis in axes)
            if size % ways:
                raise UserError(
                    f"parameter {_name(path)} has {size} along {names[dimension]!r}, which mesh "
                    f"axes {axes} of {ways} devices do not divide: change config.mesh or "
                    f"the model's size."
                )
        return NamedSharding(mesh, partition)

    shardings = jax.tree_util.tree_map_with_path(sharding, boxed, is_leaf=_is_box)
    _refuse_idle_experts(mesh, boxed)
    _refuse_replication(mesh, boxed, shardings)
    return shardings


def unbox(boxed: Any) -> Any:
    """The plain tree of arrays (or shapes) inside the boxes."""
    return nn.meta.unbox(boxed)


def tree_shardings(mesh: Mesh, params: Any, param_shardings: Any, tree: Any) -> Any:
    """Shardings of a tree that holds copies of the parameter tree, such as an optimiser state.

    A leaf that sits at the path suffix of a parameter and has its shape gets that parameter's
    sharding; every other leaf (counts, factored moments) is replicated.
    """
    by_path = {
        jax.tree_util.keystr(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params),
            jax.tree.leaves(param_shardings),
            strict=True,
        )
    }

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        for start in range(len(path)):
            shape, found = by_path.get(jax.tree_util.keystr(path[start:]), (None, None))
            if found is not None and shape == leaf.shape:
                return found
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def mesh_axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else (entry if isinstance(entry, tuple) else (entry,))


def _is_box(x: Any) -> bool:
    return isinstance(x, Named)


def _names_and_shape(box: Any) -> tuple[tuple[str | None, ...], tuple[int, ...]]:
    if _is_box(box):
        return box.names, box.value.shape
    return (None,) * len(box.shape), box.shape


def _name(path: Any) -> str:
    return "/".join(str(getattr(key, "key", key)) for key in path)


def _refuse_idle_experts(mesh: Mesh | AbstractMesh, boxed: Any) -> None:
    axes = {a for box in jax.tree.leaves(boxed, is_leaf=_is_box) for a in _names_and_shape(box)[0]}
    # Adapters stand for a model whose other parameters are not in the tree.
    if mesh.shape["expert"] > 1 and not axes & {"experts", "rank"}:
        raise UserError(
            f"config.mesh.expert={mesh.shape['expert']}, but the model has no experts: set "
            "model.moe, or use the data or fsdp axis."
        )


def _refuse_replication(mesh: Mesh | AbstractMesh, boxed: Any, shardings: Any) -> None:
    parameter_axes = {
        a for name, axes in RULES.items() if not name.startswith("activation") for a in axes
    }
    if all(mesh.shape[axis] == 1 for axis in parameter_axes):
        return  # plain data parallelism replicates by intent
    sizes: dict[str, tuple[int, bool]] = {}
    for (path, box), sharding in zip(
        jax.tree_util.tree_leaves_with_path(boxed, is_leaf=_is_box),
        jax.tree.leaves(shardings),
        strict=True,
    ):
        names, shape = _names_and_shape(box)
        # Adapters are narrow: whole on every device, they still are next to nothing.
        split = "rank" in names or sharding.shard_shape(shape) != shape
        sizes[_name(path)] = (int(np.prod(shape)), split)
    total = sum(size for size, _ in sizes.values())
    whole = {name: size for name, (size, split) in sizes.items() if not split}
    if sum(whole.values()) > MAX_REPLICATED_SHARE * total:
        largest = max(whole, key=lambda name: whole[name])
        raise UserError(
            f"{sum(whole.values()) / total:.0%} of the parameters would be replicated on mesh "
            f"{dict(mesh.shape)}, the largest is {largest} with {whole[largest]:,} values: "
            f"raise config.mesh.fsdp or use a mesh axis that its dimensions carry."
        )

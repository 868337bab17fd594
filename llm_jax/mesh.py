"""The device mesh: its axes, and how many devices stand along each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from llm_jax.errors import UserError

# The closest devices last: tensor and context exchange activations in every layer, stage only what
# passes from one group of layers to the next.
MESH_AXES = ("stage", "data", "fsdp", "expert", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1, "the rest"."""

    data: int = -1  # copies of the model, each with its part of the batch
    fsdp: int = 1  # parts of every parameter, and of the batch
    tensor: int = 1  # parts of heads, MLPs and vocabulary
    expert: int = 1  # of a mixture of experts; one more axis of the batch for all else
    context: int = 1  # parts of every row
    stage: int = 1  # groups of layers, one after another: a pipeline


def resolve(config: MeshConfig, devices: int) -> MeshConfig:
    """The config with "the rest" in numbers.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    rest = [axis for axis, size in sizes.items() if size == -1]
    if len(rest) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(
            f"config.mesh={list(sizes.values())}: sizes are positive, and at most one may be -1."
        )
    known = math.prod(size for size in sizes.values() if size != -1)
    if devices % known or (not rest and known != devices):
        raise UserError(
            f"config.mesh {sizes} does not fit "
            f"{devices} devices: make the sizes multiply to {devices}, or set one to -1."
        )
    return dataclasses.replace(config, **dict.fromkeys(rest, devices // known))


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The device mesh with axes `MESH_AXES`.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    config = resolve(config, len(devices))
    sizes = tuple(getattr(config, axis) for axis in MESH_AXES)
    # jax.make_mesh defaults to Explicit axes, which do not propagate shardings through einsums.
    return jax.make_mesh(sizes, MESH_AXES, (AxisType.Auto,) * len(MESH_AXES), devices=devices)


def make_abstract_mesh(config: MeshConfig) -> AbstractMesh:
    """The mesh of devices that need not exist, to plan for; an axis of -1 has size 1.

    Raises:
      UserError: a size that is not positive.
    """
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    if any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"config.mesh={sizes}: sizes are positive.")
    return AbstractMesh(
        tuple(max(1, size) for size in sizes.values()), MESH_AXES, (AxisType.Auto,) * len(sizes)
    )


def require_host_memory(mesh: Mesh, setting: str) -> None:
    """Raises UserError where the devices cannot reach their host's memory, as `setting` wants."""
    device = mesh.devices.flat[0]
    if "pinned_host" not in {memory.kind for memory in device.addressable_memories()}:
        raise UserError(
            f"{setting} needs host memory that devices can reach, and {device.platform} devices "
            "reach none: leave it out."
        )

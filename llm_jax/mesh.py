"""The device mesh: its axes, and how many devices stand along each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
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
    context: int = 1  # parts of every row, and of the parameters
    stage: int = 1  # groups of layers, one after another: a pipeline
    # Which axis crosses the slow network between the slices of a TPU pod; the others stay inside.
    across_slices: Literal["data", "fsdp", "stage"] = "data"


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
      UserError: the axes do not multiply to the number of devices, or the axis that crosses slices
        is no multiple of them.
    """
    devices = jax.devices() if devices is None else devices
    config = resolve(config, len(devices))
    sizes = tuple(getattr(config, axis) for axis in MESH_AXES)
    # Auto, because Explicit axes, JAX's default, do not propagate shardings through einsums.
    types = (AxisType.Auto,) * len(MESH_AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(sizes, MESH_AXES, types, devices=devices)
    if devices[0].platform == "tpu":
        return Mesh(_across_slices(config.across_slices, sizes, slices, devices), MESH_AXES, types)
    # To JAX every host of GPUs is a slice; in their order the last axes stay inside hosts.
    return Mesh(mesh_utils.create_device_mesh(sizes, devices), MESH_AXES, types)


def _across_slices(
    axis: str, sizes: tuple[int, ...], slices: int, devices: Sequence[jax.Device]
) -> np.ndarray:
    """The devices by their places in the mesh, such that steps along `axis` alone leave a slice."""
    place = MESH_AXES.index(axis)
    if sizes[place] % slices:
        raise UserError(
            f"config.mesh.{axis}={sizes[place]} is no multiple of the {slices} slices, which it "
            "crosses: make it one, or let config.mesh.across_slices name another axis."
        )
    inside, outside = list(sizes), [1] * len(sizes)
    inside[place], outside[place] = sizes[place] // slices, slices
    return mesh_utils.create_hybrid_device_mesh(
        inside, outside, devices, allow_split_physical_axes=True
    )


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


def describe_hardware(mesh: Mesh) -> dict[str, str | int]:
    """JSON-able: what the devices of a mesh are, and how many.

    platform: "cpu", "gpu", "tpu". device: the kind, in the words of its maker; every CPU is a
    "cpu". devices: over all processes. processes: of the job. jax: its version.
    """
    device = mesh.devices.flat[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": mesh.size,
        "processes": jax.process_count(),
        "jax": jax.__version__,
    }


def parse_mesh(text: str, flag: str) -> MeshConfig:
    """The mesh that "fsdp=64,tensor=4" names; the axes that it leaves out have size 1.

    Raises:
      UserError: another text; the message begins with `flag`.
    """
    names = [field.name for field in dataclasses.fields(MeshConfig) if field.name in MESH_AXES]
    sizes: dict[str, Any] = dict.fromkeys(names, 1)
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in names or not size.isdigit():
            raise UserError(
                f"{flag}: {part!r} is not understood: give AXIS=SIZE with an axis of "
                f"{', '.join(names)}."
            )
        sizes[name] = int(size)
    return MeshConfig(**sizes)


def require_host_memory(mesh: Mesh, setting: str) -> None:
    """Raises UserError where the devices cannot reach their host's memory, as `setting` wants."""
    device = mesh.devices.flat[0]
    if "pinned_host" not in {memory.kind for memory in device.addressable_memories()}:
        raise UserError(
            f"{setting} needs host memory that devices can reach, and {device.platform} devices "
            "reach none: leave it out."
        )

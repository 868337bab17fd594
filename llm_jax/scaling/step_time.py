"""How long a train step computes, and how long its links are busy, on paper.

The transfers are those of "How to Scale Your Model" (Austin et al. 2025,
jax-ml.github.io/scaling-book/training), in bytes over the rate of the links they take. Gathering
parameters and reducing gradients go on behind the arithmetic; what tensor, context and expert axes
send stands in its way.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax.numpy as jnp

from llm_jax.mesh import MESH_AXES, MeshConfig
from llm_jax.models.config import ModelConfig
from llm_jax.models.pipeline import bubble_share
from llm_jax.models.size import flops_per_token, mlp_weights, parameter_count
from llm_jax.scaling.presets import Cluster

GRADIENT_WIDTH = 4  # bytes of a gradient while it is reduced


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step. links: by mesh axis. bubble: the share that pipeline stages wait."""

    arithmetic: float
    links: dict[str, float]
    bubble: float

    @property
    def hidden(self) -> float:
        """Of the links, what goes on behind the arithmetic."""
        return self.links["fsdp"] + self.links["data"]

    @property
    def exposed(self) -> float:
        """Of the links, what stands in the arithmetic's way."""
        return sum(self.links.values()) - self.hidden

    @property
    def total(self) -> float:
        return (max(self.arithmetic, self.hidden) + self.exposed) / (1 - self.bubble)


def step_time(
    model: ModelConfig,
    mesh: MeshConfig,
    cluster: Cluster,
    *,
    length: int,
    batch: int,
    micro_batches: int = 1,
) -> StepTime:
    """The time of a step at the chips' peaks: the least that it can take.

    Args:
      mesh: without -1, of all devices of the cluster.
      length: tokens a row. batch: rows of the global batch.
      micro_batches: into which every batch shard's rows are cut.
    """
    width = jnp.dtype(model.dtype).itemsize
    tokens = batch * length / (mesh.data * mesh.fsdp * mesh.expert * mesh.context)
    layers = model.num_layers / mesh.stage
    # A transfer forward has two of its size on the way back, and one more where the whole forward
    # pass is done again.
    passes = 4 if model.remat in ("full", "offload") else 3
    rate = functools.partial(link_rate, mesh=mesh, cluster=cluster)
    dense, experts = _parameters(model)
    parameters = (dense + experts / mesh.expert) / (mesh.tensor * mesh.stage)

    gathered = (2 * width + GRADIENT_WIDTH) * parameters * micro_batches
    shards = mesh.fsdp * mesh.context  # of every parameter
    shared = dense / (mesh.tensor * mesh.stage * shards)  # by the shards of the expert axis
    reduced = 2 * GRADIENT_WIDTH * parameters / shards
    residual = width * tokens * model.embed_dim  # bytes
    keys = width * tokens * 2 * model.kv_heads * model.resolved_head_dim / mesh.tensor
    moved = {
        "fsdp": gathered * _others(shards),
        "data": reduced * _others(mesh.data),
        # In and out of attention and of the MLP.
        "tensor": passes * layers * 4 * residual * _others(mesh.tensor),
        "context": passes * layers * keys * (mesh.context - 1),
        # Every shard meets the tokens of all, and gives back its part of their sums.
        "expert": passes * layers * (1 + 4 / width) * residual * (mesh.expert - 1)
        + 2 * GRADIENT_WIDTH * shared * _others(mesh.expert),
        "stage": passes * residual * (mesh.stage > 1),
    }  # fmt: skip
    return StepTime(
        arithmetic=flops_per_token(model, length) * batch * length
        / (cluster.devices * cluster.chip.device_flops),
        links={axis: moved[axis] / rate(axis) for axis in MESH_AXES},
        bubble=bubble_share(mesh.stage, micro_batches * mesh.stage),
    )  # fmt: skip


def link_rate(axis: str, mesh: MeshConfig, cluster: Cluster) -> float:
    """Bytes/s that a device sends along a mesh axis.

    Axes lie as in `MESH_AXES`, the last on the closest devices. Those of one slice share the axes
    of its torus: tensor and context have one each, fsdp what is left.
    """
    chip = cluster.chip
    if crosses_slices(axis, mesh, cluster):
        assert chip.network is not None
        return chip.network / chip.devices
    axes = len(cluster.torus) or 1
    if axis == "fsdp":
        taken = sum(getattr(mesh, other) > 1 for other in ("expert", "context", "tensor"))
        axes = max(1, axes - taken)
    else:
        axes = 1
    return axes * chip.axis_bandwidth / chip.devices


def crosses_slices(axis: str, mesh: MeshConfig, cluster: Cluster) -> bool:
    """Whether the devices along a mesh axis lie in several slices or nodes."""
    inner = MESH_AXES[MESH_AXES.index(axis) :]
    devices = math.prod(getattr(mesh, other) for other in inner)
    return getattr(mesh, axis) > 1 and devices > cluster.slice_chips * cluster.chip.devices


def _others(size: int) -> float:
    """The share of an array that comes from the other devices of an axis."""
    return (size - 1) / size


@functools.lru_cache(maxsize=128)
def _parameters(model: ModelConfig) -> tuple[int, int]:
    """All parameters but the experts', and theirs."""
    count = parameter_count(model)
    if model.moe is None:
        return count, 0
    experts = model.num_layers * model.moe.num_experts * mlp_weights(model)
    return count - experts, experts

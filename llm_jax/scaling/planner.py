"""Lays a model out over a cluster: which mesh, and why.

Of all meshes that divide the model and its batch and fit the memory, the one whose step is the
shortest on paper (`step_time`). Rules that the numbers alone would not give, from "How to Scale
Your Model" (Austin et al. 2025): tensor and context stay inside a slice, tensor on one axis of its
torus; between slices of TPUs go only gradients (data) or activations of whole stages.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

from llm_jax.errors import UserError
from llm_jax.interop.plan import plan
from llm_jax.mesh import MESH_AXES, MeshConfig
from llm_jax.models.config import ModelConfig
from llm_jax.models.size import parameter_count
from llm_jax.optim import OptimizerConfig
from llm_jax.scaling.divisibility import batch_shards, divides, divisions
from llm_jax.scaling.hardware import GIB
from llm_jax.scaling.memory import TrainingMemory, training_memory
from llm_jax.scaling.presets import Cluster, cluster_names, find_cluster
from llm_jax.scaling.step_time import StepTime, crosses_slices, step_time

MEMORY_SHARE = 0.9  # of what XLA has; the rest is for what the formula does not see
# Steps whose times differ by less count as equal: then the simpler mesh is better.
TIME_TOLERANCE = 0.02
MOST_STAGES = 16  # more wait longer for each other than they would save


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be trained. length: tokens a row. batch: rows. chunk: of `LossConfig`."""

    model: ModelConfig
    length: int
    batch: int
    optimizer: OptimizerConfig = OptimizerConfig()
    chunk: int | None = None


@dataclasses.dataclass(frozen=True)
class MeshPlan:
    """A mesh for a job on a cluster. micro_batch_tokens: of `StepConfig`; None: all at once."""

    job: Job
    cluster: Cluster
    mesh: MeshConfig
    micro_batches: int
    memory: TrainingMemory
    time: StepTime

    @property
    def micro_batch_tokens(self) -> int | None:
        if self.micro_batches == 1:
            return None
        return self.job.batch // batch_shards(self.mesh) // self.micro_batches * self.job.length

    def reasons(self) -> list[str]:
        """Why it is this mesh: a line a fact."""
        job, chip, mesh = self.job, self.cluster.chip, self.mesh
        axes = [f"{axis} {getattr(mesh, axis)}" for axis in MESH_AXES if getattr(mesh, axis) > 1]
        tokens = job.batch * job.length
        lines = [
            f"{self.cluster.name}: {self.cluster.devices} devices of {chip.name}, "
            f"{', '.join(axes) or 'one device'}; {job.batch} rows of {job.length:,} tokens, "
            f"{tokens / self.cluster.devices:,.0f} a device",
        ]
        lines += [_reason(axis, self) for axis in MESH_AXES if getattr(mesh, axis) > 1]
        if self.micro_batches > 1:
            lines.append(
                f"{self.micro_batches} micro-batches a step (step.micro_batch_tokens="
                f"{self.micro_batch_tokens:,}): the activations of all rows at once would not fit"
            )
        parts = self.memory.points[self.memory.fullest]
        largest = max(parts, key=lambda name: parts[name])
        lines.append(
            f"memory: {self.memory.peak / GIB:.1f} of {chip.device_usable / GIB:.1f} GiB a device, "
            f"{self.memory.state_bytes / GIB:.1f} between steps; fullest at the "
            f"{self.memory.fullest} with {parts[largest] / GIB:.1f} of {largest}"
        )
        time = self.time
        lines.append(
            f"time: at least {time.total:.3g} s a step; {time.arithmetic:.3g} s of arithmetic at "
            f"the peak, behind it {time.hidden:.3g} s of links, beside it {time.exposed:.3g} s"
        )
        return lines


def plan_mesh(job: Job, cluster: Cluster) -> MeshPlan:
    """The mesh for a job on a cluster.

    Raises:
      UserError: no mesh divides the model and the batch, or none fits the memory; then it names the
        smallest cluster of the same chips that would do, if there is one.
    """
    found = _search(job, cluster)
    if isinstance(found, MeshPlan):
        return found
    name = f"a model of {parameter_count(job.model):,} parameters"
    if found is None:
        raise UserError(
            f"no mesh of {cluster.name} divides {name} and a batch of {job.batch} rows of "
            f"{job.length:,}: make the batch a multiple of {cluster.devices}, or take fewer chips."
        )
    larger = _smallest_that_fits(job, cluster)
    would = (
        f"{larger.name} ({larger.chips} chips) is the smallest that does"
        if larger
        else "no larger one does either: shorten the rows, or take chips with more memory"
    )
    raise UserError(
        f"{name} does not fit {cluster.name} with {job.batch} rows of {job.length:,}: it takes "
        f"at least {found / GIB:.1f} of {MEMORY_SHARE * cluster.chip.device_usable / GIB:.1f} GiB "
        f"a device; {would}."
    )


@functools.cache
def plan_and_tell(job: Job, cluster: Cluster) -> MeshPlan:
    """`plan_mesh` for config files, with its reasons on stdout: once, however often the file is
    read."""
    found = plan_mesh(job, cluster)
    print("\n".join(found.reasons()))
    return found


def _search(job: Job, cluster: Cluster) -> MeshPlan | float | None:
    """The best plan; else the least bytes that any mesh takes; None where none divides."""
    limit = MEMORY_SHARE * cluster.chip.device_usable
    least: float | None = None
    for mesh, micro_batches, time in _ranked(job, cluster):
        if _leaves_too_much_whole(job.model, mesh):
            continue
        memory = training_memory(
            job.model, job.optimizer, mesh, length=job.length, batch=job.batch,
            micro_batches=micro_batches, chunk=job.chunk, platform=cluster.platform,
        )  # fmt: skip
        if memory.peak <= limit:
            return MeshPlan(job, cluster, mesh, micro_batches, memory, time)
        least = min(memory.peak, least or math.inf)
    return least


def _leaves_too_much_whole(model: ModelConfig, mesh: MeshConfig) -> bool:
    """Whether the sharding rules refuse a mesh that divides the model, as one that splits little of
    it: the stages of a small model with a large vocabulary."""
    try:
        plan(model, mesh)
    except UserError:
        return True
    return False


def _ranked(job: Job, cluster: Cluster) -> list[tuple[MeshConfig, int, StepTime]]:
    """Meshes and numbers of micro-batches, the shortest step first."""
    found = []
    for mesh in meshes(job, cluster):
        rows = job.batch // batch_shards(mesh)
        for micro_batches in (n for n in range(1, rows + 1) if rows % n == 0):
            time = step_time(
                job.model, mesh, cluster, length=job.length, batch=job.batch,
                micro_batches=micro_batches,
            )  # fmt: skip
            found.append((mesh, micro_batches, time))

    def rank(candidate: tuple[MeshConfig, int, StepTime]) -> tuple[float, ...]:
        mesh, micro_batches, time = candidate
        axes = sum(getattr(mesh, axis) > 1 for axis in MESH_AXES)
        step = round(math.log(time.total) / math.log1p(TIME_TOLERANCE))
        return step, axes, micro_batches, mesh.stage, mesh.context, mesh.tensor, -mesh.fsdp

    return sorted(found, key=rank)


def meshes(job: Job, cluster: Cluster) -> Iterator[MeshConfig]:
    """All meshes of the cluster's devices that divide the job and keep to the rules."""
    free = [axis for axis in MESH_AXES if axis != "data"]
    conditions = divisions(job.model, job.length, job.batch)
    ways = [
        [
            n
            for n in range(1, cluster.devices + 1)
            if cluster.devices % n == 0 and all(d.allows(n) for d in conditions if axis in d.axes)
        ]
        for axis in free
    ]
    for sizes in itertools.product(*ways):
        if cluster.devices % math.prod(sizes):
            continue
        data = cluster.devices // math.prod(sizes)
        chosen: dict[str, Any] = dict(zip(free, sizes, strict=True))
        mesh = MeshConfig(data=data, **chosen)
        if _is_sound(mesh, cluster) and divides(job.model, mesh, job.length, job.batch):
            yield mesh


def _is_sound(mesh: MeshConfig, cluster: Cluster) -> bool:
    chip = cluster.chip
    inside = ["expert", "context", "tensor"]
    if chip.torus:
        inside.append("fsdp")
    if any(crosses_slices(axis, mesh, cluster) for axis in inside):
        return False
    one_axis = max(cluster.torus, default=1) * chip.devices
    return mesh.tensor <= one_axis and mesh.context <= one_axis and mesh.stage <= MOST_STAGES


def _smallest_that_fits(job: Job, cluster: Cluster) -> Cluster | None:
    """The smallest cluster of the same chips, larger than this one, that has room for the job."""
    for name in cluster_names():
        larger = find_cluster(name)
        is_larger = larger.chip == cluster.chip and larger.chips > cluster.chips
        if is_larger and isinstance(_search(job, larger), MeshPlan):
            return larger
    return None


def _reason(axis: str, found: MeshPlan) -> str:
    """Why an axis has more than one device."""
    mesh, job, chip = found.mesh, found.job, found.cluster.chip
    size = getattr(mesh, axis)
    seconds = f"{found.time.links[axis]:.3g} s a step"
    where = "between slices" if chip.torus else "between nodes"
    where = where if crosses_slices(axis, mesh, found.cluster) else "on the fast links"
    if axis == "data":
        return f"data {size}: copies of the model; their gradients go {where}, {seconds}"
    if axis == "fsdp":
        busy = "less" if found.time.hidden <= found.time.arithmetic else "more"
        shared = f" (x context {mesh.context})" if mesh.context > 1 else ""
        return (
            f"fsdp {size}{shared}: every device keeps 1/{size * mesh.context} of parameters and "
            "optimiser state; "
            f"gathering them {where} takes {seconds}, {busy} than the arithmetic"
        )
    if axis == "tensor":
        return (
            f"tensor {size}: within {job.model.kv_heads} key/value heads and one axis of the fast "
            f"links; sends activations for {seconds}"
        )
    if axis == "context":
        return (
            f"context {size}: rows of {job.length:,} tokens are cut, as {job.batch} of them do not "
            f"fill {found.cluster.devices} devices, or do not fit; sends keys and values for "
            f"{seconds}"
        )
    if axis == "expert":
        assert job.model.moe is not None
        return f"expert {size}: of {job.model.moe.num_experts} experts; tokens travel for {seconds}"
    return (
        f"stage {size}: groups of layers, of which only activations go {where}; they wait for each "
        f"other for {found.time.bubble:.0%} of a step"
    )

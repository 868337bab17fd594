"""How fast a compiled program can be at the peaks of its chip: the roofline."""

from __future__ import annotations

import collections
import dataclasses

from llm_jax.mesh import MeshConfig
from llm_jax.scaling.compiled import Program
from llm_jax.scaling.presets import Cluster
from llm_jax.scaling.step_time import link_rate


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that each resource is needed for, were it always at its peak. links: by the mesh axes
    whose exchanges they are. mfu: the share of the peak that the model's own arithmetic has, where
    all resources work at the same time."""

    compute: float
    memory: float
    links: dict[str, float]
    mfu: float

    @property
    def seconds(self) -> float:
        """The least that a step takes. Kernels in Pallas and exchanges that nothing hides make it
        longer."""
        return max(self.compute, self.memory, sum(self.links.values()))

    @property
    def bound(self) -> str:
        """The resource that decides."""
        times = {"compute": self.compute, "memory": self.memory, "links": sum(self.links.values())}
        return max(times, key=lambda name: times[name])


def roofline(compiled: Program, mesh: MeshConfig, cluster: Cluster) -> Roofline:
    """
    Args:
      mesh: without -1, of all devices of the cluster.
    """
    chip = cluster.chip
    links: dict[str, float] = collections.defaultdict(float)
    for exchange in compiled.collectives:
        rate = min(link_rate(axis, mesh, cluster) for axis in exchange.axes)
        links[" x ".join(exchange.axes)] += exchange.bytes / rate
    times = Roofline(
        compute=compiled.flops / chip.device_flops,
        memory=compiled.traffic * chip.devices / chip.memory_bandwidth,
        links=dict(links),
        mfu=0.0,
    )
    mfu = compiled.model_flops / (times.seconds * chip.device_flops)
    return dataclasses.replace(times, mfu=mfu)

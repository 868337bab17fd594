"""Clusters by name: TPU slices as Google Cloud names them, and GPUs by their number.

v5e-16, v6e-256     so many chips        v4-128, v5p-128, tpu7x-128   so many TensorCores,
h100x8, h100x64     so many GPUs                                      two to a chip
4xv5e-256           four slices, joined by the data centre's network
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from llm_jax.errors import UserError, did_you_mean
from llm_jax.scaling.hardware import CHIPS, Chip, find_chip

# The shapes of slices by their number of chips.
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
SOLID = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8",
    512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16", 6144: "16x16x24",
    8192: "16x16x32",
}  # fmt: skip
CORES = {"v4": 2, "v5p": 2, "tpu7x": 2}  # that a chip counts for in the names of its slices


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Chips to train on.

    chips: of all slices together. slices: groups with fast links inside, which only the slower
      network joins: slices of a TPU pod, or nodes of GPUs.
    topology: of one TPU slice, as `jax.experimental.topologies.get_topology_desc` wants it; None
      for GPUs.
    """

    name: str
    chip: Chip
    chips: int
    slices: int = 1
    topology: str | None = None

    @property
    def devices(self) -> int:
        """JAX devices of all slices."""
        return self.chips * self.chip.devices

    @property
    def platform(self) -> Literal["gpu", "tpu"]:
        return "tpu" if self.chip.torus else "gpu"

    @property
    def slice_chips(self) -> int:
        return self.chips // self.slices

    @property
    def torus(self) -> tuple[int, ...]:
        """Chips along each axis of a slice's torus that has more than one; a switch is one axis."""
        if self.topology is None:
            return (self.slice_chips,)
        return tuple(n for n in map(int, self.topology.split(":")[1].split("x")) if n > 1)


def find_cluster(name: str) -> Cluster:
    """The cluster of a name such as "v5p-128", "h100x16" or "2xv5e-256".

    Raises:
      UserError: no such cluster.
    """
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z0-9]+)-(\d+)", name)
    if match and match[2] in CHIPS:
        chip, slices = CHIPS[match[2]], int(match[1] or 1)
        chips, rest = divmod(int(match[3]), CORES.get(chip.name, 1))
        if not rest and chips in _shapes(chip):
            topology = f"{chip.name}:{_shapes(chip)[chips]}"
            return Cluster(name, chip, slices * chips, slices, topology)
    match = re.fullmatch(r"(.+)x([1-9]\d*)", name)
    if match and match[1] in CHIPS and not CHIPS[match[1]].torus:
        chip, chips = CHIPS[match[1]], int(match[2])
        nodes = -(-chips // chip.node)
        if chips > chip.node and chips % chip.node:
            raise UserError(
                f"{name} leaves a node of {chip.node} chips in part: take "
                f"{chip.name}x{(nodes - 1) * chip.node} or {chip.name}x{nodes * chip.node}."
            )
        if nodes > 1 and chip.network is None:
            raise UserError(
                f"{name}: no network between nodes of {chip.name} is published: take at most "
                f"{chip.name}x{chip.node}."
            )
        return Cluster(name, chip, chips, nodes)
    raise UserError(f"there is no cluster {name!r}.{_suggestion(name)}")


def cluster_of(chip_name: str, chips: int) -> Cluster:
    """The cluster of so many chips: one slice of a TPU pod, or whole nodes of GPUs.

    Raises:
      UserError: an unknown chip, or no slice of so many.
    """
    chip = find_chip(chip_name)
    if chip.torus:
        return find_cluster(f"{chip.name}-{chips * CORES.get(chip.name, 1)}")
    return find_cluster(f"{chip.name}x{chips}")


def cluster_names() -> list[str]:
    """Names of one TPU slice each, and of up to 128 nodes of GPUs."""
    slices = [
        f"{chip.name}-{chips * CORES.get(chip.name, 1)}"
        for chip in CHIPS.values()
        for chips in _shapes(chip)
    ]
    nodes = [
        f"{chip.name}x{chip.node * 2**power}"
        for chip in CHIPS.values()
        if not chip.torus
        for power in range(1 if chip.network is None else 8)
    ]
    return slices + nodes


def _shapes(chip: Chip) -> dict[int, str]:
    """The slices of a TPU; of v2 and v3, which the current compiler has left, none."""
    if not chip.torus or chip.network is None:
        return {}
    shapes = FLAT if chip.torus == 2 else SOLID
    return {chips: shape for chips, shape in shapes.items() if chips <= chip.slice}


def _suggestion(name: str) -> str:
    """The sizes that there are of the chip that is named, or the nearest name."""
    names = cluster_names()
    match = re.fullmatch(r"(?:\d+x)?(.+?)[-x]\d+", name)
    own = [n for n in names if match and re.fullmatch(rf"{re.escape(match[1])}[-x]\d+", n)]
    if own:
        return f" Known: {', '.join(own)}."
    return did_you_mean(name, names) or " Examples: v5e-16, v5p-128, 4xv5e-256, h100x64."

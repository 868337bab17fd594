"""The one table of chips: peak arithmetic, memory and links, as their vendors publish them.

TPUs: Google Cloud's pages of each version (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e,
tpu7x); v2 and v3, Jouppi et al. 2020, "A domain-specific supercomputer for training deep neural
networks". GPUs: NVIDIA's data sheets, without structured sparsity. Rates of links count one
direction, half of what the pages call bidirectional.
"""

from __future__ import annotations

import dataclasses
import re

from llm_jax.errors import UserError, did_you_mean

GIB = 2**30
GIGABIT = 1e9 / 8  # bytes

# JAX takes this share of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
GPU_MEMORY_SHARE = 0.75


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip, as it is bought.

    flops: peak dense bfloat16 FLOP/s. flops_8bit: the same of int8 or float8, None where 8 bits are
      no faster.
    memory: bytes of HBM. usable: of these, what XLA has for a program.
    memory_bandwidth: bytes/s.
    link: bytes/s of a link to a neighbour of the torus; of all NVLinks together on a GPU; of PCIe
      where it has none.
    torus: dimensions of the torus, in each of which a chip has two links; 0: a switch.
    network: bytes/s of a chip's share of the network between slices, or between nodes of NVIDIA's
      own servers; None where it is not published.
    node: chips of a host. slice: chips that the fast links can join.
    devices: that JAX sees of a chip, each with its part of everything.
    kinds: `device_kind`s of JAX: whole ones of TPUs, words that a GPU's has among others.
    """

    name: str
    flops: float
    flops_8bit: float | None
    memory: float
    usable: float
    memory_bandwidth: float
    link: float
    torus: int
    network: float | None
    node: int
    slice: int
    kinds: tuple[str, ...]
    devices: int = 1

    @property
    def device_flops(self) -> float:
        """Peak dense bfloat16 FLOP/s of one JAX device."""
        return self.flops / self.devices

    @property
    def device_usable(self) -> float:
        """Bytes that XLA has on one JAX device."""
        return self.usable / self.devices

    @property
    def axis_bandwidth(self) -> float:
        """Bytes/s that a chip sends along one axis of its fast links: both ways round a ring."""
        return 2 * self.link if self.torus else self.link

    @property
    def intensity(self) -> float:
        """FLOPs in the time of sending a byte along one axis of the fast links."""
        return self.flops / self.axis_bandwidth

    @property
    def network_intensity(self) -> float | None:
        """FLOPs in the time of sending a byte to another slice or node."""
        return None if self.network is None else self.flops / self.network


def _tpu(
    name: str, flops: float, flops_8bit: float | None, gib: float, usable_gib: float,
    memory_bandwidth: float, link: float, torus: int, network: float | None, node: int,
    slice_chips: int, *kinds: str, devices: int = 1,
) -> Chip:  # fmt: skip
    """`usable_gib` is what libtpu's compiler says it has, of all devices of the chip together."""
    return Chip(name, flops, flops_8bit, gib * GIB, usable_gib * GIB, memory_bandwidth, link, torus,
                network, node, slice_chips, kinds, devices)  # fmt: skip


def _gpu(
    name: str, flops: float, flops_8bit: float, gigabytes: float, memory_bandwidth: float,
    link: float, network: float | None, node: int, *kinds: str,
) -> Chip:  # fmt: skip
    memory = gigabytes * 1e9
    return Chip(name, flops, flops_8bit, memory, GPU_MEMORY_SHARE * memory, memory_bandwidth, link,
                0, network, node, node, kinds)  # fmt: skip


# Of GPUs, the more special name stands first.
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        _tpu("v2", 46e12, None, 16, 15, 700e9, 496 * GIGABIT, 2, None, 4, 256, "TPU v2", devices=2),
        _tpu("v3", 123e12, None, 32, 31, 900e9, 656 * GIGABIT, 2, None, 4, 1024, "TPU v3",
             devices=2),
        _tpu("v4", 275e12, None, 32, 30.5, 1200e9, 50e9, 3, 50 * GIGABIT, 4, 4096, "TPU v4"),
        _tpu("v5e", 197e12, 393e12, 16, 15.75, 819e9, 50e9, 2, 25 * GIGABIT, 8, 256,
             "TPU v5 lite", "TPU v5e"),
        _tpu("v5p", 459e12, 918e12, 96, 95.74, 2765e9, 100e9, 3, 50 * GIGABIT, 4, 6144,
             "TPU v5", "TPU v5p"),
        _tpu("v6e", 918e12, 1836e12, 32, 31.25, 1638e9, 100e9, 2, 100 * GIGABIT, 8, 256,
             "TPU v6 lite", "TPU v6e"),
        _tpu("tpu7x", 2307e12, 4614e12, 192, 189.5, 7380e9, 100e9, 3, 100 * GIGABIT, 4, 9216,
             "TPU7x", devices=2),
        _gpu("a10g", 70e12, 140e12, 24, 600e9, 32e9, None, 8, "A10G"),
        _gpu("a10", 125e12, 250e12, 24, 600e9, 32e9, None, 8, "A10"),
        _gpu("a100-40", 312e12, 624e12, 40, 1555e9, 300e9, 25e9, 8, "A100 40GB"),
        _gpu("a100-80", 312e12, 624e12, 80, 2039e9, 300e9, 25e9, 8, "A100"),
        _gpu("l4", 121e12, 242e12, 24, 300e9, 32e9, None, 8, "L4"),
        _gpu("l40s", 362e12, 733e12, 48, 864e9, 32e9, None, 8, "L40S"),
        _gpu("h100-pcie", 756e12, 1513e12, 80, 2000e9, 300e9, None, 8, "H100 PCIe"),
        _gpu("h100-nvl", 835e12, 1671e12, 94, 3900e9, 300e9, None, 8, "H100 NVL"),
        _gpu("h100", 989e12, 1979e12, 80, 3350e9, 450e9, 50e9, 8, "H100"),
        _gpu("h200-nvl", 835e12, 1671e12, 141, 4800e9, 450e9, None, 8, "H200 NVL"),
        _gpu("h200", 989e12, 1979e12, 141, 4800e9, 450e9, 50e9, 8, "H200"),
        _gpu("gh200", 989e12, 1979e12, 96, 4000e9, 450e9, 50e9, 1, "GH200"),
        _gpu("b200", 2250e12, 4500e12, 180, 7700e9, 900e9, 50e9, 8, "B200"),
        _gpu("gb200", 2500e12, 5000e12, 186, 8000e9, 900e9, 50e9, 72, "GB200"),
    )
}  # fmt: skip


def find_chip(name: str) -> Chip:
    """The chip of a name in `CHIPS`.

    Raises:
      UserError: there is none.
    """
    if name not in CHIPS:
        raise UserError(f"the chip {name!r} is unknown.{did_you_mean(name, CHIPS)}")
    return CHIPS[name]


def chip_of_kind(device_kind: str) -> Chip | None:
    """The chip whose devices JAX calls so; None where it is not in the table, as for every CPU."""
    words = set(re.split(r"[\s-]+", device_kind))
    for chip in CHIPS.values():
        if device_kind in chip.kinds:
            return chip
        if not chip.torus and any(words >= set(kind.split()) for kind in chip.kinds):
            return chip
    return None

"""The table of chips, and clusters by name."""

import math

import pytest

from llm_jax.errors import UserError
from llm_jax.scaling.hardware import CHIPS, chip_of_kind, find_chip
from llm_jax.scaling.presets import cluster_names, cluster_of, find_cluster


def test_the_table_agrees_with_what_vendors_print_of_whole_pods():
    """Google's pages: bidirectional ICI of a chip, FLOP/s of a pod, network of a pod."""
    for name, gigabytes, ports in [("v5e", 400, 4), ("v5p", 1200, 6), ("v6e", 800, 4),
                                   ("tpu7x", 1200, 6)]:  # fmt: skip
        chip = CHIPS[name]
        assert 2 * chip.torus == ports
        assert 2 * ports * chip.link == gigabytes * 1e9
    assert 256 * CHIPS["v5e"].flops == pytest.approx(50.63e15, rel=0.01)
    assert 256 * CHIPS["v6e"].flops == pytest.approx(234.9e15, rel=0.01)
    assert 256 * CHIPS["v5e"].network == pytest.approx(6.4e12 / 8)
    assert 9216 * CHIPS["tpu7x"].flops_8bit == pytest.approx(42.5e18, rel=0.01)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_chips_are_plausible(chip):
    assert 0.7 <= chip.usable / chip.memory < 1
    assert chip.flops_8bit is None or 1.9 < chip.flops_8bit / chip.flops < 2.1
    assert 50 < chip.flops / chip.memory_bandwidth < 700  # FLOPs in the time of reading a byte
    assert chip.link < chip.memory_bandwidth
    assert chip.device_flops * chip.devices == chip.flops
    assert {chip_of_kind(kind) for kind in chip.kinds} == {chip}


def test_devices_of_two_cores_have_half_a_chip_each():
    chip = chip_of_kind("TPU7x")
    assert chip.device_flops == 2307e12 / 2 and chip.device_usable / 2**30 == 94.75


def test_gpus_are_told_apart_by_words():
    for kind, name in [
        ("NVIDIA A100-SXM4-40GB", "a100-40"), ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A10G", "a10g"), ("NVIDIA A10", "a10"), ("NVIDIA GB200", "gb200"),
    ]:  # fmt: skip
        assert chip_of_kind(kind) == CHIPS[name]
    assert chip_of_kind("cpu") is None and chip_of_kind("TPU v99") is None
    with pytest.raises(UserError, match="Did you mean 'h100'"):
        find_chip("h10")


@pytest.mark.parametrize("name, chips, devices, topology, torus", [
    ("v5e-16", 16, 16, "v5e:4x4", (4, 4)),
    ("v5e-256", 256, 256, "v5e:16x16", (16, 16)),
    ("v6e-8", 8, 8, "v6e:2x4", (2, 4)),
    ("v5p-8", 4, 4, "v5p:2x2x1", (2, 2)),
    ("v5p-128", 64, 64, "v5p:4x4x4", (4, 4, 4)),
    ("v4-16", 8, 8, "v4:2x2x2", (2, 2, 2)),
    ("tpu7x-128", 64, 128, "tpu7x:4x4x4", (4, 4, 4)),
    ("2xv5e-256", 512, 512, "v5e:16x16", (16, 16)),
    ("h100x8", 8, 8, None, (8,)),
    ("h100x64", 64, 64, None, (8,)),
    ("a100-40x4", 4, 4, None, (4,)),
])  # fmt: skip
def test_clusters_by_name(name, chips, devices, topology, torus):
    cluster = find_cluster(name)
    assert (cluster.chips, cluster.devices, cluster.topology) == (chips, devices, topology)
    assert cluster.torus == torus


def test_every_name_is_found_and_every_topology_has_its_chips():
    names = cluster_names()
    assert len(set(names)) == len(names) > 100
    for name in names:
        cluster = find_cluster(name)
        assert cluster.slices * cluster.slice_chips == cluster.chips
        assert cluster_of(cluster.chip.name, cluster.chips) == cluster
        assert math.prod(cluster.torus) == cluster.slice_chips


@pytest.mark.parametrize("name, message", [
    ("v5e-17", "Known: v5e-1, v5e-4, v5e-8, v5e-16"),
    ("v5p-9", "Known: v5p-8, v5p-16"),
    ("v5e16", "Did you mean 'v5e-16'"),
    ("h100x12", "take h100x8 or h100x16"),
    ("l4x16", "take at most l4x8"),
    ("h100x0", "Known: h100x8"),
    ("0xv5e-16", "no cluster"),
    ("abacus", "Examples: v5e-16"),
])  # fmt: skip
def test_unknown_clusters_are_refused_with_the_nearest(name, message):
    with pytest.raises(UserError, match=message):
        find_cluster(name)

"""Meshes over the slices of a pod; those of one slice are tested with their shardings."""

import dataclasses

import jax
import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.mesh import MESH_AXES, MeshConfig, make_mesh


@pytest.fixture(scope="module")
def pod():
    """Two slices of 4 x 4 chips, as the TPU's own compiler describes them."""
    from jax.experimental import topologies

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        try:
            return topologies.get_topology_desc("v5e:4x4", platform="tpu", num_slices=2).devices
        except Exception as error:  # whatever libtpu says where it is absent or busy
            pytest.skip(f"no description of TPUs: {error}")


@dataclasses.dataclass(frozen=True)
class Device:
    """A device of no use but to be placed."""

    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "fake"
    process_index: int = 0


def slices_along(mesh, axis):
    """The sets of slices that neighbours along an axis are in."""
    devices = np.moveaxis(mesh.devices, MESH_AXES.index(axis), 0)
    lines = devices.reshape(len(devices), -1).T
    return {frozenset(device.slice_index for device in line) for line in lines}


@pytest.mark.parametrize("axis", ["data", "fsdp", "stage"])
def test_one_axis_alone_crosses_slices(pod, axis):
    sizes = {"data": 2, "fsdp": 4, "stage": 2, "tensor": 2}
    mesh = make_mesh(MeshConfig(**sizes, across_slices=axis), pod)
    assert mesh.shape == {"stage": 2, "data": 2, "fsdp": 4, "expert": 1, "context": 1, "tensor": 2}
    assert set(mesh.devices.flat) == set(pod)
    for name in sizes:
        expected = {frozenset({0, 1})} if name == axis else {frozenset({0}), frozenset({1})}
        assert slices_along(mesh, name) == expected, name


def test_neighbours_of_the_last_axis_are_neighbours_on_the_torus(pod):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4, tensor=4), pod)
    for row in mesh.devices.reshape(-1, 4):
        places = np.array([device.coords for device in row])
        assert (np.ptp(places, axis=0) > 0).sum() == 1  # along one dimension of the chip's links


def test_the_rest_may_cross_slices(pod):
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2), pod)
    assert mesh.shape["data"] == 4 and slices_along(mesh, "data") == {frozenset({0, 1})}


@pytest.mark.parametrize("axis, size", [("data", 1), ("stage", 1), ("fsdp", 1)])
def test_an_axis_that_slices_do_not_divide_is_refused(pod, axis, size):
    sizes = {"data": 32, "fsdp": 1} if axis != "data" else {"data": 1, "fsdp": 32}
    message = f"config.mesh.{axis}={size} is no multiple of the 2 slices"
    with pytest.raises(UserError, match=message):
        make_mesh(MeshConfig(**sizes, across_slices=axis), pod)


def test_hosts_of_other_devices_are_no_slices():
    devices = [Device(i, i // 4) for i in range(8)]
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), devices)
    assert slices_along(mesh, "tensor") == {frozenset({0}), frozenset({1})}
    assert slices_along(mesh, "fsdp") == {frozenset({0, 1})}


def test_the_devices_of_one_slice_are_placed_as_before():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert mesh.devices.reshape(-1).tolist() == jax.devices()

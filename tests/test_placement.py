"""Host arrays to devices and back, where a process has any part of them."""

import jax
import numpy as np
import pytest

from llm_jax import sharding
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.placement import own_rows, rows_to_devices, to_devices, to_host

MESHES = [MeshConfig(data=8), MeshConfig(data=2, tensor=4), MeshConfig(data=1, fsdp=2, context=4)]


@pytest.mark.parametrize("mesh_config", MESHES)
def test_rows_that_do_not_stand_together_come_to_their_devices(mesh_config):
    rows = sharding.batch_sharding(make_mesh(mesh_config))
    whole = np.arange(48).reshape(16, 3)
    own = own_rows(rows, 16)
    assert own.places.tolist() == list(range(16))
    placed = rows_to_devices({"x": whole}, own, rows)["x"]
    assert placed.sharding == rows
    np.testing.assert_array_equal(to_host(placed), whole)
    np.testing.assert_array_equal(to_host(to_devices(whole, rows)), whole)


def test_some_devices_hold_some_rows():
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    rows = sharding.batch_sharding(mesh)
    devices = jax.devices()  # those of 2 k and 2 k + 1 hold the k-th quarter
    assert own_rows(rows, 8, devices[:4]).places.tolist() == [0, 1, 2, 3]
    assert own_rows(rows, 8, [devices[1], devices[6]]).places.tolist() == [0, 1, 6, 7]
    assert own_rows(rows, 8, [devices[4], devices[5]]).places.tolist() == [4, 5]

"""The offline source: batches by step alone, whatever processes, threads or meshes read them."""

import math
from unittest import mock

import jax
import numpy as np
import pytest

from llm_jax import sharding
from llm_jax.data import offline
from llm_jax.data.offline import OfflineSource
from llm_jax.data.packing import pack
from llm_jax.data.phases import PhaseConfig, plan
from llm_jax.errors import UserError
from llm_jax.mesh import MESH_AXES, MeshConfig, make_mesh
from llm_jax.models.rope import RopeConfig
from llm_jax.optim import OptimizerConfig

PHASES = plan(
    [
        PhaseConfig(length=8, batch=8, steps=40, weights={"a": 3.0, "b": 1.0}),
        PhaseConfig(length=4, batch=8, steps=40, weights={"b": 1.0}),
        PhaseConfig(length=4, batch=8, steps=40, weights={"b": 1.0}),
    ],
    OptimizerConfig(warmup_steps=0),
    RopeConfig(),
    {},
)


class Store:
    """Documents of counting tokens, so that a row tells where it comes from."""

    trained = None

    def __init__(self, first, documents):
        lengths = np.random.default_rng(first).integers(3, 30, documents)
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.tokens = np.arange(first, first + self.offsets[-1]).astype(np.int32)


STORES = {"a": Store(0, 40), "b": Store(100_000, 12)}


def rows(phase):
    return {name: pack(store, phase.length, "concatenate") for name, store in STORES.items()}


def make_source(mesh=MeshConfig(1, 1, 1), seed=0):  # noqa: B008 (frozen)
    devices = math.prod(getattr(mesh, axis) for axis in MESH_AXES)
    made = make_mesh(mesh, jax.devices()[:devices])
    return OfflineSource(PHASES, rows, seed, made)


def read(source, phase, first_step, steps):
    source.start(PHASES[phase], first_step)
    return [jax.device_get(source.next(None, step)) for step in steps]


def assert_equal_batches(batches, expected):
    assert len(batches) == len(expected)
    for batch, wanted in zip(batches, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, batch, wanted)


def test_a_batch_depends_on_phase_and_step_alone():
    expected = read(make_source(), 0, 0, range(12))
    assert_equal_batches(read(make_source(), 0, 0, range(7, 12)), expected[7:])
    assert_equal_batches(
        read(make_source(), 0, 0, [5, 6, 2, 3, 11]), [expected[i] for i in (5, 6, 2, 3, 11)]
    )
    # The phase's own step counts, not the global one: a gate before it may have held.
    assert_equal_batches(read(make_source(), 0, 100, range(103, 106)), expected[3:6])


def test_phases_and_seeds_have_orders_of_their_own():
    second = read(make_source(), 1, 0, range(3))
    assert second[0].tokens.shape == (8, 4)
    third = read(make_source(), 2, 0, range(3))
    other_seed = read(make_source(seed=1), 1, 0, range(3))
    for other in (third, other_seed):
        assert any(
            not np.array_equal(x.tokens, y.tokens) for x, y in zip(second, other, strict=True)
        )


def test_components_come_in_proportion_to_their_weights():
    batches = read(make_source(), 0, 0, range(10))
    is_b = np.concatenate([batch.tokens[:, 0] >= 100_000 for batch in batches])
    assert is_b.sum() == 20
    for batch in read(make_source(), 1, 0, range(5)):
        assert (batch.tokens[batch.segment_ids > 0] >= 100_000).all()


@pytest.mark.parametrize("mesh", [MeshConfig(8, 1, 1), MeshConfig(2, 2, 2)])
def test_the_mesh_does_not_change_the_batches(mesh):
    source = make_source(mesh)
    assert_equal_batches(read(source, 0, 0, range(4)), read(make_source(), 0, 0, range(4)))
    batch = source.next(None, 4)
    assert batch.tokens.sharding == sharding.batch_sharding(source._sharding.mesh)


@pytest.mark.parametrize("mesh, processes", [
    (MeshConfig(data=8), 2),
    (MeshConfig(data=8), 4),
    (MeshConfig(data=2, tensor=4), 4),  # two processes hold the same rows
    (MeshConfig(stage=2, data=1, context=4), 4),
])  # fmt: skip
def test_a_process_reads_the_rows_that_its_devices_hold(mesh, processes):
    expected = read(make_source(), 0, 0, range(5))
    share, real = 8 // processes, offline.own_rows
    for index in range(processes):
        devices = jax.devices()[index * share :][:share]
        with mock.patch.object(offline, "own_rows", lambda *args, d=devices: real(*args, d)):
            source = make_source(mesh)
        source.start(PHASES[0], 0)
        with mock.patch.object(offline, "rows_to_devices", lambda local, own, _: (local, own)):
            batches = [source.next(None, step) for step in range(5)]
        places = batches[0][1].places
        held = sharding.batch_sharding(make_mesh(mesh)).devices_indices_map((8,))
        assert {i for d in devices for i in range(8)[held[d][0]]} == set(places)
        assert len(places) < 8
        wanted = [jax.tree.map(lambda x, places=places: x[places], whole) for whole in expected]
        assert_equal_batches([local for local, _ in batches], wanted)


@pytest.mark.parametrize("threads", [0, 1, 8])
def test_the_number_of_threads_does_not_change_the_order(threads):
    expected = read(make_source(), 0, 0, range(10))
    real = offline.prefetch
    with mock.patch.object(
        offline, "prefetch", lambda dataset, start: real(dataset, start, threads=threads)
    ):
        assert_equal_batches(read(make_source(), 0, 0, range(10)), expected)


def test_an_unknown_component_is_refused_before_the_first_step():
    phases = plan(
        [PhaseConfig(length=8, batch=8, steps=4), PhaseConfig(length=8, batch=8, steps=4,
                                                             weights={"aa": 1.0})],
        OptimizerConfig(warmup_steps=0), RopeConfig(), {"a": 1.0},
    )  # fmt: skip
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    with pytest.raises(UserError, match="no component 'aa'"):
        OfflineSource(phases, rows, 0, mesh)


# --- progress -------------------------------------------------------------------------------------


def test_epochs_count_rows_that_were_asked_for():
    source = make_source()
    sizes = {name: len(component) for name, component in rows(PHASES[0]).items()}
    read(source, 0, 0, range(10))
    expected = {"epoch/a": 10 * 6 / sizes["a"], "epoch/b": 10 * 2 / sizes["b"]}
    assert source.progress(10) == pytest.approx(expected)
    # Metrics are read a step late: the batch after has been asked for already.
    assert source.progress(9) == pytest.approx({k: v * 0.9 for k, v in expected.items()})

    read(source, 1, 10, range(10, 15))
    of_second = 5 * 8 / len(rows(PHASES[1])["b"])
    assert source.progress(15) == pytest.approx(
        {"epoch/a": expected["epoch/a"], "epoch/b": expected["epoch/b"] + of_second}
    )


def test_a_single_component_has_one_epoch():
    source = make_source()
    read(source, 1, 0, range(3))
    assert source.progress(3) == pytest.approx({"epoch": 3 * 8 / len(rows(PHASES[1])["b"])})


def test_epochs_survive_a_restart_and_the_state_is_a_snapshot():
    source = make_source()
    read(source, 0, 0, range(4))
    state = source.state()
    at_four = source.progress(4)
    read(source, 0, 0, range(4, 9))
    resumed = make_source()
    resumed.restore(state)
    resumed.start(PHASES[0], 0)
    assert resumed.progress(0) == at_four
    read(resumed, 0, 0, range(4, 9))
    assert resumed.progress(9) == source.progress(9)

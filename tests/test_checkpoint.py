"""Checkpoints: round trips, what is kept, damage, a full disk, and what later stages read."""

import errno
import functools
import os
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from llm_jax import checkpoint, optim, sharding, step
from llm_jax.checkpoint import CheckpointConfig, Checkpointer
from llm_jax.errors import UserError, disk_errors
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.optim import OptimizerConfig
from llm_jax.sharding import Named

CURSOR = {"clock": {"index": 1}, "source": {"epochs": {"text": 0.1}}}
META = {"stage": "pretrain", "model": {"embed_dim": 8}, "lineage": []}


def init_boxed(rng):
    return {
        "embedding": Named(jax.random.normal(rng, (16, 8)), ("vocab", "embed")),
        "norm": {"scale": Named(jnp.ones(8), ("norm",))},
    }


def init_params(rng):
    return sharding.unbox(init_boxed(rng))


class Fixture:
    """A small state on a mesh of the first devices, and the pieces around it."""

    def __init__(self, devices=1, mesh=MeshConfig(), **optimizer):  # noqa: B008 (frozen)
        self.mesh = make_mesh(mesh, jax.devices()[:devices])
        boxed = jax.eval_shape(init_boxed, jax.random.key(0))
        self.optimizer = optim.make_optimizer(OptimizerConfig(**optimizer), sharding.unbox(boxed))
        self.abstract, self.shardings = step.init_state(
            init_params,
            self.optimizer,
            0,
            self.mesh,
            sharding.parameter_shardings(self.mesh, boxed),
        )

        @functools.partial(jax.jit, out_shardings=self.shardings)
        def update(state, number):
            gradients = jax.tree.map(lambda p: p + number, state.params)
            updates, opt_state = self.optimizer.update(
                gradients, state.opt_state, state.params, learning_rate=0.1
            )
            params = optax.apply_updates(state.params, updates)
            return state.replace(step=state.step + number, params=params, opt_state=opt_state)

        self._first = step.materialise(init_params, self.optimizer, 0, self.shardings)
        self._update = update

    def state(self, number):
        """A state with other values in every leaf for every number."""
        return self._update(self._first, number)


def product(state):
    average = optim.ema_params(state.opt_state)
    return state.params if average is None else average


def write(workdir, fixture, steps, config=CheckpointConfig(keep_latest=10)):  # noqa: B008 (frozen)
    """Saves `fixture.state(step)` for each step."""
    checkpointer = Checkpointer(workdir, config)
    for number in steps:
        state = fixture.state(number)
        cursor = {**CURSOR, "step": number}
        checkpointer.save(number, state, product(state), cursor, {**META, "step": number})
    checkpointer.wait()
    checkpointer.close()


def restore(workdir, fixture, averaged=False):
    """What `restore` returns, and its warnings."""
    warnings = []
    checkpointer = Checkpointer(workdir, CheckpointConfig(keep_latest=10))
    try:
        return checkpointer.restore(fixture.abstract, averaged, warnings.append), warnings
    finally:
        checkpointer.close()


def raw(tree):
    """Leaves as numpy arrays; a typed key as its words."""
    return [
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        for x in jax.tree.leaves(tree)
    ]


def assert_bitwise_equal(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for leaf, wanted in zip(raw(tree), raw(expected), strict=True):
        assert leaf.dtype == wanted.dtype and leaf.tobytes() == wanted.tobytes()


def steps_in(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


# --- round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, ema_decay", [("adamw", None), ("adamw", 0.9), ("muon", None), ("adafactor", 0.9)]
)
def test_what_was_saved_comes_back_bit_for_bit(tmp_path, name, ema_decay):
    fixture = Fixture(name=name, ema_decay=ema_decay)
    write(tmp_path, fixture, [3])
    (state, cursor), warnings = restore(tmp_path, fixture, averaged=ema_decay is not None)
    assert_bitwise_equal(state, fixture.state(3))
    assert cursor == {**CURSOR, "step": 3}
    assert warnings == []
    assert jax.random.key_data(jax.random.split(state.rng)).shape == (2, 2)  # a key that works


@pytest.mark.parametrize("before, after", [(True, True), (True, False), (False, True)])
def test_moments_on_the_host_are_in_the_checkpoint_as_others_are(tmp_path, before, after):
    mesh = {"devices": 4, "mesh": MeshConfig(data=2, fsdp=2)}
    written, read = (Fixture(**mesh, offload=offload) for offload in (before, after))
    write(tmp_path, written, [3])
    (state, _), warnings = restore(tmp_path, read)
    assert warnings == [] and jax.tree.map(lambda x: x.sharding, state) == read.shardings
    assert_bitwise_equal(state, written.state(3))
    assert_bitwise_equal(read._update(state, 1), written._update(written.state(3), 1))


def test_an_empty_folder_restores_nothing(tmp_path):
    assert restore(tmp_path, Fixture())[0] is None


def test_the_params_item_is_the_average_where_one_is_kept(tmp_path):
    fixture = Fixture(ema_decay=0.9)
    write(tmp_path, fixture, [3])
    params = checkpoint.read_params(tmp_path, 3, fixture.abstract.params)
    state = fixture.state(3)
    assert_bitwise_equal(params, optim.ema_params(state.opt_state))
    assert not np.array_equal(params["embedding"], state.params["embedding"])


def test_a_state_moves_to_another_mesh(tmp_path):
    writer = Fixture()
    write(tmp_path, writer, [3])
    fixture = Fixture(8, MeshConfig(data=2, fsdp=2, tensor=2))
    (state, _), _ = restore(tmp_path, fixture)
    assert_bitwise_equal(state, writer.state(3))
    assert jax.tree.map(lambda x: x.sharding, state.params) == fixture.shardings.params
    assert state.params["embedding"].addressable_shards[0].data.shape == (8, 4)
    mu = state.opt_state.inner[1].mu["embedding"]
    assert mu.addressable_shards[0].data.shape == (8, 4)


def test_parameters_are_read_into_the_shardings_of_the_reader(tmp_path):
    writer = Fixture(8, MeshConfig(data=1, fsdp=8))
    write(tmp_path, writer, [3])
    fixture = Fixture(4, MeshConfig(data=1, fsdp=2, tensor=2))
    params = checkpoint.read_params(tmp_path, 3, fixture.abstract.params)
    assert_bitwise_equal(params, writer.state(3).params)
    assert params["embedding"].sharding == fixture.shardings.params["embedding"]


def test_parameters_of_another_shape_are_refused(tmp_path):
    fixture = Fixture()
    write(tmp_path, fixture, [3])
    where = fixture.shardings.params["embedding"]
    wide = {
        **fixture.abstract.params,
        "embedding": jax.ShapeDtypeStruct((16, 9), "float32", sharding=where),
    }
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.read_params(tmp_path, 3, wide)


def test_a_save_is_not_touched_by_steps_that_follow_at_once(tmp_path):
    """The step donates the state's buffers while the checkpoint is written in the background."""
    fixture = Fixture()
    state = fixture.state(1)
    before = raw(state)
    overwrite = jax.jit(
        lambda s: s.replace(params=jax.tree.map(lambda x: x * 0 - 7, s.params)), donate_argnums=0
    )
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    checkpointer.save(1, state, state.params, CURSOR, META)
    state = jax.block_until_ready(overwrite(state))
    checkpointer.wait()
    checkpointer.close()
    (restored, _), _ = restore(tmp_path, fixture)
    for leaf, wanted in zip(raw(restored), before, strict=True):
        np.testing.assert_array_equal(leaf, wanted)


# --- what is kept ---------------------------------------------------------------------------------


def test_the_latest_checkpoints_are_kept(tmp_path):
    write(tmp_path, Fixture(), [1, 2, 3, 4], CheckpointConfig(keep_latest=2))
    assert steps_in(tmp_path) == [3, 4]


def test_multiples_are_kept_for_good(tmp_path):
    config = CheckpointConfig(keep_latest=1, keep_every=3)
    write(tmp_path, Fixture(), [2, 3, 4, 6, 7, 8], config)
    assert steps_in(tmp_path) == [3, 6, 8]


def test_a_step_is_saved_once(tmp_path):
    write(tmp_path, Fixture(), [2, 2])
    assert steps_in(tmp_path) == [2]


@pytest.mark.parametrize("field", ["every", "keep_latest", "keep_every"])
def test_intervals_are_positive(field):
    with pytest.raises(UserError, match=rf"config\.checkpoint\.{field}=0"):
        CheckpointConfig(**{field: 0})


# --- damage ---------------------------------------------------------------------------------------


def halve_the_data(folder):
    for path in [*folder.glob("train/**/d/*"), *folder.glob("params/**/d/*")]:
        os.truncate(path, path.stat().st_size // 2)


def delete_a_manifest(folder):
    (folder / "train" / "manifest.ocdbt").unlink()


def empty_the_metadata(folder):
    for path in folder.glob("*/_METADATA"):
        os.truncate(path, 0)


def empty_the_cursor(folder):
    os.truncate(folder / "data" / "metadata", 0)


def delete_an_item(folder):
    shutil.rmtree(folder / "train")


DAMAGES = [halve_the_data, delete_a_manifest, empty_the_metadata, empty_the_cursor, delete_an_item]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_taken(tmp_path, damage):
    fixture = Fixture()
    write(tmp_path, fixture, [1, 2])
    damage(tmp_path / "checkpoints" / "2")
    (state, cursor), warnings = restore(tmp_path, fixture)
    assert_bitwise_equal(state, fixture.state(1))
    assert cursor["step"] == 1
    assert len(warnings) == 1 and warnings[0].startswith("checkpoint 2 cannot be read")
    assert "\n" not in warnings[0]
    assert checkpoint.latest_step(tmp_path) == 1
    assert (tmp_path / "checkpoints" / "2.damaged").is_dir()

    write(tmp_path, fixture, [2])  # the step comes again and may be damaged again
    damage(tmp_path / "checkpoints" / "2")
    (state, _), _ = restore(tmp_path, fixture)
    assert_bitwise_equal(state, fixture.state(1))


def test_when_no_checkpoint_can_be_read_one_line_says_so(tmp_path):
    fixture = Fixture()
    write(tmp_path, fixture, [1, 2])
    for number in (1, 2):
        halve_the_data(tmp_path / "checkpoints" / str(number))
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read") as caught:
        restore(tmp_path, fixture)
    assert "\n" not in str(caught.value)


def test_an_unfinished_checkpoint_is_not_one(tmp_path):
    fixture = Fixture()
    write(tmp_path, fixture, [1])
    shutil.copytree(
        tmp_path / "checkpoints" / "1", tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    )
    assert checkpoint.latest_step(tmp_path) == 1
    (state, _), warnings = restore(tmp_path, fixture)
    assert int(state.step) == 1 and warnings == []


def test_meta_is_read_from_the_newest_checkpoint_that_has_one(tmp_path):
    assert checkpoint.newest_meta(tmp_path) is None
    write(tmp_path, Fixture(), [1, 2])
    assert checkpoint.newest_meta(tmp_path) == (2, {**META, "step": 2})
    os.truncate(tmp_path / "checkpoints" / "2" / "meta" / "metadata", 0)
    assert checkpoint.newest_meta(tmp_path) == (1, {**META, "step": 1})
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.read_meta(tmp_path, 2)
    shutil.rmtree(tmp_path / "checkpoints" / "1" / "meta")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.newest_meta(tmp_path)


# --- a full disk ----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device"),
])  # fmt: skip
def test_a_full_disk_is_one_line(tmp_path, error):
    fixture = Fixture()
    write(tmp_path, fixture, [1])
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    state = fixture.state(2)
    with (
        mock.patch.object(ocp.CheckpointManager, "save", side_effect=error),
        pytest.raises(UserError, match=f"the disk is full: {tmp_path} .* Buy another."),
        disk_errors(tmp_path, "Buy another."),
    ):
        checkpointer.save(2, state, state.params, CURSOR, META)
    with (
        mock.patch.object(ocp.CheckpointManager, "wait_until_finished", side_effect=error),
        pytest.raises(UserError, match="the disk is full"),
        disk_errors(tmp_path, "Buy another."),
    ):
        checkpointer.wait()
    checkpointer.close()
    (state, _), _ = restore(tmp_path, fixture)
    assert int(state.step) == 1


def test_another_error_of_the_writer_stays_what_it_is(tmp_path):
    state = Fixture().state(2)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    with (
        mock.patch.object(ocp.CheckpointManager, "save", side_effect=ValueError("a bug")),
        pytest.raises(ValueError, match="a bug"),
        disk_errors(tmp_path, "Buy another."),
    ):
        checkpointer.save(2, state, state.params, CURSOR, META)
    checkpointer.close()


# --- init_from ------------------------------------------------------------------------------------


def test_locate_finds_the_newest_step_or_the_one_named(tmp_path):
    run = tmp_path / "user@host"
    write(run, Fixture(), [1, 12])
    (run / "config.json").write_text("{}")
    assert checkpoint.locate(str(run)) == (run, 12)
    plain = run.rename(tmp_path / "run")
    assert checkpoint.locate(f"{plain}@1") == (plain, 1)


@pytest.mark.parametrize("init_from, message", [
    ("nothing", "nothing is no run directory: it has no config.json"),
    ("fresh", "fresh holds no checkpoint yet"),
    ("run@2", "run has no checkpoint '2'; it has 1, 12"),
    ("run@latest", "run has no checkpoint 'latest'; it has 1, 12"),
])  # fmt: skip
def test_locate_refuses_what_is_no_run_or_no_step(tmp_path, monkeypatch, init_from, message):
    monkeypatch.chdir(tmp_path)
    for name in ("run", "fresh"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    for number in ("1", "12", "12.damaged", "13.orbax-checkpoint-tmp"):
        (tmp_path / "run" / "checkpoints" / number).mkdir()
    with pytest.raises(UserError) as caught:
        checkpoint.locate(init_from)
    assert message in str(caught.value)


# --- written part by part -------------------------------------------------------------------------


def deferred(values, part, log=None):
    """`values` as an array whose parts are made when they are asked for."""

    def make(box):
        if log is not None:
            log.append(box)
        return np.array(values[tuple(slice(*ends) for ends in box)])

    return checkpoint.Deferred(values.shape, part, make)


def test_what_is_written_part_by_part_is_read_like_any_checkpoint(tmp_path):
    fixture = Fixture(8, MeshConfig(data=2, fsdp=2, tensor=2))
    params = jax.tree.map(np.array, fixture.state(3).params)
    params["embedding"].view(np.uint32)[0, :2] = 0x7F800001, 0x80000000  # a NaN's payload, and -0
    log = []
    tree = {
        "embedding": deferred(params["embedding"], (5, 8), log),
        "norm": {"scale": fixture.state(3).params["norm"]["scale"]},
    }
    checkpoint.write_streamed(tmp_path, 0, tree, META)
    assert_bitwise_equal(checkpoint.read_params(tmp_path, 0, fixture.abstract.params), params)
    assert log == [((row, min(row + 5, 16)), (0, 8)) for row in (0, 5, 10, 15)]
    assert checkpoint.read_meta(tmp_path, 0) == META


def test_a_part_that_cannot_be_made_leaves_no_checkpoint(tmp_path):
    def make(box):
        if box[0][0]:
            raise UserError("the file is damaged.")
        return np.zeros((1, 8), np.float32)

    tree = {"embedding": checkpoint.Deferred((4, 8), (1, 8), make)}
    with pytest.raises(UserError, match="the file is damaged"):
        checkpoint.write_streamed(tmp_path, 0, tree, META)
    assert checkpoint.latest_step(tmp_path) is None


def test_only_one_process_writes_part_by_part(tmp_path):
    with (
        mock.patch.object(jax, "process_count", return_value=2),
        pytest.raises(UserError, match="by one process"),
    ):
        checkpoint.write_streamed(tmp_path, 0, {}, META)

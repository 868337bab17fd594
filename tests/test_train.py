"""The loop: bitwise resume of real runs, and phases, gates and skips of a hand-made trainer."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import signal
from unittest import mock

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from llm_jax import config as config_module
from llm_jax import optim, schedules, sharding
from llm_jax.checkpoint import CheckpointConfig
from llm_jax.data.corpus import ComponentConfig, DataConfig
from llm_jax.data.offline import OfflineSource
from llm_jax.data.phases import GateConfig, PhaseConfig, plan
from llm_jax.data.tokenizer_base import ByteTokenizer
from llm_jax.errors import UserError
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.metrics import MetricsConfig, RunLog, read_metrics_file
from llm_jax.models.config import ModelConfig
from llm_jax.models.rope import RopeConfig
from llm_jax.optim import OptimizerConfig
from llm_jax.train import train
from llm_jax.trainers import TRAINERS, Stage
from llm_jax.trainers.base import (
    Evaluation,
    EvaluationConfig,
    ProfileConfig,
    RunConfig,
    SampleConfig,
    Setting,
    Trainer,
)
from llm_jax.types import Mean

# --- bitwise resume -------------------------------------------------------------------------------

# Phase 2's gate cannot pass, so it holds twice, for 3 and 2 extra steps, and is then forced.
IMPOSSIBLE = GateConfig(
    short_loss_tolerance=-10.0, needle_accuracy=None, check_every=3, max_extra_steps=5
)
PHASES = (
    PhaseConfig(length=16, batch=8, steps=5, gate=GateConfig(needle_accuracy=None)),
    PhaseConfig(
        length=32,
        batch=4,
        steps=4,
        rewarm_steps=2,
        gate=IMPOSSIBLE,
        weights={"text": 1, "other": 3},
    ),
    PhaseConfig(length=32, batch=4, steps=4, rope_theta=40_000.0, weights={"text": 1}),
)
STEPS = 5 + (4 + 3 + 2) + 4


@pytest.fixture(scope="module")
def long_config(tiny_config, corpus, other_corpus):
    """Everything that a resume could lose: dropout, a mixture that changes, a gate that holds."""

    def make(**optimizer):
        return tiny_config(
            model=ModelConfig(
                embed_dim=32, num_layers=2, num_heads=2, mlp_dim=64, max_length=32,
                residual_dropout=0.1, attention_dropout=0.1,
            ),
            data=DataConfig(
                source=str(corpus),
                mixture=(ComponentConfig(name="other", source=str(other_corpus)),),
                weights={"text": 2.0, "other": 1.0},
                validation_fraction=0.1,
            ),
            phases=PHASES,
            optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2, **optimizer),
            checkpoint=CheckpointConfig(every=4, keep_latest=10),
            metrics=MetricsConfig(every=3, tensorboard=False),
            evaluation=EvaluationConfig(every=6, rows=8),
        )  # fmt: skip

    return make


PLAIN: dict = {}
AVERAGE = {"ema_decay": 0.9}


@pytest.fixture(scope="module", params=[PLAIN, AVERAGE], ids=["plain", "average"])
def whole_run(request, long_config, run_on, tmp_path_factory):
    """Config, folder and batches of a run that nothing interrupted."""
    config, batches = long_config(**request.param), {}
    workdir = tmp_path_factory.mktemp("whole") / "run"
    with recording(batches):
        assert run_on(1, config, workdir) == 0
    return config, workdir, batches


@contextlib.contextmanager
def recording(batches):
    """Notes every batch by its step."""
    real = OfflineSource.next

    def next_batch(source, params, step):
        batch = real(source, params, step)
        batches[step] = jax.device_get(batch)
        return batch

    with mock.patch.object(OfflineSource, "next", next_batch):
        yield


class Stop:
    """Delivers a signal to this process while the batch of one global step is asked for."""

    def __init__(self, step, number=signal.SIGTERM):
        self._step, self._number = step, number

    def __enter__(self):
        real = OfflineSource.next

        def next_batch(source, params, step):
            if step == self._step:
                os.kill(os.getpid(), self._number)
            return real(source, params, step)

        self._patch = mock.patch.object(OfflineSource, "next", next_batch)
        self._patch.__enter__()

    def __exit__(self, *error):
        self._patch.__exit__(*error)


def saved(workdir, step):
    """All arrays of a checkpoint, and where its cursor stands."""
    folder = workdir.absolute() / "checkpoints" / str(step)
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = {item: checkpointer.restore(folder / item) for item in ("params", "train")}
    cursor = json.loads((folder / "data" / "metadata").read_text())
    return arrays, {key: cursor[key] for key in ("clock", "source", "sums")}


def without_speed(record):
    return {key: value for key, value in record.items() if key != "tokens_per_second"}


def recorded(workdir):
    return [without_speed(record) for record in read_metrics_file(workdir / "metrics.jsonl")]


def result_of(workdir):
    return json.loads((workdir / "result.json").read_text())


def assert_same_run(workdir, reference):
    arrays, cursor = saved(workdir, STEPS)
    expected_arrays, expected_cursor = saved(reference, STEPS)
    assert jax.tree.structure(arrays) == jax.tree.structure(expected_arrays)
    for leaf, expected in zip(
        jax.tree.leaves(arrays), jax.tree.leaves(expected_arrays), strict=True
    ):
        assert np.asarray(leaf).tobytes() == np.asarray(expected).tobytes()
    assert cursor == expected_cursor
    assert recorded(workdir) == recorded(reference)
    result, expected = result_of(workdir), result_of(reference)
    for key in ("status", "step", "tokens", "hashes", "skipped_steps"):
        assert result[key] == expected[key]
    assert without_speed(result["metrics"]) == without_speed(expected["metrics"])


def test_the_uninterrupted_run_goes_through_everything_a_resume_could_lose(whole_run):
    records = recorded(whole_run[1])
    gates = [(r["step"], r["gate/open"]) for r in records if "gate/open" in r]
    assert gates == [(5, 1.0), (9, 0.0), (12, 0.0), (14, 1.0)]
    assert records[-2]["step"] == STEPS
    losses = [r for r in records if "loss" in r]
    assert [r["step"] for r in losses] == [3, 5, 6, 9, 12, 14, 15, 18]
    assert [r["phase"] for r in losses] == [1, 1, 2, 2, 2, 2, 3, 3]
    tokens_a_step = 16 * 8, 32 * 4, 32 * 4
    assert (
        losses[-1]["tokens"] == 5 * tokens_a_step[0] + 9 * tokens_a_step[1] + 4 * tokens_a_step[2]
    )


def test_a_run_stopped_again_and_again_ends_bit_for_bit_as_if_it_had_not(
    whole_run, run_on, tmp_path
):
    config, reference, _ = whole_run
    # The middle of a phase, its very end, the first step of the next, extra steps, the last phase.
    for step, number in [
        (1, signal.SIGTERM), (4, signal.SIGINT), (5, signal.SIGTERM), (10, signal.SIGTERM),
        (13, signal.SIGINT), (15, signal.SIGTERM), (STEPS - 1, signal.SIGTERM),
    ]:  # fmt: skip
        with Stop(step, number):
            assert run_on(1, config, tmp_path) == 128 + number
        assert json.loads((tmp_path / "result.json").read_text())["status"] == "interrupted"
        assert (tmp_path / "checkpoints" / str(step + 1)).is_dir()
    assert run_on(1, config, tmp_path) == 0
    assert_same_run(tmp_path, reference)


@pytest.mark.parametrize("whole_run", [PLAIN], ids=["plain"], indirect=True)
def test_a_resumed_run_may_change_its_mesh(whole_run, run_on, tmp_path):
    config, reference, expected = whole_run
    batches = {}
    with Stop(10):
        assert run_on(1, config, tmp_path) == 128 + signal.SIGTERM
    config = config.copy_and_resolve_references()
    config.mesh.update(data=1, fsdp=2, tensor=2)
    with recording(batches):
        assert run_on(4, config, tmp_path) == 0
    np.testing.assert_allclose(losses_of(tmp_path), losses_of(reference), rtol=1e-4)
    assert_close_trees(saved(tmp_path, STEPS)[0]["params"], saved(reference, STEPS)[0]["params"])
    assert set(batches) == set(range(11, STEPS))
    for step, batch in batches.items():
        jax.tree.map(np.testing.assert_array_equal, batch, expected[step])


@pytest.mark.slow
def test_a_run_in_stages_goes_on_on_one_device(tiny_config, run_on, tmp_path):
    """Through training, evaluation, checkpoint and sample: what is stored knows of no stages."""
    config = tiny_config(
        model=ModelConfig(
            embed_dim=32, num_layers=4, num_heads=2, mlp_dim=64, max_length=128, scan_layers=True
        ),
        sample=SampleConfig(max_new_tokens=3),
    )
    assert run_on(1, config, tmp_path / "one") == 0
    config.mesh.update(data=1, stage=4)
    with Stop(3):
        assert run_on(4, config, tmp_path / "stages") == 128 + signal.SIGTERM
    config.mesh.update(data=1, stage=1)
    assert run_on(1, config, tmp_path / "stages") == 0
    found, expected = tmp_path / "stages", tmp_path / "one"
    np.testing.assert_allclose(losses_of(found), losses_of(expected), rtol=1e-4)
    params = [saved(workdir, 6)[0]["params"] for workdir in (found, expected)]
    assert_close_trees(*params)


def losses_of(workdir):
    return [record["loss"] for record in recorded(workdir) if "loss" in record]


def assert_close_trees(tree, expected):
    for leaf, wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(leaf), np.asarray(wanted), atol=2e-4)


# --- a hand-made trainer --------------------------------------------------------------------------


@flax.struct.dataclass
class Points:
    """values: float32 [batch, 1]."""

    values: jax.Array


class PointSource:
    """Ones, and NaN at some steps; notes what the loop asks for."""

    def __init__(self, mesh, bad_steps=()):
        self._sharding, self._bad_steps = sharding.batch_sharding(mesh), bad_steps
        self.started, self.steps = [], []

    def start(self, phase, first_step):
        self._batch = phase.batch
        self.started.append((phase.index, first_step))

    def next(self, params, step):
        self.steps.append(step)
        value = np.nan if step in self._bad_steps else 1.0
        return Points(jax.device_put(np.full((self._batch, 1), value, np.float32), self._sharding))

    def progress(self, step):
        return {"epoch": step / 100}

    def state(self):
        return {}

    def restore(self, state):
        pass


def squared_distance(params, batch, rng):
    distance = jnp.square(params["w"] - batch.values)
    return Mean(jnp.sum(distance), jnp.float32(distance.size)), {}


def point_trainer(config, mesh, source, evaluations=()):
    """A trainer that pulls four numbers to 1; `evaluations` are (name, [result, ...]) pairs."""
    scripts = [
        Evaluation(name, functools.partial(lambda results, params: next(results), iter(results)))
        for name, results in evaluations
    ]
    return Trainer(
        phases=plan(config.phases, config.optimizer, RopeConfig(), {"text": 1.0}),
        init_params=lambda rng: {"w": sharding.Named(jax.random.normal(rng, (4,)), ("norm",))},
        load_params=None,
        source=source,
        setting=lambda phase: Setting(
            objective=squared_distance,
            evaluations=tuple(scripts),
            sample=None,
            meta={"stage": "point", "length": phase.length},
            flops_per_token=1.0,
            micro_batches=1,
        ),
        tokenizer=ByteTokenizer(),
        data_fingerprint="points",
    )


def point_config(phases, **sections):
    settings = {
        "optimizer": OptimizerConfig(learning_rate=0.1, warmup_steps=2, weight_decay=0.0),
        "evaluation": EvaluationConfig(every=1000),
        "checkpoint": CheckpointConfig(every=1000),
        "metrics": MetricsConfig(every=1, tensorboard=False),
    }
    return RunConfig(phases=phases, **{**settings, **sections})


def train_points(config, workdir, evaluations=(), bad_steps=()):
    """Returns the outcome and the source."""
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    source = PointSource(mesh, bad_steps)
    trainer = point_trainer(config, mesh, source, evaluations)
    with jax.set_mesh(mesh), RunLog(workdir, config.metrics, {}) as log:
        return train(trainer, config, mesh, workdir, log), source


def test_learning_rates_are_scaled_by_the_width_of_the_model(tmp_path):
    config = point_config((PhaseConfig(length=1, batch=2, steps=3),))
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    trainer = dataclasses.replace(
        point_trainer(config, mesh, PointSource(mesh)), width_multiplier=4.0
    )
    with (
        mock.patch.object(optim, "make_optimizer", wraps=optim.make_optimizer) as made,
        jax.set_mesh(mesh),
        RunLog(tmp_path, config.metrics, {}) as log,
    ):
        train(trainer, config, mesh, tmp_path, log)
    assert made.call_args.args[2] == 4.0


GATED = (
    PhaseConfig(length=1, batch=2, steps=4, gate=GateConfig(short_loss_tolerance=0.1)),
    PhaseConfig(
        length=1, batch=2, steps=3, rewarm_steps=2,
        gate=GateConfig(short_loss_tolerance=0.1, check_every=2, max_extra_steps=5),
    ),
    PhaseConfig(length=1, batch=2, steps=2),
)  # fmt: skip


def short(*losses):
    return "short", [{"loss": loss} for loss in losses]


def needle(*accuracies):
    return "needle", [{"accuracy": accuracy} for accuracy in accuracies]


def test_a_gate_holds_until_its_conditions_pass(tmp_path, capsys):
    config = point_config(GATED)
    evaluations = [short(2.0, 2.2, 2.05, 2.05, 2.05), needle(0.95, 0.95, 0.5, 0.95, 0.95)]
    outcome, source = train_points(config, tmp_path, evaluations)
    assert outcome.step == 4 + (3 + 4) + 2
    assert outcome.tokens == 13 * 2
    assert source.steps == list(range(13))
    assert source.started == [(0, 0), (1, 4), (1, 4), (1, 4), (2, 11)]

    records = read_metrics_file(tmp_path / "metrics.jsonl")
    gates = [(r["step"], r["gate/open"]) for r in records if "gate/open" in r]
    assert gates == [(4, 1.0), (7, 0.0), (9, 0.0), (11, 1.0)]
    steps = [r for r in records if "loss" in r]
    assert [r["phase"] for r in steps] == [1] * 4 + [2] * 7 + [3] * 2
    assert [r["tokens"] for r in steps] == list(range(2, 28, 2))

    # One schedule over the 9 planned steps; extra steps keep the last rate of their phase.
    planned = schedules.learning_rates(config.optimizer, 9)
    planned[4] *= 0.5  # the re-warm
    expected = [*planned[:7], *[planned[6]] * 4, *planned[7:]]
    np.testing.assert_allclose([r["learning_rate"] for r in steps], expected, rtol=1e-6)

    output = capsys.readouterr().out
    assert output.count("phase 2 of 3") == 1  # a gate that holds compiles nothing anew
    assert "gate of phase 2 at length 1 holds until step 9" in output
    assert "gate of phase 2 at length 1 opens" in output


def test_a_gate_is_forced_open_at_its_bound(tmp_path, capsys):
    evaluations = [short(2.0, *[3.0] * 5), needle(*[0.95] * 6)]
    outcome, source = train_points(point_config(GATED), tmp_path, evaluations)
    assert outcome.step == 4 + (3 + 5) + 2
    assert source.started[-1] == (2, 12)
    assert "is forced open" in capsys.readouterr().out


def test_the_last_phase_may_have_a_gate_too(tmp_path):
    evaluations = [short(2.0, 2.0), needle(0.0, 0.95)]
    phases = (PhaseConfig(length=1, batch=2, steps=2, gate=GateConfig(check_every=3)),)
    outcome, _ = train_points(point_config(phases, optimizer=QUICK), tmp_path, evaluations)
    assert outcome.step == 5


QUICK = OptimizerConfig(learning_rate=0.1, warmup_steps=1, weight_decay=0.0)
ONE_PHASE = (PhaseConfig(length=1, batch=2, steps=8),)


def test_a_step_that_is_not_finite_is_skipped_and_counted(run_on, tmp_path):
    def build(config, mesh, workdir, log):
        return point_trainer(config, mesh, PointSource(mesh, bad_steps=(3, 4)))

    config = point_config(ONE_PHASE, trainer="point", checkpoint=CheckpointConfig(every=4))
    with mock.patch.dict(TRAINERS, point=Stage(RunConfig, build)):
        assert run_on(1, defaults_of(config), tmp_path) == 0
    result = result_of(tmp_path)
    assert (result["status"], result["step"], result["skipped_steps"]) == ("finished", 8, 2)
    records = [r for r in read_metrics_file(tmp_path / "metrics.jsonl") if "loss" in r]
    assert [math.isnan(r["loss"]) for r in records] == [s in (3, 4) for s in range(8)]
    assert [r["skipped_steps"] for r in records] == [0, 0, 0, 1, 2, 2, 2, 2]
    assert records[-1]["loss"] < records[0]["loss"]
    # A not-a-number in the sums of the record does not keep a checkpoint from being written.
    assert np.isfinite(saved(tmp_path, 8)[0]["params"]["w"]).all()


def defaults_of(config):
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return config_module.defaults(type(config), **fields)


def test_every_checkpoint_and_evaluation_happens_at_its_interval(tmp_path):
    config = point_config(
        (PhaseConfig(length=1, batch=2, steps=5), PhaseConfig(length=1, batch=2, steps=5)),
        evaluation=EvaluationConfig(every=3),
        checkpoint=CheckpointConfig(every=4, keep_latest=100),
    )
    train_points(config, tmp_path, [("validation", [{"loss": 1.0}] * 10)])
    records = read_metrics_file(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if "eval/validation/loss" in r] == [3, 5, 6, 9, 10]
    saved_steps = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert saved_steps == [4, 5, 8, 10]


def train_with(config, workdir, **evaluations):
    """The outcome of training with evaluations that are given as functions, by name."""
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    trainer = point_trainer(config, mesh, PointSource(mesh))
    setting = dataclasses.replace(
        trainer.setting(trainer.phases[0]),
        evaluations=tuple(Evaluation(name, run) for name, run in evaluations.items()),
    )
    trainer = dataclasses.replace(trainer, setting=lambda phase: setting)
    with jax.set_mesh(mesh), RunLog(workdir, config.metrics, {}) as log:
        return train(trainer, config, mesh, workdir, log)


def test_evaluations_see_the_average_of_the_parameters(tmp_path):
    seen = []
    config = point_config(ONE_PHASE, optimizer=dataclasses.replace(QUICK, ema_decay=0.5))
    train_with(config, tmp_path, watch=lambda params: seen.append(jax.device_get(params)) or {})
    arrays, _ = saved(tmp_path, 8)
    np.testing.assert_array_equal(seen[0]["w"], arrays["params"]["w"])
    assert not np.array_equal(seen[0]["w"], arrays["train"]["params"]["w"])


def test_an_evaluation_that_fails_is_recorded_and_training_goes_on(tmp_path, capfd):
    calls = itertools.count()

    def once(params):
        if next(calls) == 1:
            raise RuntimeError("no\nluck")
        return {"score": 2.0}

    def always(params):
        raise UserError("the data is gone.")

    config = point_config(ONE_PHASE, evaluation=EvaluationConfig(every=3))
    outcome = train_with(config, tmp_path, once=once, always=always)
    told = "".join(capfd.readouterr())
    assert "evaluation once failed: RuntimeError: no luck" in told
    assert "evaluation always failed: the data is gone." in told
    records = read_metrics_file(tmp_path / "metrics.jsonl")
    records = [record for record in records if "eval/always/failed" in record]
    assert [r.get("eval/once/score") for r in records] == [2.0, None, 2.0]
    assert [r.get("eval/once/failed") for r in records] == [None, 1.0, None]
    assert outcome.step == 8 and outcome.failed_evaluations == 4
    assert outcome.metrics["eval/always/failed"] == 1.0
    assert "eval/once/failed" not in outcome.metrics
    # They are counted over the whole run.
    phases = (PhaseConfig(length=1, batch=2, steps=9),)
    longer = dataclasses.replace(config, phases=phases)
    assert train_with(longer, tmp_path, always=always).failed_evaluations == 5


def test_a_user_who_stops_an_evaluation_stops_the_run(tmp_path):
    def stop(params):
        raise KeyboardInterrupt

    config = point_config(ONE_PHASE, evaluation=EvaluationConfig(every=3))
    with pytest.raises(KeyboardInterrupt):
        train_with(config, tmp_path, stop=stop)


def test_a_window_of_steps_is_profiled(tmp_path):
    config = point_config(ONE_PHASE, profile=ProfileConfig(start=2, steps=2))
    train_points(config, tmp_path)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_run_that_ended_before_it_could_say_so_records_nothing_twice(tmp_path):
    """A crash between the last checkpoint and result.json."""
    script = [("validation", [{"loss": 1.5}])]
    train_points(point_config(ONE_PHASE), tmp_path, script)
    before = (tmp_path / "metrics.jsonl").read_text()
    outcome, source = train_points(point_config(ONE_PHASE), tmp_path, script)
    assert source.steps == []
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert outcome.metrics["eval/validation/loss"] == 1.5
    assert outcome.metrics["loss"] > 0

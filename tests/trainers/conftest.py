"""A tiny pre-trained run, examples for the stages after it, and how those are started."""

import contextlib
import json
import signal
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from llm_jax import config as config_module
from llm_jax import weights
from llm_jax.checkpoint import CheckpointConfig
from llm_jax.config import build as build_config
from llm_jax.data.chat_corpus import ChatDataConfig
from llm_jax.data.offline import OfflineSource
from llm_jax.data.phases import PhaseConfig
from llm_jax.data.preferences import PreferenceDataConfig
from llm_jax.data.prompts import PromptDataConfig
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.metrics import MetricsConfig, read_metrics_file
from llm_jax.models.config import ModelConfig
from llm_jax.optim import OptimizerConfig
from llm_jax.rl.rewards import RewardTerm
from llm_jax.rl.rollouts import RolloutConfig
from llm_jax.sharding import unbox
from llm_jax.trainers import TRAINERS
from llm_jax.trainers.base import SampleConfig
from llm_jax.trainers.on_policy import OnPolicyEvaluationConfig
from llm_jax.trainers.preference import PreferenceEvaluationConfig
from llm_jax.trainers.rounds import OnPolicySource
from llm_jax.trainers.sft import SFTEvaluationConfig
from llm_jax.types import join

STRENGTHS = ("significantly better", "better", "slightly better", "negligibly better")
COLOURS = ("red", "green", "blue")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def examples(tmp_path_factory):
    """The folder of chats.jsonl, pairs.jsonl, ranked.jsonl and unpaired.jsonl."""
    folder = tmp_path_factory.mktemp("examples")
    asked = [(f"What is {i}?", COLOURS[i % 3], COLOURS[(i + 1) % 3]) for i in range(40)]
    write(folder / "chats.jsonl", [{"prompt": p, "completion": a} for p, a, _ in asked])
    write(
        folder / "pairs.jsonl",
        [
            {"prompt": p, "chosen": a, "rejected": f"not {b}", "strength": STRENGTHS[i % 4]}
            for i, (p, a, b) in enumerate(asked)
        ],
    )
    write(
        folder / "ranked.jsonl",
        [
            {"prompt": p, "responses": [a, b, a + b][:count], "ranks": [1, 3, 2][:count]}
            for count, (p, a, b) in zip([2, 3] * 20, asked, strict=True)
        ],
    )
    write(
        folder / "unpaired.jsonl",
        [
            {"prompt": p, "completion": f"not {b}" if i % 2 else a, "label": i % 2 == 0}
            for i, (p, a, b) in enumerate(asked)
        ],
    )
    return folder


@pytest.fixture(scope="session")
def pretrained(tiny_config, run_on, tmp_path_factory):
    """The folder of a finished pre-training run of a few steps."""
    workdir = tmp_path_factory.mktemp("pretrained") / "run"
    config = tiny_config(
        model=ModelConfig(
            embed_dim=16, num_layers=1, num_heads=2, mlp_dim=24, max_length=160, mlp="gelu"
        ),
        phases=(PhaseConfig(length=32, batch=8, steps=4),),
    )
    assert run_on(1, config, workdir) == 0
    return workdir


@pytest.fixture(scope="session")
def configure(examples, pretrained):
    """`configure(trainer, **sections)`: the ConfigDict of a stage that starts from `pretrained`."""

    def make(trainer, **sections):
        chats = trainer == "sft"
        data = ChatDataConfig if chats else PreferenceDataConfig
        evaluation = (
            SFTEvaluationConfig(every=1000, rows=8, answers=0)
            if chats
            else PreferenceEvaluationConfig(every=1000, rows=8)
        )
        settings = {
            "init_from": str(pretrained),
            "data": data(
                source=str(examples / ("chats.jsonl" if chats else "pairs.jsonl")),
                validation_fraction=0.2,
            ),
            "phases": (PhaseConfig(length=32, batch=8, steps=2),),
            "optimizer": OptimizerConfig(learning_rate=3e-3, warmup_steps=0, schedule="constant"),
            "evaluation": evaluation,
            "checkpoint": CheckpointConfig(every=1000),
            "metrics": MetricsConfig(every=1, tensorboard=False),
            "sample": SampleConfig(max_new_tokens=0),
        }
        return config_module.defaults(TRAINERS[trainer].config, **{**settings, **sections})

    return make


@pytest.fixture(scope="session")
def start(configure, run_on, tmp_path_factory):
    """`start(trainer, **sections)`: the folder of a finished run of a stage."""

    def make(trainer, *, devices=1, workdir=None, **sections):
        workdir = workdir or tmp_path_factory.mktemp(trainer) / "run"
        assert run_on(devices, configure(trainer, **sections), workdir) == 0
        return workdir

    return make


@pytest.fixture(scope="session")
def build(configure, tmp_path_factory):
    """`build(trainer, **sections)`: the stage on one device, or on a mesh that is given, wired, and
    what it logged."""

    def make(trainer, *, workdir=None, mesh=None, **sections):
        lines = []
        mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
        config = build_config(TRAINERS[trainer].config, configure(trainer, **sections))
        workdir = workdir or tmp_path_factory.mktemp("workdir") / "run"
        with jax.set_mesh(mesh):
            return TRAINERS[trainer].build(config, mesh, workdir, lines.append), lines

    return make


@pytest.fixture(scope="session")
def beginning():
    """`beginning(trainer)`: all parameters that the stage starts from, and its first batch."""

    def make(trainer):
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        with jax.set_mesh(mesh):
            if trainer.load_params is None:
                params = unbox(jax.jit(trainer.init_params)(jax.random.key(0)))
            else:
                boxed = jax.eval_shape(trainer.init_params, jax.random.key(0))
                params = trainer.load_params(weights.abstract(mesh, boxed))
            trainer.source.start(trainer.phases[0], 0)
            return join(params, trainer.frozen), trainer.source.next(None, 0)

    return make


@pytest.fixture(scope="session")
def first_loss(beginning):
    """`first_loss(trainer)`: the loss of the first batch, and the objective's metrics."""

    def measure(trainer):
        params, batch = beginning(trainer)
        objective = trainer.setting(trainer.phases[0]).objective
        with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
            loss, metrics = jax.jit(lambda p, b: objective(p, b, None))(params, batch)
        return float(loss.value()), {name: float(m.value()) for name, m in metrics.items()}

    return measure


class Folder:
    """What a finished run wrote."""

    def __init__(self, workdir):
        self.workdir = Path(workdir)

    @property
    def result(self):
        return json.loads((self.workdir / "result.json").read_text())

    @property
    def step(self):
        return max(int(p.name) for p in (self.workdir / "checkpoints").iterdir())

    def item(self, name):
        """An item of the newest checkpoint, as numpy arrays by their paths."""
        folder = self.workdir.absolute() / "checkpoints" / str(self.step) / name
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(folder)
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}

    @property
    def params(self):
        return self.item("params")

    def logged(self, key):
        """The values of one key, in the order in which they were logged."""
        return [r[key] for r in read_metrics_file(self.workdir / "metrics.jsonl") if key in r]


@pytest.fixture(scope="session")
def opened():
    """`opened(workdir)`: what a finished run wrote."""
    return Folder


@pytest.fixture(scope="session")
def reward_of(tmp_path_factory):
    """`reward_of(source)`: the rewards section for a function `reward` written so."""
    folder = tmp_path_factory.mktemp("rewards")
    with mock.patch("sys.path", [str(folder), *sys.path]):

        def make(source, weight=1.0):
            name = f"reward_{abs(hash(source))}"
            (folder / f"{name}.py").write_text(source)
            return (RewardTerm(f"{name}:reward", weight),)

        yield make


@pytest.fixture(scope="session")
def vowels_reward(reward_of):
    return reward_of(
        "def reward(prompt, completion, row):\n"
        "    return sum(letter in 'aeiou' for letter in completion) / 6\n"
    )


@pytest.fixture(scope="session")
def configure_on_policy(examples, pretrained, vowels_reward):
    """`configure_on_policy(trainer, **sections)`: the ConfigDict of a stage that samples."""

    def make(trainer, **sections):
        settings = {
            "init_from": str(pretrained),
            "data": PromptDataConfig(source=str(examples / "chats.jsonl"), validation_fraction=0.2),
            "rollout": RolloutConfig(samples=4, max_new_tokens=6),
            "rewards": vowels_reward,
            "phases": (PhaseConfig(length=32, batch=16, steps=2),),
            "optimizer": OptimizerConfig(learning_rate=3e-3, warmup_steps=0, schedule="constant"),
            "evaluation": OnPolicyEvaluationConfig(every=1000, rows=4, at_start=False),
            "checkpoint": CheckpointConfig(every=1000),
            "metrics": MetricsConfig(every=1, tensorboard=False),
            "sample": SampleConfig(max_new_tokens=0),
        }
        return config_module.defaults(TRAINERS[trainer].config, **{**settings, **sections})

    return make


@pytest.fixture(scope="session")
def killed_at():
    """`with killed_at(step, source):` a run must end there without a word, or a checkpoint, since
    its source, a class, raises."""

    class Killed(Exception):
        pass

    @contextlib.contextmanager
    def killed(step, source=OfflineSource):
        real = source.next

        def next_batch(self, params, current):
            if current == step:
                raise Killed
            return real(self, params, current)

        with mock.patch.object(source, "next", next_batch), pytest.raises(Killed):
            yield

    return killed


@pytest.fixture(scope="session")
def on_policy(configure_on_policy, run_on, tmp_path_factory, opened):
    """`on_policy(trainer, **sections)`: a finished run of a stage; `devices`, `workdir` too."""

    def make(trainer, *, devices=1, workdir=None, expect=0, **sections):
        workdir = workdir or tmp_path_factory.mktemp(trainer) / "run"
        assert run_on(devices, configure_on_policy(trainer, **sections), workdir) == expect
        return opened(workdir)

    return make


@pytest.fixture(scope="session")
def check_resumes(on_policy, tmp_path_factory):
    """`check_resumes(trainer, stop_at, **sections)`: stopped at that step, a run goes on bit for
    bit as if nothing had happened."""

    def check(trainer, stop_at, **sections):
        workdir, original = tmp_path_factory.mktemp("stopped") / "run", OnPolicySource.next

        def stopping(self, params, step):
            if step == stop_at:
                signal.raise_signal(signal.SIGTERM)
            return original(self, params, step)

        with mock.patch.object(OnPolicySource, "next", stopping):
            on_policy(trainer, workdir=workdir, expect=143, **sections)
        resumed = on_policy(trainer, workdir=workdir, **sections)
        whole = on_policy(trainer, **sections)
        for item in ("params", "train"):
            first, second = whole.item(item), resumed.item(item)
            assert first.keys() == second.keys()
            jax.tree.map(np.testing.assert_array_equal, first, second)
        for key in ("reward", "loss", "kl_coefficient", "ptx_loss"):
            assert whole.logged(key) == resumed.logged(key)

    return check

"""The conformance matrix: five steps of training on every mesh axis, and on products of them,
against one device in float32; and the exchanges of each compiled step.

Losses and gradient norms agree within a relative 5e-5: sums in another order. Those of one device,
and the exchanges, are kept in tests/golden/layouts.json, so that no change alters either unseen;
`python tests/parity/test_layouts.py` writes it anew.
"""

import dataclasses
import functools
import itertools
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from llm_jax import optim, sharding, step, weights
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.models import LanguageModel, LoraConfig, ModelConfig, MoeConfig
from llm_jax.models.pipeline import PipelineConfig
from llm_jax.objectives import lm
from llm_jax.optim import OptimizerConfig
from llm_jax.scaling import hlo, program
from llm_jax.types import Batch

GOLDEN = Path(__file__).parents[1] / "golden" / "layouts.json"
STEPS, BATCH, LENGTH, VOCABULARY = 5, 8, 32, 64
TOLERANCE = 5e-5

DENSE = ModelConfig(
    vocab_size=VOCABULARY, embed_dim=32, num_layers=4, num_heads=4, num_kv_heads=2, mlp_dim=64,
    window=9, attention_pattern=("local", "global"), scan_layers=True, remat="full",
    logits_soft_cap=30.0,
)  # fmt: skip
MODELS = {
    "dense": DENSE,
    "moe": dataclasses.replace(DENSE, moe=MoeConfig(num_experts=4)),
    "capacity": dataclasses.replace(DENSE, moe=MoeConfig(num_experts=4, capacity_factor=1.5)),
    "lora": dataclasses.replace(DENSE, lora=LoraConfig(rank=4)),
    "plain": dataclasses.replace(DENSE, remat="none"),
    "unscanned": dataclasses.replace(DENSE, remat="save_attention", scan_layers=False),
}
# Those whose first and whose later micro-batches are cut out of one batch have 2.
ACCUMULATED = ("plain", "unscanned")

ONE = MeshConfig(data=1)
AXES = ("data", "fsdp", "tensor", "expert", "context", "stage")
PRODUCTS = (
    ("data", "fsdp", "tensor"), ("fsdp", "context", "tensor"), ("stage", "fsdp", "tensor"),
    ("stage", "context", "tensor"), ("stage", "data", "context"), ("data", "expert", "tensor"),
    ("fsdp", "expert", "context"), ("stage", "expert", "fsdp"),
)  # fmt: skip


# What every run of the tests compares, and what the slow ones do beside.
FAST = [("dense", (axis,)) for axis in AXES if axis != "expert"] + [
    ("moe", ("expert",)), ("moe", ("data",)),
]  # fmt: skip
SLOW = [
    *((name, axes) for name in ("dense", "moe") for axes in PRODUCTS),
    *(("moe", (axis,)) for axis in ("fsdp", "tensor", "context", "stage")),
    *((name, (axis,)) for name in MODELS if name not in ("dense", "moe")
      for axis in ("fsdp", "tensor", "context")),
    ("capacity", ("expert",)), ("lora", ("stage",)), ("plain", ("stage", "fsdp", "tensor")),
]  # fmt: skip


def layout(*axes):
    return MeshConfig(**{"data": 1, **dict.fromkeys(axes, 2)})


def cases(pairs):
    """Pairs that exist: an axis of experts needs some."""
    return [
        pytest.param(name, axes, id=f"{name}-{'-'.join(axes)}")
        for name, axes in pairs
        if "expert" not in axes or MODELS[name].moe is not None
    ]


@functools.cache
def batches():
    """Packed rows: two or three documents each, padding at the end of some, prompts not counted."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(STEPS):
        tokens = rng.integers(0, VOCABULARY, (BATCH, LENGTH + 1), dtype=np.int32)
        segments = np.zeros((BATCH, LENGTH), np.int32)
        positions = np.zeros_like(segments)
        for row in range(BATCH):
            cuts = [0, *sorted(rng.choice(np.arange(4, 28), 2, replace=False)), LENGTH - row % 3]
            for number, (begin, end) in enumerate(itertools.pairwise(cuts), start=1):
                segments[row, begin:end] = number
                positions[row, begin:end] = np.arange(end - begin)
        counted = (segments > 0) & (rng.random(segments.shape) < 0.8)
        made.append(
            Batch(tokens[:, :-1], tokens[:, 1:], counted.astype(np.float32), segments, positions)
        )
    return made


class Training:
    """A model laid out over a mesh, its step compiled."""

    def __init__(self, name, mesh_config, **changes):
        model_config = dataclasses.replace(MODELS[name], **changes)
        sizes = [getattr(mesh_config, axis) for axis in AXES]
        self.mesh = make_mesh(mesh_config, jax.devices()[: int(np.prod(sizes))])
        model = LanguageModel(model_config, "cpu")
        base_config = dataclasses.replace(model_config, lora=None)

        def init_base(rng):
            return weights.init_weights(base_config, (), rng)

        def init(rng):
            if model_config.lora is None:
                return init_base(rng)
            shapes = sharding.unbox(jax.eval_shape(init_base, rng))
            return weights.init_trained(model_config, (), rng, base=shapes)

        key = jax.random.key(0)
        with jax.set_mesh(self.mesh):
            boxed = jax.eval_shape(init, key)
            optimizer = optim.make_optimizer(
                OptimizerConfig(learning_rate=3e-3, epsilon=1e-4), sharding.unbox(boxed)
            )

            def unboxed(rng):
                return sharding.unbox(init(rng))

            where = sharding.parameter_shardings(self.mesh, boxed)
            _, shardings = step.init_state(unboxed, optimizer, 0, self.mesh, where)
            state = step.materialise(unboxed, optimizer, 0, shardings)
            if model_config.lora is not None:
                base = sharding.parameter_shardings(self.mesh, jax.eval_shape(init_base, key))
                frozen = jax.jit(lambda: sharding.unbox(init_base(key)), out_shardings=base)()
                state = dataclasses.replace(state, frozen=frozen)
                shardings = dataclasses.replace(shardings, frozen=base)
            self.state = state
            train_step = step.make_train_step(
                lm.make_objective(model, lm.LossConfig(chunk=8, z_loss=1e-3, load_balance=0.1)),
                optimizer,
                mesh=self.mesh,
                shardings=shardings,
                micro_batches=2 if name in ACCUMULATED else 1,
            )
            lowered = train_step.lower(state, self._place(0), np.float32(0))
            self.compiled = lowered.compile()

    def losses(self):
        """Loss and gradient norm of each step."""
        made = []
        with jax.set_mesh(self.mesh):
            for number in range(STEPS):
                self.state, metrics = self.compiled(
                    self.state, self._place(number), np.float32(3e-3)
                )
                made.append([float(metrics["loss"].value()), float(metrics["grad_norm"])])
        return made

    def exchanges(self):
        """Executions of each kind of collective over each set of axes."""
        module = hlo.parse(self.compiled.as_text())
        found = program.collectives(module, dict(self.mesh.shape))
        return {f"{c.kind} {' x '.join(c.axes)}": c.count for c in found}

    def _place(self, number):
        return jax.device_put(batches()[number], sharding.batch_sharding(self.mesh))


@functools.cache
def on_one_device(name):
    with jax.default_matmul_precision("highest"):
        return Training(name, ONE).losses()


@functools.cache
def golden():
    return json.loads(GOLDEN.read_text())


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("name", [
    name if name in ("dense", "moe") else pytest.param(name, marks=pytest.mark.slow)
    for name in MODELS
])  # fmt: skip
def test_one_device_trains_as_it_always_did(name):
    np.testing.assert_allclose(on_one_device(name), golden()["losses"][name], rtol=TOLERANCE)


@pytest.mark.parametrize("name, axes", cases(FAST))
def test_an_axis_changes_no_step(name, axes):
    compare(name, axes)


@pytest.mark.slow
@pytest.mark.parametrize("name, axes", cases(SLOW))
def test_a_product_of_axes_changes_no_step(name, axes):
    compare(name, axes)


@pytest.mark.slow
@pytest.mark.parametrize("changes, axes", [
    ({"context_attention": "all_gather"}, ("fsdp", "context", "tensor")),
    ({"pipeline": PipelineConfig(repeats=2), "attention_pattern": None}, ("stage", "tensor")),
    ({"pipeline": PipelineConfig(micro_batches=4)}, ("stage", "data")),
])  # fmt: skip
def test_other_ways_over_the_same_axes_change_no_step(changes, axes):
    alone = Training("dense", ONE, **changes).losses()
    split = Training("dense", layout(*axes), **changes).losses()
    np.testing.assert_allclose(split, alone, rtol=TOLERANCE)


def compare(name, axes):
    training = Training(name, layout(*axes))
    np.testing.assert_allclose(training.losses(), on_one_device(name), rtol=TOLERANCE)
    assert training.exchanges() == golden()["exchanges"][f"{name} {' '.join(axes)}"]


def write():
    with jax.default_matmul_precision("highest"):
        losses = {name: on_one_device(name) for name in MODELS}
        exchanges = {}
        for case in cases([*FAST, *SLOW]):
            name, axes = case.values
            exchanges[f"{name} {' '.join(axes)}"] = Training(name, layout(*axes)).exchanges()
            print(case.id, file=sys.stderr, flush=True)
        content = {"losses": losses, "exchanges": exchanges}
        GOLDEN.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    write()

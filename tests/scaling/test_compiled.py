"""Programs compiled for TPUs that are not there, by their own compiler; CI installs it.

`python tests/scaling/test_compiled.py` writes tests/golden/tpu_memory.json anew.
"""

import dataclasses
import json
from importlib import metadata
from pathlib import Path

import pytest

from llm_jax.data.phases import PhaseConfig
from llm_jax.errors import UserError
from llm_jax.mesh import MeshConfig, resolve
from llm_jax.models import ModelConfig
from llm_jax.models.lora import LoraConfig
from llm_jax.models.size import adapter_count, parameter_count
from llm_jax.objectives import dpo
from llm_jax.objectives.lm import LossConfig
from llm_jax.optim import OptimizerConfig
from llm_jax.scaling import compiled, stages
from llm_jax.scaling.compiled import Program, TooLarge
from llm_jax.scaling.presets import find_cluster
from llm_jax.scaling.roofline import roofline
from llm_jax.trainers.dpo import DPOConfig
from llm_jax.trainers.pretrain import PretrainConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "tpu_memory.json"
MODEL = ModelConfig(
    vocab_size=4096, embed_dim=512, num_layers=8, num_heads=8, num_kv_heads=4, mlp_dim=1408,
    dtype="bfloat16", scan_layers=True, remat="full",
)  # fmt: skip
SLICES = {
    "v5e:2x2": MeshConfig(data=1, fsdp=4),
    "v5p:2x2x1": MeshConfig(data=1, fsdp=2, tensor=2),
}


def config(mesh, **changes):
    model = dataclasses.replace(MODEL, **changes)
    return PretrainConfig(
        model=model,
        loss=LossConfig(chunk=512),
        phases=(PhaseConfig(length=1024, batch=8, steps=1),),
        optimizer=OptimizerConfig(warmup_steps=0),
        mesh=mesh,
    )


def train_step(name, **changes):
    compiled.prepare()
    settings = config(SLICES[name], **changes)
    _, devices = compiled.describe(name)
    (phase,) = stages.phases_of(settings)
    return compiled.compile_train_step(settings, phase, devices)


@pytest.fixture(scope="module")
def compiler():
    pytest.importorskip("libtpu", reason="pip install 'jax[tpu]'")
    compiled.prepare()


@pytest.mark.slow
@pytest.mark.parametrize("name", SLICES)
def test_memory_is_what_it_was(compiler, name):
    golden = json.loads(GOLDEN.read_text())
    if metadata.version("libtpu") != golden["libtpu"]:
        pytest.skip(f"the figures are of libtpu {golden['libtpu']}")
    assert train_step(name).memory.peak == pytest.approx(golden["peak"][name], rel=0.03)


@pytest.mark.slow
def test_a_training_step_on_four_chips(compiler):
    """Its parts by hand; attention is the TPU's kernel; what the roofline says of it."""
    step = train_step("v5e:2x2")
    assert isinstance(step, Program)
    parameters = parameter_count(MODEL)
    assert step.memory.parameters == pytest.approx(4 * parameters / 4, rel=0.01)
    assert step.memory.optimizer == pytest.approx(2 * step.memory.parameters, rel=0.01)
    assert step.memory.peak > step.memory.parameters + step.memory.optimizer
    # Forward twice, for it is computed again; backward once.
    counts = {name: count for name, count in step.kernels.items() if "splash" in name}
    assert sorted(counts.values()) == [8, 8, 16]
    # 8 operations a weight and token, where 6 are the model's; of the output projection 6.
    again = step.flops / step.model_flops
    assert 1.2 < again < 1.35
    assert all(c.axes == ("fsdp",) for c in step.collectives if c.bytes > 1e5)
    times = roofline(step, resolve(SLICES["v5e:2x2"], 4), find_cluster("v5e-4"))
    assert times.seconds == max(times.compute, times.memory, sum(times.links.values()))
    assert times.compute == step.flops / 197e12
    assert 0 < times.mfu < 1 / again + 1e-9


@pytest.mark.slow
def test_a_row_over_all_chips_needs_memory_for_its_part(compiler):
    """Four times the length on four times the chips: a ring gathers no keys."""
    compiled.prepare()
    peaks = {}
    for length, mesh in ((1024, MeshConfig(data=4)), (4096, MeshConfig(data=1, context=4))):
        settings = config(mesh, num_layers=2)
        _, devices = compiled.describe("v5e:2x2")
        settings = dataclasses.replace(
            settings, phases=(PhaseConfig(length=length, batch=4 if mesh.data > 1 else 1, steps=1),)
        )
        (phase,) = stages.phases_of(settings)
        step = compiled.compile_train_step(settings, phase, devices)
        peaks[length] = step.memory.activations
        assert step.kernels
    assert peaks[4096] < 1.5 * peaks[1024]


@pytest.mark.slow
def test_a_decode_step_reads_the_parameters(compiler):
    settings = config(SLICES["v5e:2x2"])
    _, devices = compiled.describe("v5e:2x2")
    step = compiled.compile_decode_step(settings, 8, 1024, devices)
    assert isinstance(step, Program)
    assert step.memory.optimizer == 0
    assert step.model_flops < 1e9
    assert step.memory.other > 2 * 8 * 4 * 64 * 1024 * 2 * 8 / 4  # keys and values of 8 layers


@pytest.mark.slow
def test_a_step_of_adapters_keeps_nothing_for_their_base(compiler):
    """DPO on pairs: twice the rows of text; the optimiser sees the adapters alone."""
    mesh = SLICES["v5e:2x2"]
    settings = config(mesh)
    model = dataclasses.replace(MODEL, lora=LoraConfig(rank=4))
    adapting = DPOConfig(
        model=model, phases=settings.phases, optimizer=settings.optimizer, mesh=mesh,
        loss=dpo.LossConfig(reference="adapter_off", chunk=512),
    )  # fmt: skip
    _, devices = compiled.describe("v5e:2x2")
    (phase,) = stages.phases_of(adapting)
    step = compiled.compile_train_step(adapting, phase, devices)
    assert isinstance(step, Program)
    assert step.name == "train, 8 rows of 2 x 1,024"
    adapters = 4 * adapter_count(model)
    base = parameter_count(MODEL)  # 4 bytes each, on four devices
    assert 1 < step.memory.parameters / base < 1.01 + adapters / base
    assert step.memory.gradients <= adapters
    assert step.memory.optimizer <= 2 * adapters + 1000


@pytest.mark.slow
def test_what_does_not_fit_is_told(compiler):
    settings = config(SLICES["v5e:2x2"], remat="none", embed_dim=4096, mlp_dim=16384, num_layers=32)
    _, devices = compiled.describe("v5e:2x2")
    (phase,) = stages.phases_of(settings)
    step = compiled.compile_train_step(settings, phase, devices)
    assert isinstance(step, TooLarge)
    assert step.needed is None or step.needed > 15e9


@pytest.mark.parametrize("name, message", [
    ("v5e:3x5", r"no slice 'v5e:3x5'\. Known: .*v5e:4x4"),
    ("v9:2x2", r"no slice 'v9:2x2'\. Known: .*v4:.*v5e:4x4"),
    ("h100x8", "programs for GPUs are compiled where they run"),
    ("v5e-15", r"no cluster 'v5e-15'\. Known: .*v5e-16"),
])  # fmt: skip
def test_slices_that_do_not_exist(name, message):
    with pytest.raises(UserError, match=message):
        compiled.describe(name)


@pytest.mark.parametrize("message, needed", [
    ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 17.25G of 15.75G hbm.", 17.25),
    ("RESOURCE_EXHAUSTED: total memory required for HLO temporaries (28.50G) exceeds", 28.5),
    ("RESOURCE_EXHAUSTED: something else", None),
])  # fmt: skip
def test_how_much_is_missing(message, needed):
    found = compiled._needed(message)
    assert found == (None if needed is None else needed * 2**30)


if __name__ == "__main__":
    peaks = {name: train_step(name).memory.peak for name in SLICES}
    golden = {"libtpu": metadata.version("libtpu"), "peak": peaks}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")

"""What `scaling.stages` tells of a stage's step without its data and weights is what the stage
itself makes of them."""

import jax
import pytest

from llm_jax.config import build as build_config
from llm_jax.data.preferences import PreferenceDataConfig
from llm_jax.errors import UserError
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.models.config import ModelConfig
from llm_jax.models.lora import LoraConfig
from llm_jax.objectives.dpo import LossConfig
from llm_jax.scaling import stages
from llm_jax.sharding import unbox
from llm_jax.trainers import TRAINERS
from llm_jax.types import join

ADAPTERS = ModelConfig(lora=LoraConfig(rank=2))
DORA = ModelConfig(lora=LoraConfig(rank=2, dora=True))


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def described(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), unbox(tree))


@pytest.mark.parametrize("name, sections", [
    ("sft", {}),
    ("sft", {"model": ADAPTERS, "quantize_base": "nf4"}),
    ("sft", {"model": DORA}),
    ("reward", {}),
    ("reward", {"model": ADAPTERS}),
    ("dpo", {}),
    ("dpo", {"loss": LossConfig(variant="simpo")}),
    ("dpo", {"loss": LossConfig(variant="kto")}),
    ("dpo", {"model": ADAPTERS, "loss": LossConfig(reference="adapter_off")}),
])  # fmt: skip
def test_shapes_and_computation_are_those_of_the_stage(
    name, sections, configure, build, examples, mesh
):
    if name == "dpo" and sections.get("loss", LossConfig()).variant == "kto":
        source = str(examples / "unpaired.jsonl")
        sections = {**sections, "data": PreferenceDataConfig(source=source)}
    trainer, _ = build(name, **sections)
    config = build_config(TRAINERS[name].config, configure(name, **sections))
    (phase,) = stages.phases_of(config)
    (whole,) = trainer.phases
    assert (phase.length, phase.batch, phase.sequences) == (
        whole.length, whole.batch, whole.sequences,
    )  # fmt: skip
    with jax.set_mesh(mesh):
        trainer.source.start(whole, 0)
        setting, batch = trainer.setting(whole), trainer.source.next(None, 0)
        found = stages.of_phase(config, phase, mesh)
        trained = jax.eval_shape(trainer.init_params, jax.random.key(0))
        assert described(found.trained) == described(trained)
        assert described(found.frozen) == described(trainer.frozen)
        assert described(found.batch) == described(batch)
        params = join(unbox(found.trained), unbox(found.frozen) or {})
        rng = jax.random.key(0)
        steps = [
            str(jax.make_jaxpr(objective)(params, found.batch, rng))
            for objective in (found.objective, setting.objective)
        ]
    assert steps[0] == steps[1]


def test_rows_that_are_compared_are_not_cut(configure, mesh):
    config = build_config(TRAINERS["dpo"].config, configure("dpo", loss=LossConfig(variant="aot")))
    (phase,) = stages.phases_of(config)
    assert stages.of_phase(config, phase, mesh).whole_batch


def test_a_stage_that_samples_is_refused(configure_on_policy):
    config = build_config(TRAINERS["grpo"].config, configure_on_policy("grpo"))
    with pytest.raises(UserError, match=r"stage 'grpo' is not compiled.*pretrain, sft, reward"):
        stages.phases_of(config)

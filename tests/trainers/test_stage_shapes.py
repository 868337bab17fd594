"""What `scaling.stages` tells of a stage's step without its data and weights is what the stage
itself makes of them."""

import jax
import pytest

from llm_jax import weights
from llm_jax.config import build as build_config
from llm_jax.data.preferences import PreferenceDataConfig
from llm_jax.errors import UserError
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.models.config import ModelConfig
from llm_jax.models.lora import LoraConfig
from llm_jax.models.size import flops_per_token
from llm_jax.objectives import grpo, ppo
from llm_jax.objectives.dpo import LossConfig
from llm_jax.rl.advantages import KLConfig
from llm_jax.scaling import stages
from llm_jax.sharding import unbox
from llm_jax.trainers import TRAINERS
from llm_jax.trainers.critic import CriticConfig
from llm_jax.trainers.ppo import PretrainingConfig
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


@pytest.mark.parametrize("name, sections", [
    ("grpo", {}),
    ("grpo", {"model": ADAPTERS, "loss": grpo.LossConfig(beta=0.1)}),
    ("ppo", {}),
    ("ppo", {"kl": KLConfig(coefficient=0)}),
    ("ppo", {"model": ADAPTERS, "critic": CriticConfig()}),
    ("ppo", {"loss": ppo.LossConfig(ptx_coefficient=0.5), "critic": CriticConfig()}),
])  # fmt: skip
def test_shapes_and_computation_are_those_of_a_stage_that_samples(
    name, sections, configure_on_policy, corpus, mesh, tmp_path
):
    if name == "ppo":
        sections = {**sections, "pretraining": PretrainingConfig(source=str(corpus), rows=2)}
    config = build_config(TRAINERS[name].config, configure_on_policy(name, **sections))
    (phase,) = stages.phases_of(config)
    with jax.set_mesh(mesh):
        trainer = TRAINERS[name].build(config, mesh, tmp_path / "run", lambda line: None)
        (whole,) = trainer.phases
        trainer.source.start(whole, 0)
        boxed = jax.eval_shape(trainer.init_params, jax.random.key(0))
        trained = trainer.load_params(weights.abstract(mesh, boxed))
        params = join(trained, trainer.frozen)
        setting, batch = trainer.setting(whole), trainer.source.next(params, 0)
        found = stages.of_phase(config, phase, mesh)
        assert described(found.trained) == described(trained)
        assert described(found.frozen) == described(trainer.frozen)
        assert described(found.batch) == described(batch)
        rng = jax.random.key(0)
        steps = [
            str(jax.make_jaxpr(objective)(params, found.batch, rng))
            for objective in (found.objective, setting.objective)
        ]
    assert steps[0] == steps[1]
    read = sum(flops_per_token(model, phase.length) * n for model, n in found.reads)
    assert read == setting.flops_per_token
    reference = trainer.source._reference
    own = None if reference is None else reference.own
    assert described(stages.reference_of(config, found.model.config)) == described(own)


def test_rows_that_are_compared_are_not_cut(configure, mesh):
    config = build_config(TRAINERS["dpo"].config, configure("dpo", loss=LossConfig(variant="aot")))
    (phase,) = stages.phases_of(config)
    assert stages.of_phase(config, phase, mesh).whole_batch


def test_a_stage_that_distils_is_refused():
    config = TRAINERS["distill"].config()
    with pytest.raises(UserError, match=r"stage 'distill' is not compiled.*pretrain, sft, reward"):
        stages.phases_of(config)

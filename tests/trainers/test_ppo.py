"""PPO's critics, on the policy or beside it, and the text that is mixed in."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import weights
from llm_jax.config import build as build_config
from llm_jax.data.corpus import Corpus
from llm_jax.data.phases import PhaseConfig
from llm_jax.data.tokenizers import TokenizerConfig
from llm_jax.errors import UserError
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.models import LanguageModel
from llm_jax.models.config import ModelConfig
from llm_jax.models.heads import values
from llm_jax.models.lora import LoraConfig
from llm_jax.models.size import flops_per_token
from llm_jax.objectives import lm, ppo
from llm_jax.optim import OptimizerConfig
from llm_jax.rl.advantages import KLConfig
from llm_jax.rl.rollouts import RolloutConfig
from llm_jax.runs import load_run
from llm_jax.step import StepConfig
from llm_jax.trainers import ppo as stage
from llm_jax.trainers.critic import CriticConfig
from llm_jax.trainers.ppo import AdvantageConfig, PPOConfig, PretrainingConfig
from tools import merge
from tools.cli import run_tool
from tools.sampling import check_generates

NO_KL = KLConfig(coefficient=0.0)
PTX = ppo.LossConfig(ptx_coefficient=0.7)
STILL = OptimizerConfig(learning_rate=0.0, warmup_steps=0, schedule="constant")
SMALLER = ModelConfig(embed_dim=8, num_layers=2, num_heads=1, mlp_dim=12, max_length=64)


@pytest.fixture(scope="module")
def text(corpus):
    """`text(**settings)`: the section `pretraining`."""
    return lambda **settings: PretrainingConfig(source=str(corpus), **settings)


@pytest.fixture(scope="module")
def reward_run(start):
    """A reward run of another architecture than the policy's."""
    return start("reward", init_from=None, model=SMALLER, tokenizer=TokenizerConfig(path="bytes"))


@pytest.fixture(scope="module")
def wired(configure_on_policy, reward_of, tmp_path_factory):
    """`wired(**sections)`: the stage on one device, all its parameters, and its first batch."""
    rewards = reward_of(  # whatever is sampled, some are better
        "def reward(prompt, completion, row):\n    return sum(map(ord, completion)) % 7 / 7\n"
    )

    def make(**sections):
        settings = {
            "rewards": rewards,
            "phases": (PhaseConfig(length=32, batch=8, steps=2),),
            "optimizer": STILL,
            "kl": NO_KL,
        }
        config = build_config(PPOConfig, configure_on_policy("ppo", **{**settings, **sections}))
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        with jax.set_mesh(mesh):
            trainer = stage.build(config, mesh, tmp_path_factory.mktemp("wired"), lambda _: None)
            boxed = jax.eval_shape(trainer.init_params, jax.random.key(0))
            params = trainer.load_params(weights.abstract(mesh, boxed))
            trainer.source.start(trainer.phases[0], 0)
            return trainer, params, trainer.source.next(params, 0)

    return make


# --- critics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("critic", [None, CriticConfig()])
def test_a_critic_learns_what_is_to_be_expected(critic, on_policy, reward_of):
    run = on_policy(
        "ppo",
        critic=critic,
        rewards=reward_of("def reward(prompt, completion, row):\n    return 0.5\n"),
        kl=NO_KL,
        advantage=AdvantageConfig(lambda_=1.0),  # the return of every token is the reward
        loss=ppo.LossConfig(value_clip=1e9, value_coefficient=1.0),
        phases=(PhaseConfig(length=32, batch=16, steps=12),),
    )
    losses = run.logged("value_loss")
    assert losses[0] == pytest.approx(0.5 * 0.5**2, rel=1e-4)  # it begins by expecting 0
    assert losses[-1] < losses[0] / 5


def test_a_critic_of_its_own_leaves_the_policy_alone(wired):
    """The value loss reaches the critic, the policy's loss reaches the policy, and neither both."""
    trainer, params, batch = wired(critic=CriticConfig())
    assert "value_head" not in params and "value_head" in params["critic"]
    critic = params["critic"]["value_head"]["kernel"] + 0.1  # of zeros, it would hide the rest
    params = {**params, "critic": {**params["critic"], "value_head": {"kernel": critic}}}
    objective = trainer.setting(trainer.phases[0]).objective

    def gradients(batch):
        return jax.jit(jax.grad(lambda p: objective(p, batch, None)[0].total))(params)

    def is_zero(tree):
        return [not np.any(leaf) for leaf in jax.tree.leaves(tree)]

    by_values = gradients(dataclasses.replace(batch, advantages=0 * batch.advantages))
    expected = by_values.pop("critic")
    assert all(is_zero(by_values)) and any(np.any(x) for x in jax.tree.leaves(expected))
    by_both = gradients(batch)
    jax.tree.map(np.testing.assert_array_equal, by_both.pop("critic"), expected)
    assert not any(is_zero(by_both))


def test_a_critic_begins_as_the_reward_model_it_comes_from(on_policy, reward_run, opened):
    critic = CriticConfig(init_from=str(reward_run))
    run = on_policy("ppo", critic=critic, optimizer=STILL)
    wanted = {
        "['critic']" + name.replace("reward_head", "value_head"): value
        for name, value in opened(reward_run).params.items()
    }
    found = {name: value for name, value in run.params.items() if "critic" in name}
    assert any("value_head" in name for name in found)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, wanted[name])


def test_advantages_are_over_what_the_critic_expects(wired, reward_run):
    _, params, batch = wired(critic=CriticConfig(init_from=str(reward_run)))
    critic = load_run(str(reward_run)).model
    expected = jax.jit(lambda p, b: values(critic, p, b))(params["critic"], batch.sequences)
    inside = batch.sequences.loss_weights > 0
    np.testing.assert_allclose(batch.values, np.where(inside, expected, 0), atol=1e-5)
    assert np.std(expected[inside]) > 1e-3


def test_a_critic_costs_what_its_architecture_does(wired, reward_run, pretrained):
    policy, critic = (
        flops_per_token(load_run(str(run)).model.config, 32) for run in (pretrained, reward_run)
    )

    def cost(**sections):
        trainer, _, _ = wired(**sections)
        return trainer.setting(trainer.phases[0]).flops_per_token

    assert cost() == policy
    assert cost(critic=CriticConfig()) == 2 * policy
    assert cost(critic=CriticConfig(init_from=str(reward_run))) == policy + critic != 2 * policy


def test_a_critic_follows_the_ropes_of_the_phases(wired, reward_run):
    """By its own settings, with what a phase changes."""
    phases = (
        PhaseConfig(length=32, batch=8, steps=1),
        PhaseConfig(length=32, batch=8, steps=1, rope_theta=123.0),
    )
    trainer, params, batch = wired(critic=CriticConfig(init_from=str(reward_run)), phases=phases)
    plain, changed = (
        jax.jit(trainer.setting(phase).objective)(params, batch, None)[1]["value_loss"].value()
        for phase in trainer.phases
    )
    assert plain != changed


def test_a_critic_of_another_width_by_mup_is_refused(wired, monkeypatch):
    def wide(asked, found):
        return dataclasses.replace(found, mup_base_width=found.embed_dim // 2)

    monkeypatch.setattr("llm_jax.trainers.critic.inherited_model", wide)
    with pytest.raises(UserError, match="critic is 2 times as wide as its muP base, the policy 1"):
        wired(critic=CriticConfig())


@pytest.mark.parametrize("critic", [None, CriticConfig()])
def test_a_critic_is_left_behind(critic, on_policy, start, opened):
    run = on_policy("ppo", critic=critic)
    assert any("value_head" in name for name in run.params)
    loaded = load_run(str(run.workdir))
    check_generates(loaded)
    assert "critic" not in loaded.params
    later = opened(start("sft", init_from=str(run.workdir)))
    assert not any("value_head" in name for name in later.params)


def test_a_policy_of_adapters_may_have_a_whole_critic(on_policy, start, tmp_path):
    run = on_policy("ppo", critic=CriticConfig(), model=ModelConfig(lora=LoraConfig(rank=2)))
    assert run.logged("kl_sequence")[0] == pytest.approx(0, abs=1e-4)
    policy = {name for name in run.params if not name.startswith("['critic']")}
    assert policy and all("lora" in name for name in policy)
    critic = {name for name in run.params if name.startswith("['critic']")}
    assert any("embedding" in name for name in critic) and not any("lora" in n for n in critic)
    merged = tmp_path / "merged"
    arguments = ["merge", f"--workdir={run.workdir}", f"--output={merged}"]
    assert run_tool(merge.main, merge.define_flags(), "", arguments) == 0
    start("sft", init_from=str(merged))


# --- text -----------------------------------------------------------------------------------------


def test_text_adds_its_gradient_weighed(wired, text):
    trainer, params, batch = wired(loss=PTX, pretraining=text(rows=2))
    without, _, same = wired()
    np.testing.assert_array_equal(batch.sequences.tokens, same.sequences.tokens)
    assert batch.pretraining.tokens.shape == (16, 32) and same.pretraining is None
    model = LanguageModel(load_run(trainer.lineage[-1]["run"]).model.config)
    on_text = lm.make_objective(model, lm.LossConfig())

    def gradient(objective, batch):
        return jax.jit(jax.grad(lambda p: objective(p, batch, None)[0].value()))(params)

    found = gradient(trainer.setting(trainer.phases[0]).objective, batch)
    alone = gradient(without.setting(without.phases[0]).objective, same)
    added = gradient(on_text, batch.pretraining)
    assert max(jnp.max(jnp.abs(x)) for x in jax.tree.leaves(added)) > 0.01
    jax.tree.map(
        lambda x, y, z: np.testing.assert_allclose(x, y + 0.7 * z, rtol=1e-4, atol=1e-6),
        found, alone, added,
    )  # fmt: skip


def test_text_comes_from_the_corpus_and_depends_on_the_step_alone(wired, text):
    phases = (
        PhaseConfig(length=32, batch=8, steps=2),
        PhaseConfig(length=48, batch=8, steps=2),
    )
    trainer, params, first = wired(loss=PTX, pretraining=text(), phases=phases)
    known = Corpus(text(), trainer.tokenizer, 0).rows(32, {})["text"]
    known = {known[i].tokens.tobytes() for i in range(len(known))}
    second = trainer.source.next(params, 1)
    for batch in (first, second):
        assert all(np.asarray(row).tobytes() in known for row in batch.pretraining.tokens)
    assert not np.array_equal(first.pretraining.tokens, second.pretraining.tokens)
    again, params, _ = wired(loss=PTX, pretraining=text(), phases=phases)
    again.source.start(again.phases[0], 0)
    np.testing.assert_array_equal(
        again.source.next(params, 1).pretraining.tokens, second.pretraining.tokens
    )
    again.source.start(again.phases[1], 2)
    assert again.source.next(params, 2).pretraining.tokens.shape == (8, 48)


def test_text_is_cut_into_micro_batches_as_completions_are(on_policy, text):
    # Where gradients are next to nothing, Adam would make much of how they are rounded.
    optimizer = dataclasses.replace(STILL, learning_rate=3e-3, epsilon=1e-2)
    sections = {"loss": PTX, "pretraining": text(rows=3), "kl": NO_KL, "optimizer": optimizer}
    small, large = (
        on_policy("ppo", step=StepConfig(micro_batch_tokens=tokens), **sections)
        for tokens in (128, 1 << 20)
    )
    assert small.logged("ptx_loss") == pytest.approx(large.logged("ptx_loss"), rel=1e-5)
    for name, value in small.params.items():
        np.testing.assert_allclose(value, large.params[name], atol=1e-5)


def test_text_counts_in_costs_and_hashes(wired, text):
    sections = {"step": StepConfig(micro_batch_tokens=128)}
    plain, _, _ = wired(**sections)
    mixed, _, _ = wired(loss=PTX, pretraining=text(rows=3), **sections)
    one, other = (trainer.setting(trainer.phases[0]) for trainer in (plain, mixed))
    assert other.flops_per_token == 4 * one.flops_per_token
    assert (one.micro_batches, other.micro_batches) == (2, 8)  # of 4 rows, and of 1 with 3 of text
    assert plain.data_fingerprint != mixed.data_fingerprint


def test_without_a_coefficient_no_text_is_read(on_policy):
    nowhere = PretrainingConfig(source="/no/such/text.txt")
    assert on_policy("ppo", pretraining=nowhere).logged("ptx_loss") == []
    with pytest.raises(UserError, match="no/such/text"):
        on_policy("ppo", pretraining=nowhere, loss=PTX)


# --- both -----------------------------------------------------------------------------------------


def test_the_mesh_changes_nothing(on_policy, text):
    sections = {"seed": 1, "critic": CriticConfig(), "loss": PTX, "pretraining": text()}
    alone = on_policy("ppo", **sections)
    spread = on_policy("ppo", devices=4, mesh=MeshConfig(data=2, fsdp=2), **sections)
    assert alone.logged("reward") == spread.logged("reward")
    assert any("critic" in name for name in alone.params)
    for name, value in alone.params.items():
        np.testing.assert_allclose(value, spread.params[name], atol=1e-5)


def test_a_run_that_was_stopped_goes_on_bit_for_bit(check_resumes, reward_run, text):
    check_resumes(
        "ppo",
        3,  # in the middle of a round
        critic=CriticConfig(init_from=str(reward_run)),
        loss=PTX,
        pretraining=text(rows=2),
        kl=KLConfig(coefficient=0.1, target=0.01, horizon=50),
        rollout=RolloutConfig(samples=4, max_new_tokens=6, updates=2),
        phases=(PhaseConfig(length=32, batch=8, steps=6),),
    )


def test_what_does_not_fit_is_refused(on_policy, start, tmp_path):
    other = TokenizerConfig(vocab_size=300)
    stranger = start("reward", init_from=None, model=SMALLER, tokenizer=other)
    shorter = dataclasses.replace(SMALLER, max_length=24)
    own = TokenizerConfig(path="bytes")
    short = start(
        "reward", init_from=None, model=shorter, tokenizer=own,
        phases=(PhaseConfig(length=24, batch=8, steps=1),),
    )  # fmt: skip
    for message, sections in {
        "another tokenizer than the policy": {"critic": CriticConfig(str(stranger))},
        "past the positions of model.max_length=24": {"critic": CriticConfig(str(short))},
        "is no run directory": {"critic": CriticConfig("/no/such/run")},
        "improves a model that answers already": {"init_from": None, "critic": CriticConfig()},
        "improves a model": {"init_from": None},
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            on_policy("ppo", workdir=tmp_path / "run", **sections)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"pretraining\.rows=0 must be at least 1"):
        PretrainingConfig(rows=0)

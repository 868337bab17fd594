"""Every kind of stage after another, a few steps each; the argument is as in pretrain.py."""

from pathlib import Path

from llm_jax.checkpoint import CheckpointConfig
from llm_jax.config import defaults
from llm_jax.data.chat_corpus import ChatDataConfig
from llm_jax.data.phases import PhaseConfig
from llm_jax.data.preferences import PreferenceDataConfig
from llm_jax.data.prompts import PromptDataConfig
from llm_jax.mesh import MeshConfig
from llm_jax.metrics import MetricsConfig
from llm_jax.optim import OptimizerConfig
from llm_jax.recipe import load_config, recipe
from llm_jax.rl.rewards import RewardTerm
from llm_jax.rl.rollouts import RolloutConfig
from llm_jax.trainers import TRAINERS
from llm_jax.trainers.base import SampleConfig
from llm_jax.trainers.on_policy import OnPolicyEvaluationConfig
from llm_jax.trainers.preference import PreferenceEvaluationConfig
from llm_jax.trainers.sft import SFTEvaluationConfig


def get_config(folder):
    def stage(trainer, origin, **sections):
        settings = {
            "init_from": f"{{{origin}}}",
            "phases": (PhaseConfig(length=32, batch=8, steps=2),),
            "optimizer": OptimizerConfig(learning_rate=3e-3, warmup_steps=0, schedule="constant"),
            "checkpoint": CheckpointConfig(every=1000),
            "metrics": MetricsConfig(every=1, tensorboard=False),
            "sample": SampleConfig(max_new_tokens=8),
            "mesh": MeshConfig(data=-1, fsdp=2),
        }
        return defaults(TRAINERS[trainer].config, **{**settings, **sections})

    chats, pairs = f"{folder}/chats.jsonl", f"{folder}/pairs.jsonl"
    held_out = {"validation_fraction": 0.2}
    no_sample = SampleConfig(max_new_tokens=0)
    on_policy = {
        "data": PromptDataConfig(source=chats, **held_out),
        "rollout": RolloutConfig(samples=4, max_new_tokens=6),
        "phases": (PhaseConfig(length=32, batch=16, steps=2),),
        "evaluation": OnPolicyEvaluationConfig(every=1, rows=5, at_start=False),
    }
    pretrain = load_config(Path(__file__).with_name("pretrain.py"), folder)
    pretrain.phases[0].steps = 4
    return recipe(
        pretrain=pretrain,
        sft=stage(
            "sft",
            "pretrain",
            data=ChatDataConfig(source=chats, **held_out),
            evaluation=SFTEvaluationConfig(every=1, rows=5, answers=5),
        ),
        reward=stage(
            "reward",
            "sft",
            data=PreferenceDataConfig(source=pairs, **held_out),
            evaluation=PreferenceEvaluationConfig(every=1, rows=5),
            sample=no_sample,
        ),
        dpo=stage(
            "dpo",
            "sft",
            data=PreferenceDataConfig(source=pairs, **held_out),
            evaluation=PreferenceEvaluationConfig(every=1, rows=5),
        ),
        grpo=stage(
            "grpo", "sft", rewards=(RewardTerm("model", settings={"run": "{reward}"}),), **on_policy
        ),
    )

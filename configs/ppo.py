"""Improves a fine-tuned run by PPO: answers better than the critic expects become likelier.

    python -m llm_jax.main --config=configs/sft.py --workdir=runs/sums_sft \\
        --config.data.source=arithmetic:addition ...                     # a start to improve on
    python -m llm_jax.main --config=configs/ppo.py --config.init_from=runs/sums_sft

The default prompts are sums of two numbers, and an answer is worth 1 if it is right.
"""

from llm_jax.config import defaults, parse_argument
from llm_jax.data.phases import PhaseConfig
from llm_jax.models.config import ModelConfig
from llm_jax.models.lora import LoraConfig
from llm_jax.optim import OptimizerConfig
from llm_jax.rl.rollouts import RolloutConfig
from llm_jax.trainers.base import SampleConfig
from llm_jax.trainers.ppo import PPOConfig


def get_config(argument=None):
    rank = parse_argument(argument, lora="")["lora"]
    return defaults(
        PPOConfig,
        init_from="runs/sums_sft",
        model=ModelConfig(lora=LoraConfig(rank=int(rank)) if rank else None),
        rollout=RolloutConfig(samples=8, max_new_tokens=8),
        phases=(PhaseConfig(length=32, batch=128, steps=100),),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=5, schedule="constant"),
        sample=SampleConfig(prompt="What is 47 + 85?", temperature=0.0),
    )

"""Trains a reward model on comparisons, from a fine-tuned run.

    python -m llm_jax.main --config=configs/reward.py                   # after configs/sft.py
    python -m llm_jax.main --config=configs/reward.py \\
        --config.init_from=RUN --config.data.source=F.jsonl

The default data set the docstring of a function against a mangled one, or another function's.
"""

from llm_jax.config import defaults, parse_argument
from llm_jax.data.phases import PhaseConfig
from llm_jax.models.config import ModelConfig
from llm_jax.models.lora import LoraConfig
from llm_jax.optim import OptimizerConfig
from llm_jax.trainers.base import SampleConfig
from llm_jax.trainers.reward import RewardConfig


def get_config(argument=None):
    rank = parse_argument(argument, lora="")["lora"]
    return defaults(
        RewardConfig,
        init_from="runs/sft",
        model=ModelConfig(lora=LoraConfig(rank=int(rank)) if rank else None),
        phases=(PhaseConfig(length=96, batch=16, steps=400),),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, warmup_steps=20, schedule="linear", final_learning_rate_ratio=0.0
        ),
        sample=SampleConfig(max_new_tokens=0),
    )

"""Optimises a fine-tuned run directly for preferences (DPO and its variants).

    python -m llm_jax.main --config=configs/dpo.py                      # after configs/sft.py
    python -m llm_jax.main --config=configs/dpo.py --config.loss.variant=ipo
    python -m llm_jax.main --config=configs/dpo.py:lora=8 --config.loss.reference=adapter_off

The default data are those of configs/reward.py. About a minute on two fast cores, to a reward
accuracy of 0.93 on held-out pairs.
"""

from llm_jax.config import defaults, parse_argument
from llm_jax.data.phases import PhaseConfig
from llm_jax.models.config import ModelConfig
from llm_jax.models.lora import LoraConfig
from llm_jax.optim import OptimizerConfig
from llm_jax.trainers.base import SampleConfig
from llm_jax.trainers.dpo import DPOConfig
from llm_jax.trainers.preference import PreferenceEvaluationConfig


def get_config(argument=None):
    rank = parse_argument(argument, lora="")["lora"]
    return defaults(
        DPOConfig,
        init_from="runs/sft",
        model=ModelConfig(lora=LoraConfig(rank=int(rank)) if rank else None),
        evaluation=PreferenceEvaluationConfig(every=100),
        phases=(PhaseConfig(length=96, batch=16, steps=200),),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, warmup_steps=20, schedule="linear", final_learning_rate_ratio=0.0
        ),
        sample=SampleConfig(prompt="What does shutil.copyfile(src, dst) do?", temperature=0.0),
    )

"""Fine-tunes a run on the best of several answers of its own (best-of-N).

    python -m llm_jax.main --config=configs/rejection_sampling.py --config.init_from=RUN \\
        --config.data.source=F.jsonl '--config.rewards[0].name=package.module:function'

The default prompts are sums of two numbers, and an answer is worth 1 if it is right. The answers
that were chosen stay in WORKDIR/selected, a data set for fine-tuning, and pairs of the best and the
worst answer in WORKDIR/pairs, one for preference learning. Answers of earlier rounds compete with
the new ones, and those of earlier runs with --config.selection.earlier='("RUN",)'.
"""

from llm_jax.config import defaults, parse_argument
from llm_jax.data.phases import PhaseConfig
from llm_jax.models.config import ModelConfig
from llm_jax.models.lora import LoraConfig
from llm_jax.optim import OptimizerConfig
from llm_jax.rl.rollouts import RolloutConfig
from llm_jax.rl.selection import SelectionConfig
from llm_jax.trainers.base import SampleConfig
from llm_jax.trainers.rejection_sampling import RejectionSamplingConfig


def get_config(argument=None):
    rank = parse_argument(argument, lora="")["lora"]
    return defaults(
        RejectionSamplingConfig,
        init_from="runs/sums_sft",
        model=ModelConfig(lora=LoraConfig(rank=int(rank)) if rank else None),
        rollout=RolloutConfig(samples=16, max_new_tokens=8),
        selection=SelectionConfig(threshold=1.0),
        phases=(PhaseConfig(length=32, batch=64, steps=50),),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=5, schedule="constant"),
        sample=SampleConfig(prompt="What is 47 + 85?", temperature=0.0),
    )

"""Trains a reward model on comparisons, from a fine-tuned run.

    python -m llm_jax.main --config=configs/reward.py                   # after configs/sft.py
    python -m llm_jax.main --config=configs/reward.py \\
        --config.init_from=RUN --config.data.source=F.jsonl

The default data set the docstring of a function against a mangled one, or another function's. About
two minutes on two fast cores, to an accuracy of 0.95 on held-out pairs.
`:kind=safety` trains the second model of Llama 2 (arXiv:2307.09288, section 3.2.2), on pairs in
which declining a harmful request is better and declining a harmless one is worse.
"""

from llm_jax.config import defaults, parse_argument
from llm_jax.data.phases import PhaseConfig
from llm_jax.data.preferences import PreferenceDataConfig
from llm_jax.errors import UserError, did_you_mean
from llm_jax.models.config import ModelConfig
from llm_jax.models.lora import LoraConfig
from llm_jax.optim import OptimizerConfig
from llm_jax.trainers.base import SampleConfig
from llm_jax.trainers.preference import PreferenceEvaluationConfig
from llm_jax.trainers.reward import RewardConfig

SOURCES = {"helpfulness": "stdlib:preferences", "safety": "stdlib:safety"}


def get_config(argument=None):
    given = parse_argument(argument, lora="", kind="helpfulness")
    rank, kind = given["lora"], given["kind"]
    if kind not in SOURCES:
        raise UserError(f"kind={kind!r} is unknown.{did_you_mean(kind, SOURCES)}")
    return defaults(
        RewardConfig,
        init_from="runs/sft",
        model=ModelConfig(lora=LoraConfig(rank=int(rank)) if rank else None),
        data=PreferenceDataConfig(source=SOURCES[kind]),
        evaluation=PreferenceEvaluationConfig(every=100),
        phases=(PhaseConfig(length=96, batch=16, steps=400),),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, warmup_steps=20, schedule="linear", final_learning_rate_ratio=0.0
        ),
        sample=SampleConfig(max_new_tokens=0),
    )

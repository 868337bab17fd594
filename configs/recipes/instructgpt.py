"""Fine-tuning, a reward model of rankings, PPO with text of pre-training mixed in (InstructGPT).

    python -m llm_jax.main --config=configs/recipes/instructgpt.py
    python -m llm_jax.main --config=configs/recipes/instructgpt.py:size=tiny

The three steps of arXiv:2203.02155: demonstrations; a reward model of answers in an order, all
pairs of a ranking at once; PPO against it, with a critic that starts from the reward model, a
penalty on the divergence from the fine-tuned model, and text mixed in (PPO-ptx). The yardstick is
the reward model, on held-out prompts: 60 steps of PPO brought it from 6.36 ± 0.08 to 6.50 ± 0.10.
"""

from pathlib import Path

from llm_jax.data.prompts import PromptDataConfig
from llm_jax.recipe import load_config, recipe
from llm_jax.rl.rewards import RewardTerm
from llm_jax.yardstick import YardstickConfig

CONFIGS = Path(__file__).parents[1]
PROMPTS = "stdlib:preferences"
REWARD = RewardTerm("model", settings={"run": "{reward}"})


def get_config(argument=None):
    pretrain = load_config(CONFIGS / "pretrain.py", argument)
    sft = load_config(CONFIGS / "sft.py")
    sft.init_from = "{pretrain}"
    reward = load_config(CONFIGS / "reward.py")
    reward.init_from, reward.data.source = "{sft}", "stdlib:ranked"
    reward.phases[0].batch = 8  # rankings of five answers
    ppo = load_config(CONFIGS / "ppo.py", "critic={reward}")
    ppo.init_from = "{sft}"
    ppo.data.source = PROMPTS
    ppo.rewards[0].update(name=REWARD.name, settings=REWARD.settings)
    ppo.rollout.update(samples=4, max_new_tokens=48)
    ppo.phases[0].update(length=128, batch=64, steps=60)
    ppo.kl.target = 6.0
    ppo.loss.update(value_coefficient=0.1, ptx_coefficient=1.0)
    ppo.optimizer.learning_rate = 2e-4
    ppo.sample.prompt = sft.sample.prompt
    yardstick = YardstickConfig(
        stages=("sft", "ppo"),
        data=PromptDataConfig(source=PROMPTS),
        rewards=(REWARD,),
        max_new_tokens=48,
        temperature=1.0,
    )
    return recipe(pretrain=pretrain, sft=sft, reward=reward, ppo=ppo, yardstick=yardstick)

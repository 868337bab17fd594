"""Two reward models, rounds of rejection sampling, then PPO (Llama 2-Chat).

    python -m llm_jax.main --config=configs/recipes/llama2_chat.py
    python -m llm_jax.main --config=configs/recipes/llama2_chat.py:size=tiny,rounds=3

The stages of arXiv:2307.09288, section 3: fine-tuning on questions and on requests of which some
are to be declined; a model of helpfulness and one of safety; rounds of rejection sampling, in which
the best answers of earlier rounds compete; and PPO on top. The yardstick is the combination of both
reward models on held-out prompts; with size=tiny it went from 4.67 (fine-tuned) to 5.59 and 6.10
in two rounds, and to 6.56 by PPO.
"""

from pathlib import Path

from llm_jax.config import defaults, parse_argument
from llm_jax.data.chat_corpus import NamedExampleConfig
from llm_jax.data.prompts import PromptDataConfig
from llm_jax.recipe import load_config, recipe
from llm_jax.rl.rewards import RewardTerm
from llm_jax.yardstick import YardstickConfig

CONFIGS = Path(__file__).parents[1]
PROMPTS = "stdlib:requests"
REWARD = RewardTerm("llama2", settings={"safety": "{safety}", "helpfulness": "{helpfulness}"})
LONGEST = 48  # tokens of an answer


def get_config(argument=None):
    given = parse_argument(argument, size="default", rounds="2")
    stages = {"pretrain": load_config(CONFIGS / "pretrain.py", f"size={given['size']}")}
    stages["sft"] = load_config(CONFIGS / "sft.py")
    stages["sft"].init_from = "{pretrain}"
    requests = NamedExampleConfig(source=PROMPTS, name="requests")
    stages["sft"].data.mixture = (defaults(NamedExampleConfig, **vars(requests)),)
    for kind in ("helpfulness", "safety"):
        stages[kind] = load_config(CONFIGS / "reward.py", f"kind={kind}")
        stages[kind].init_from = "{sft}"
    rounds = [f"round_{number}" for number in range(1, int(given["rounds"]) + 1)]
    for place, name in enumerate(rounds):
        stages[name] = load_config(CONFIGS / "rejection_sampling.py")
        stages[name].selection.earlier = tuple(f"{{{before}}}" for before in rounds[:place])
        stages[name].selection.threshold = None
        # One round of answers to 256 prompts, of which the best are trained on.
        stages[name].rollout.update(samples=8, updates=8, epochs=2)
        stages[name].phases[0].update(length=128, batch=32, steps=16)
        stages[name].optimizer.update(learning_rate=1e-3, warmup_steps=2)
    stages["ppo"] = load_config(CONFIGS / "ppo.py")
    stages["ppo"].rollout.samples = 4
    stages["ppo"].phases[0].update(length=128, batch=64, steps=60)
    stages["ppo"].optimizer.learning_rate = 2e-4
    for place, name in enumerate([*rounds, "ppo"]):
        stage = stages[name]
        stage.seed, stage.init_from = place, "{best}"
        stage.sample.prompt = stages["sft"].sample.prompt
        stage.data.source, stage.rollout.max_new_tokens = PROMPTS, LONGEST
        stage.rewards[0].update(name=REWARD.name, settings=REWARD.settings)
    yardstick = YardstickConfig(
        stages=("sft", *rounds, "ppo"),
        data=PromptDataConfig(source=PROMPTS),
        rewards=(REWARD,),
        max_new_tokens=LONGEST,
        temperature=1.0,
    )
    return recipe(**stages, yardstick=yardstick)

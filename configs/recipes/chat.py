"""The whole chain in one command: pre-training, fine-tuning, a reward model, DPO.

    python -m llm_jax.main --config=configs/recipes/chat.py
    python -m llm_jax.main --config=configs/recipes/chat.py:size=tiny    # smaller and sooner
    python -m llm_jax.main --config=configs/recipes/chat.py --config.dpo.loss.variant=simpo

Each stage has its own folder under the workdir (runs/chat); a stage that is finished is left alone
when the command is given again. At the end report.md says what each stage cost and brought.
"""

from configs import dpo, pretrain, reward, sft
from llm_jax.recipe import recipe


def get_config(argument=None):
    stages = {
        "pretrain": pretrain.get_config(argument),
        "sft": sft.get_config(),
        "reward": reward.get_config(),
        "dpo": dpo.get_config(),
    }
    stages["sft"].init_from = "pretrain"
    stages["reward"].init_from = stages["dpo"].init_from = "sft"
    return recipe(**stages)

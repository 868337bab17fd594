"""The whole chain in one command: pre-training, fine-tuning, a reward model, DPO.

    python -m llm_jax.main --config=configs/recipes/chat.py
    python -m llm_jax.main --config=configs/recipes/chat.py:size=tiny    # smaller and sooner
    python -m llm_jax.main --config=configs/recipes/chat.py --config.dpo.loss.variant=simpo

Each stage has its own folder under the workdir (runs/chat); a stage that is finished is left alone
when the command is given again. At the end report.md says what each stage cost and brought. Eight
and a half minutes on two fast cores with nothing cached.
"""

from pathlib import Path

from llm_jax.recipe import load_config, recipe

CONFIGS = Path(__file__).parents[1]


def get_config(argument=None):
    stages = {"pretrain": load_config(CONFIGS / "pretrain.py", argument)}
    for name in ("sft", "reward", "dpo"):
        stages[name] = load_config(CONFIGS / f"{name}.py")
    stages["sft"].init_from = "{pretrain}"
    stages["reward"].init_from = stages["dpo"].init_from = "{sft}"
    return recipe(**stages)

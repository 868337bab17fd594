"""Tasks by name, for `tools.evaluate`; they measure any run or Hugging Face folder.

    python -m tools.evaluate --workdir=RUN --tasks=perplexity,needle,key_value
    python -m tools.evaluate --workdir=RUN --tasks=gsm8k \\
        --config.tasks.gsm8k.settings.data.source=gsm8k_test.jsonl

A stage measures itself by the same tasks while it trains: TaskTerm("key_value") and the like in
config.evaluation.tasks. The data and rewards of "addition", "gsm8k" and "mbpp" are those that
configs/grpo.py takes, as config.data and config.rewards.

Every setting can be overridden by its path. Sources that begin with "hf:" are downloaded by the
package datasets (pip install 'llm_jax[hf]'); a file with the same fields does as well. The others
need nothing: what the run itself held out, or problems that are generated.
"""

import ml_collections

from llm_jax.data.corpus import ComponentConfig
from llm_jax.data.prompts import PromptDataConfig
from llm_jax.evals.tasks import task_config
from llm_jax.rl.rewards import RewardTerm

LETTERED = "{question}\n{choices}\nAnswer:"


def get_config():
    return ml_collections.ConfigDict(
        {
            "tasks": {
                # What the run held out, by component of its mixture; or a text of yours.
                "perplexity": task_config("perplexity"),
                "text": task_config(
                    "perplexity", sources=(ComponentConfig(source="stdlib", name="text"),)
                ),
                # To be found in the context.
                "needle": task_config("needle"),
                "multi_needle": task_config("multi_needle"),
                "variable_tracking": task_config("variable_tracking"),
                "key_value": task_config("key_value"),
                # Multiple choice.
                "arc_easy": _arc("ARC-Easy"),
                "arc_challenge": _arc("ARC-Challenge"),
                "hellaswag": task_config(
                    "multiple_choice",
                    source="hf:Rowan/hellaswag",
                    split="validation",
                    question="ctx",
                    choices="endings",
                    answer="label",
                    context="{question}",
                    unconditional=".",
                ),
                "mmlu": task_config(
                    "multiple_choice",
                    source="hf:cais/mmlu:all",
                    context=LETTERED,
                    continuation=" {letter}",
                    shots=5,
                    shots_source="hf:cais/mmlu:all",
                    shots_split="dev",
                ),
                # A judge's choice between two runs: settings.other_run and settings.judge.
                "win_rate": task_config("win_rate"),
                # Generated answers.
                "ifeval": task_config("instruction_following"),
                "addition": _answers("arithmetic:addition", max_new_tokens=8, held_out=True),
                "gsm8k": _answers(
                    "hf:openai/gsm8k:main", "numeric", split="test", max_new_tokens=256
                ),
                "mbpp": _answers(
                    "hf:google-research-datasets/mbpp:sanitized",
                    "unit_tests",
                    {"field": "test_list"},
                    split="test",
                    max_new_tokens=256,
                    samples=10,
                    temperature=0.8,
                    top_p=0.95,
                    ks=(1, 10),
                ),
            }
        }
    )


def _arc(subset):
    return task_config("multiple_choice", source=f"hf:allenai/ai2_arc:{subset}", answer="answerKey")


def _answers(source, reward="exact_match", settings=None, split="train", **more):
    """Completions to prompts of a source that is there for evaluation alone, unless it is said to
    be held out."""
    return task_config(
        "generation",
        data=PromptDataConfig(source=source, split=split),
        rewards=(RewardTerm(reward, settings=settings or {}),),
        **{"held_out": False, **more},
    )

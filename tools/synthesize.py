"""Conversations out of a fine-tuned model alone, instructions included (MagPie).

    python -m tools.synthesize --workdir=RUN[@STEP] --rows=1000 --output=F.jsonl
        [--reward=RUN --min_reward=0.5 --temperature=1 --top_p=0.99 --similarity=0.7 ...]

The model continues its own chat template where a user would speak, answers what it wrote, and
keeps what passes the filters: rows of the format messages, for configs/sft.py. The sampler's flags
are for the instructions; answers are greedy unless --answer_temperature says otherwise. What the
rows come from is written to F.jsonl.lineage. Needs pip install 'llm_jax[synthesis]'.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from llm_jax.errors import UserError
from tools.cli import require, run_tool
from tools.dataset import new_file, write_dataset
from tools.sampling import define_sampling_flags, make_sampler, run_template

if TYPE_CHECKING:
    from llm_jax.rl.reward_models import RewardModel
    from llm_jax.synthesis.responders import RunResponder

_FILTERS = ("max_instruction_tokens", "min_instruction_tokens", "min_answer_tokens", "similarity",
            "min_reward")  # fmt: skip


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    define_sampling_flags(values)
    text, whole, number = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    text("output", None, "where the JSON lines go, new", flag_values=values)
    whole("rows", None, "conversations to make", flag_values=values)
    whole("attempts", 10, "instructions sampled for a row at most", flag_values=values)
    number("answer_temperature", 0.0, "of the answers; 0 = greedy", flag_values=values)
    whole("max_new_tokens", 256, "of an answer", flag_values=values)
    whole("max_instruction_tokens", 128, "longer ones are dropped", flag_values=values)
    whole("min_instruction_tokens", 4, "shorter ones are dropped", flag_values=values)
    whole("min_answer_tokens", 1, "shorter ones are dropped", flag_values=values)
    number("similarity", 0.7, "of an instruction to one before, from which it is dropped: the "
           "share of runs of five characters that both have", flag_values=values)  # fmt: skip
    text("reward", None, "run of a reward model that scores the answers", flag_values=values)
    number("min_reward", None, "answers with a lower one are dropped", flag_values=values)
    whole("batch", 16, "rows at a time", flag_values=values)
    return values


def main(values: flags.FlagValues) -> None:
    _check(values)
    output = new_file(values.output)
    from llm_jax.compilation import use_compilation_cache
    from llm_jax.generation.sampler import SamplerConfig
    from llm_jax.runs import load_run
    from llm_jax.synthesis.magpie import Magpie, MagpieConfig
    from llm_jax.synthesis.responders import RunResponder

    config = MagpieConfig(**{name: getattr(values, name) for name in _FILTERS})
    sampler = make_sampler(values)
    use_compilation_cache()
    run = load_run(values.workdir)
    responder = RunResponder(
        run,
        run_template(run),
        SamplerConfig(temperature=values.answer_temperature),
        max_new_tokens=values.max_new_tokens,
        batch=values.batch,
    )
    reward = _reward(values, responder)
    magpie = Magpie(responder, sampler, config, reward, batch=values.batch)
    rows = magpie.rows(values.rows, values.rows * values.attempts, values.seed)
    write_dataset(output, rows, magpie.dropped, lambda: _lineage(values, responder))
    print(f"{magpie.sampled:,} instructions were sampled", file=sys.stderr)


def _check(values: flags.FlagValues) -> None:
    """Refuses what can be refused before anything is loaded."""
    require(values, "workdir", "rows", "output")
    for name in ("rows", "attempts", "max_new_tokens", "batch"):
        if (value := getattr(values, name)) < 1:
            raise UserError(f"--{name}={value} must be at least 1.")
    if values.min_reward is not None and not values.reward:
        raise UserError("--min_reward needs a model that gives rewards: name one with --reward.")


def _reward(values: flags.FlagValues, responder: RunResponder) -> RewardModel | None:
    from llm_jax.rl.reward_models import RewardModel
    from llm_jax.rl.scoring import Policy

    if not values.reward:
        return None
    run = responder.run
    policy = Policy(run.tokenizer, run.mesh, print, responder.template)
    return RewardModel(values.reward, values.batch, policy)


def _lineage(values: flags.FlagValues, responder: RunResponder) -> dict[str, Any]:
    settings = ("rows", "attempts", "answer_temperature", "max_new_tokens", "temperature", "top_k",
                "top_p", "min_p", "repetition_penalty", "seed", "reward", *_FILTERS)  # fmt: skip
    return {
        "tool": "synthesize",
        "policy": responder.lineage,
        "settings": {
            name: values[name].value for name in settings if values[name].value is not None
        },
    }


if __name__ == "__main__":
    sys.exit(run_tool(main, define_flags(), __doc__ or ""))

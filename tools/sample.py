"""Makes data sets of a run's own answers: the best ones, and pairs of a good and a bad one.

    python -m tools.sample --workdir=RUN[@STEP] --data=SOURCE --rewards=exact_match \\
        --samples=16 --keep=1 --output=FOLDER [--threshold=1 --temperature=0.8 --rows=1000 ...]

Samples answers to each prompt of the source that is not held out, scores them, and writes
FOLDER/selected, rows of the format `messages` for configs/sft.py, and FOLDER/pairs, rows of the
format `preference` for configs/dpo.py and configs/reward.py. Prints best_of/N, the score that the
best of N answers has on average.

--rewards takes names as in config.rewards, with commas between them (exact_match, numeric,
package.module:function, ...), or a JSON list for those with weights or settings:
--rewards='[{"name": "model", "settings": {"run": "runs/reward"}}]'.
"""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from llm_jax.errors import UserError, disk_errors
from tools.cli import require, run_tool, to_stderr
from tools.sampling import Speaker, define_speaker_flags, load_speaker, make_sampler

if TYPE_CHECKING:
    import numpy as np

    from llm_jax.data.prompts import PromptData, PromptDataConfig
    from llm_jax.generation.sampler import SamplerConfig
    from llm_jax.rl.rewards import RewardTerm, Scorer, Scores
    from llm_jax.rl.scoring import Sample
    from llm_jax.stored import Stored

ROUND = 64  # prompts that are sampled, scored and written at a time


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    define_speaker_flags(values)
    flags.DEFINE_string("data", None, "source of the prompts, as config.data", flag_values=values)
    flags.DEFINE_string(
        "format", None, "format of its rows; absent = the one they fit", flag_values=values
    )
    flags.DEFINE_float(
        "validation_fraction", 0.05, "of the prompts, held out by their hash", flag_values=values
    )
    flags.DEFINE_string("rewards", None, "what answers are scored by", flag_values=values)
    flags.DEFINE_integer(
        "max_reward_failures", 100, "scores that may fail before all does", flag_values=values
    )
    flags.DEFINE_integer("samples", 16, "answers to each prompt", flag_values=values)
    flags.DEFINE_integer("max_new_tokens", 128, "tokens of an answer at most", flag_values=values)
    flags.DEFINE_integer("keep", 1, "answers that are chosen of each prompt", flag_values=values)
    flags.DEFINE_float("threshold", None, "choose none with a lower score", flag_values=values)
    flags.DEFINE_float(
        "margin", 0.0, "by how much the scores of a pair differ at least", flag_values=values
    )
    flags.DEFINE_integer("rows", None, "prompts at most; absent = all", flag_values=values)
    flags.DEFINE_integer("batch", 256, "answers that decode at a time", flag_values=values)
    flags.DEFINE_list(
        "earlier", [], "folders of this tool whose chosen answers compete, too", flag_values=values
    )
    flags.DEFINE_string("output", None, "folder of the data sets, new", flag_values=values)
    return values


def main(values: flags.FlagValues) -> None:
    _check(values)
    import jax

    from llm_jax.compilation import use_compilation_cache
    from llm_jax.rl.selection import best_of
    from llm_jax.runs import check_new

    output = Path(values.output)
    check_new(output, "--output")
    terms, sampler = _rewards(values.rewards), make_sampler(values)
    use_compilation_cache()
    speaker = load_speaker(values)
    # The folder gets its name when everything is in it.
    partial = output.with_name(f".{output.name}.partial")
    with jax.set_mesh(speaker.mesh), disk_errors(output, "Name another folder."):
        shutil.rmtree(partial, ignore_errors=True)
        scores = sample(speaker, values, terms, sampler, partial)
        partial.replace(output)
    for name, score in best_of(scores).items():
        print(f"{name}\t{score:.4f}")


def sample(
    speaker: Speaker,
    values: flags.FlagValues,
    terms: Sequence[RewardTerm],
    sampler: SamplerConfig,
    output: Path,
) -> np.ndarray:
    """Writes the data sets; returns the scores, float32 [prompts, samples].

    Raises:
      UserError: prompts, rewards or earlier answers that do not fit.
    """
    import jax
    import numpy as np

    from llm_jax import stored
    from llm_jax.rl.rewards import Scorer
    from llm_jax.rl.rollouts import RolloutConfig, sample_rollouts
    from llm_jax.rl.scoring import Policy
    from llm_jax.rl.selection import SelectionConfig, Selector

    template, tokenizer = speaker.chat_template, speaker.tokenizer
    data = _prompts(speaker, values)
    source = stored.find(values.workdir)
    count = len(data.train) if values.rows is None else min(values.rows, len(data.train))
    rollout = RolloutConfig(values.samples, values.max_new_tokens, slots=values.batch)
    policy = Policy(tokenizer, speaker.mesh, to_stderr, template)
    scorer = Scorer(terms, values.max_reward_failures, policy)
    selection = SelectionConfig(values.keep, values.threshold, values.margin, tuple(values.earlier))
    lineage = _lineage(source, values, terms, sampler, data)
    selector = Selector(selection, output, template, tokenizer, lineage)
    totals, selected, pairs = [], 0, 0
    for begin in range(0, count, ROUND):
        prompts = data.take(begin, min(ROUND, count - begin))
        length = max(len(prompt.ids) for prompt in prompts) + values.max_new_tokens
        rollouts = sample_rollouts(
            speaker.model,
            speaker.params,
            tokenizer,
            prompts,
            rollout,
            stop_ids=template.stop_ids(tokenizer),
            length=length,
            rng=jax.random.fold_in(jax.random.key(values.seed), begin),
            sampler=sampler,
        )
        scores = scorer(rollouts.samples)
        chosen = selector.select(
            begin,
            prompts,
            rollouts.samples,
            functools.partial(_extended, scorer, scores),
            run=str(source.path),
            step=source.step,
            length=speaker.model.max_length,
        )
        totals.append(scores.total.reshape(len(prompts), -1))
        selected, pairs = selected + chosen.chosen, pairs + chosen.pairs
        to_stderr(f"{begin + len(prompts):,} prompts: {selected:,} answers chosen, {pairs:,} pairs")
    return np.concatenate(totals)


def _check(values: flags.FlagValues) -> None:
    """Refuses what can be refused before anything is loaded."""
    require(values, "workdir", "data", "rewards", "output")
    for name in ("samples", "max_new_tokens", "keep", "batch", "rows"):
        value = values[name].value
        if value is not None and value < 1:
            raise UserError(f"--{name}={value} must be at least 1.")
    if values.keep > values.samples:
        raise UserError(f"--keep={values.keep} is more than --samples={values.samples}: lower it.")


def _rewards(text: str) -> tuple[RewardTerm, ...]:
    """The terms that --rewards names.

    Raises:
      UserError: JSON that is none, or that describes no rewards.
    """
    from llm_jax.config import build
    from llm_jax.rl.rewards import RewardTerm

    if not text.lstrip().startswith("["):
        return tuple(RewardTerm(name.strip()) for name in text.split(","))
    try:
        return tuple(build(RewardTerm, dict(term), "--rewards") for term in json.loads(text))
    except (TypeError, ValueError) as error:
        raise UserError(f"--rewards is no JSON list of objects: {error}.") from error


def _prompts(speaker: Speaker, values: flags.FlagValues) -> PromptData:
    from llm_jax.data.prompts import PromptData

    limit = speaker.model.max_length
    longest = limit - values.max_new_tokens
    if longest < 1:
        raise UserError(
            f"--max_new_tokens={values.max_new_tokens} leaves no room for a prompt: the model "
            f"reads {limit} tokens."
        )
    config = _prompt_config(values)
    data = PromptData(
        config, speaker.chat_template, speaker.tokenizer, longest=longest, seed=values.seed
    )
    to_stderr(data.describe())
    return data


def _prompt_config(values: flags.FlagValues) -> PromptDataConfig:
    from llm_jax.data.prompts import PromptDataConfig

    return PromptDataConfig(
        source=values.data, format=values.format, validation_fraction=values.validation_fraction
    )


def _lineage(
    source: Stored,
    values: flags.FlagValues,
    terms: Sequence[RewardTerm],
    sampler: SamplerConfig,
    data: PromptData,
) -> dict[str, Any]:
    """What the answers are made with, as a run of rejection sampling says it of its own."""
    from llm_jax.config import resolved

    steering = {name: values[name].value for name in ("expert", "anti_expert", "strength")}
    steering = {name: value for name, value in steering.items() if value is not None}
    return {
        "policy": {"run": str(source.path), "step": source.step, "parents": list(source.lineage)},
        **steering,
        "prompts": {**resolved(_prompt_config(values)), "fingerprint": data.fingerprint},
        "rewards": [resolved(term) for term in terms],
        "rollout": {
            "samples": values.samples,
            "max_new_tokens": values.max_new_tokens,
            **resolved(sampler),
        },
        "seed": values.seed,
    }


def _extended(scorer: Scorer, scores: Scores, further: Sequence[Sample]) -> np.ndarray:
    return scorer.extend(scores, further).total


if __name__ == "__main__":
    sys.exit(run_tool(main, define_flags(), __doc__ or ""))

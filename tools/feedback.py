"""AI feedback by a constitution: conversations or preference pairs that models make.

    python -m tools.feedback --policy=RUN [--judge=RUN] --prompts=SOURCE --mode=revise
        --output=F.jsonl
    python -m tools.feedback --policy=RUN --judge=http://localhost:8000/v1 --judge_model=NAME
        --prompts=SOURCE --mode=compare --output=F.jsonl

The policy answers each prompt. With --mode=revise the judge criticises the answer by a principle of
the constitution and rewrites it, --rounds times: rows of the format messages, for configs/sft.py.
With --mode=compare it chooses between two answers, asked in both orders: rows of the format
preference, for configs/reward.py and configs/dpo.py. Policy and judge are run directories, Hugging
Face folders, or the URL of an endpoint that speaks OpenAI's protocol (its key in $OPENAI_API_KEY;
pip install 'llm_jax[synthesis]'). What the rows come from is written to F.jsonl.lineage.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from llm_jax.errors import UserError
from tools.cli import require, run_tool
from tools.dataset import new_file, write_dataset
from tools.sampling import run_template

if TYPE_CHECKING:
    from llm_jax.runs import LoadedRun
    from llm_jax.synthesis.constitution import Constitution
    from llm_jax.synthesis.feedback import Ledger, Question
    from llm_jax.synthesis.responders import Responder

_URL = ("http://", "https://")


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    text, whole, number = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    text("policy", None, "who answers: a run, a Hugging Face folder, a URL", flag_values=values)
    text("policy_model", "", "the policy's name, where it is a URL", flag_values=values)
    text("judge", None, "who judges; absent = the policy itself", flag_values=values)
    text("judge_model", "", "the judge's name, where it is a URL", flag_values=values)
    text("prompts", None, "source of the prompts, as config.data.source", flag_values=values)
    text("format", None, "of their rows; absent = as the first one fits", flag_values=values)
    flags.DEFINE_enum(
        "mode", None, ["revise", "compare"], "what the judge does", flag_values=values
    )
    text("constitution", None, "TOML file; absent = the default one", flag_values=values)
    text("output", None, "where the JSON lines go, new", flag_values=values)
    whole("rows", None, "prompts to take, from the first; absent = all", flag_values=values)
    whole("rounds", 1, "revisions of each answer", flag_values=values)
    number("temperature", 1.0, "of the policy", flag_values=values)
    number("top_p", None, "of the policy", flag_values=values)
    number("judge_temperature", 0.0, "of critiques and revisions", flag_values=values)
    whole("max_new_tokens", 256, "of every answer", flag_values=values)
    whole("batch", 16, "rows at a time, of a run", flag_values=values)
    whole("concurrency", 8, "requests at a time, of a URL", flag_values=values)
    number("timeout", 120.0, "seconds of a request", flag_values=values)
    whole("max_failures", 100, "more prompts without an answer end the work", flag_values=values)
    whole("seed", 0, "of sampling and of drawing principles", flag_values=values)
    return values


def main(values: flags.FlagValues) -> None:
    _check(values)
    output = new_file(values.output)
    from llm_jax.synthesis.constitution import DEFAULT, load_constitution
    from llm_jax.synthesis.feedback import Comparer, Ledger, revise

    file = Path(values.constitution) if values.constitution else DEFAULT
    constitution = load_constitution(file)
    policy, judge = _responders(values)
    ledger = Ledger(values.max_failures, lambda line: print(line, file=sys.stderr))
    questions = itertools.islice(_questions(values, ledger), values.rows)

    def lineage() -> dict[str, Any]:
        return _lineage(values, policy, judge, constitution)

    if values.mode == "revise":
        rows = revise(
            policy, judge, constitution, questions, ledger, rounds=values.rounds, seed=values.seed
        )
        write_dataset(output, rows, ledger.dropped, lineage)
        return
    comparer = Comparer(policy, judge, constitution, ledger, values.seed)
    write_dataset(output, comparer.rows(questions), ledger.dropped, lineage)
    print(
        f"the same letter in both orders: {comparer.swayed / comparer.compared:.0%} of "
        f"{comparer.compared:,} pairs; the judge's probability of a letter: "
        f"{comparer.mass / comparer.compared:.2g}, and near 1 where it knows what is asked",
        file=sys.stderr,
    )


def _check(values: flags.FlagValues) -> None:
    """Refuses what can be refused before anything is loaded."""
    require(values, "policy", "prompts", "mode", "output")
    for name in ("rows", "rounds", "max_new_tokens", "batch", "concurrency"):
        value = getattr(values, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}={value} must be at least 1.")
    for name in ("seed", "max_failures"):
        if (value := getattr(values, name)) < 0:
            raise UserError(f"--{name}={value} must not be negative.")
    if not values.timeout > 0:
        raise UserError(f"--timeout={values.timeout} must be above 0.")


def _responders(values: flags.FlagValues) -> tuple[Responder, Responder]:
    """Policy and judge; a run that is both is loaded once."""
    from llm_jax.compilation import use_compilation_cache
    from llm_jax.runs import load_run

    use_compilation_cache()
    runs: dict[str, LoadedRun] = {}

    def load(name: str) -> LoadedRun:
        return runs.setdefault(name, runs.get(name) or load_run(name))

    same = values.judge in (None, values.policy)
    policy = _responder(
        values, load, values.policy, values.policy_model, values.temperature, values.top_p
    )
    judge = _responder(
        values,
        load,
        values.policy if same else values.judge,
        values.judge_model or (values.policy_model if same else ""),
        values.judge_temperature,
        None,
    )
    return policy, judge


def _responder(
    values: flags.FlagValues,
    load: Callable[[str], LoadedRun],
    name: str,
    model: str,
    temperature: float,
    top_p: float | None,
) -> Responder:
    if name.startswith(_URL):
        from llm_jax.synthesis.endpoint import Endpoint, EndpointConfig

        return Endpoint(
            EndpointConfig(
                url=name,
                model=model,
                max_new_tokens=values.max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                concurrency=values.concurrency,
                timeout=values.timeout,
            )
        )
    from llm_jax.generation.sampler import SamplerConfig
    from llm_jax.synthesis.responders import RunResponder

    run = load(name)
    return RunResponder(
        run,
        run_template(run),
        SamplerConfig(temperature=temperature, top_p=top_p),
        max_new_tokens=values.max_new_tokens,
        batch=values.batch,
    )


def _questions(values: flags.FlagValues, ledger: Ledger) -> Iterator[Question]:
    """The prompts of the source; texts to continue ask nothing, and tools nobody could call."""
    from llm_jax.data.formats import read_examples
    from llm_jax.data.prompts import split_prompt
    from llm_jax.data.sources import SourceConfig
    from llm_jax.synthesis.feedback import Question

    number = 0
    for example in read_examples(SourceConfig(source=values.prompts), values.format):
        turns, _ = split_prompt(example)
        if not turns:
            ledger.dropped["without a prompt"] += 1
        elif example.tools or any(turn.role == "tool" for turn in turns):
            ledger.dropped["with tools"] += 1
        else:
            yield Question(number, turns)
            number += 1


def _lineage(
    values: flags.FlagValues, policy: Responder, judge: Responder, constitution: Constitution
) -> dict[str, Any]:
    settings = ("mode", "prompts", "rounds", "temperature", "top_p", "judge_temperature",
                "max_new_tokens", "seed")  # fmt: skip
    return {
        "tool": "feedback",
        "policy": policy.lineage,
        "judge": judge.lineage,
        "constitution": {"file": str(constitution.file), "digest": constitution.digest},
        "settings": {name: values[name].value for name in settings},
    }


if __name__ == "__main__":
    sys.exit(run_tool(main, define_flags(), __doc__ or ""))

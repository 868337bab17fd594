"""How often a judge prefers the answers of one run to those of another, asked in both orders."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from llm_jax.data.prompts import Prompt, PromptData, PromptDataConfig
from llm_jax.data.templates import DEFAULT_TEMPLATE, make_template
from llm_jax.errors import UserError, one_line
from llm_jax.evals.run_subject import run_subject
from llm_jax.evals.statistics import mean
from llm_jax.evals.subject import Subject
from llm_jax.evals.task import TaskResult, stable_ids
from llm_jax.generation.sampler import SamplerConfig
from llm_jax.runs import load_run
from llm_jax.synthesis.constitution import DEFAULT, load_constitution
from llm_jax.synthesis.endpoint import Endpoint, EndpointConfig
from llm_jax.synthesis.feedback import Ledger, PairJudge, Question
from llm_jax.synthesis.responders import (
    ModelResponder,
    Reply,
    Responder,
    RunResponder,
)

_URL = ("http://", "https://")


@dataclasses.dataclass(frozen=True)
class WinRateConfig:
    """Two runs, a judge, and what the runs are asked.

    other_run: a run, RUN@STEP, or a Hugging Face folder; it answers in its own chat template.
    judge: the same, or the URL of an OpenAI-compatible endpoint, where judge_model names the model.
    data, held_out, rows: as in `generation.GenerationConfig`. constitution: a TOML file with the
    principles to choose by; None: the default one. max_failures: pairs that the judge gives no
    verdict on, one more ends the task.
    """

    other_run: str = ""
    judge: str = ""
    judge_model: str = ""
    data: PromptDataConfig = PromptDataConfig(source="stdlib:instructions")
    held_out: bool = True
    constitution: str | None = None
    rows: int = 128
    max_new_tokens: int = 128
    temperature: float = 0.0
    max_failures: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise UserError(f"rows={self.rows} must be at least 1.")


def win_rate_task(config: WinRateConfig, subject: Subject) -> Callable[[Any], TaskResult]:
    """
    Returns:
      What gives win_rate, the share of prompts to which the judge prefers the run's answer, a tie
      counting a half, with its standard error; ties, the share of pairs that are alike or on which
      the judge contradicts itself; swayed, the share of judged pairs in which both orders gave the
      same letter; letter_mass, the judge's mean probability of a letter, near 1 where it knows what
      is asked. Prompts that somebody could not answer count nowhere.

    Raises:
      UserError: no other run or judge, or one that cannot be read.
    """
    for name in ("other_run", "judge"):
        if not getattr(config, name):
            raise UserError(f"{name} is required in the settings: name a run.")
    prompts = _prompts(config, subject)
    ids = stable_ids([prompt.text for prompt in prompts])
    constitution = load_constitution(Path(config.constitution) if config.constitution else DEFAULT)
    judge = _judge(config, subject)
    other = load_run(config.other_run)
    opponent = _responder(config, run_subject(other, subject.log, subject.batch), other.params)
    dialogues = [prompt.messages for prompt in prompts]
    theirs = opponent.answer(dialogues, jax.random.key(config.seed))

    def run(params: Any) -> TaskResult:
        responder = _responder(config, subject, params)
        own = responder.answer(dialogues, jax.random.key(config.seed))
        pairs = [
            (Question(place, dialogues[place]), mine.text, yours.text)
            for place, (mine, yours) in enumerate(zip(own, theirs, strict=True))
            if isinstance(mine, Reply) and isinstance(yours, Reply)
        ]
        judging = PairJudge(judge, constitution, Ledger(config.max_failures, subject.log), 0)
        odds = _on_one_process(judge, lambda: _log_odds(judging, pairs))
        examples: list[dict[str, Any]] = [
            {
                "id": ids[question.number],
                "win": None if math.isnan(value) else 0.5 + 0.5 * float(np.sign(value)),
                "prompt": prompts[question.number].text,
                "text": mine,
                "other_text": yours,
            }
            for (question, mine, yours), value in zip(pairs, odds, strict=True)
        ]
        wins = [row["win"] for row in examples if row["win"] is not None]
        if not wins:
            raise UserError("the judge has compared no pair of answers.")
        metrics = mean("win_rate", wins)
        metrics["ties"] = float(np.mean([win == 0.5 for win in wins]))
        if judging.compared:
            metrics["swayed"] = judging.swayed / judging.compared
            metrics["letter_mass"] = judging.mass / judging.compared
        return TaskResult(metrics, examples)

    return run


def _log_odds(judging: PairJudge, pairs: Sequence[tuple[Question, str, str]]) -> np.ndarray:
    """float64 [pairs], 0 for a tie, NaN where the judge has no verdict; of answers that are alike
    it is not asked."""
    odds = np.zeros(len(pairs))
    different = [place for place, (_, mine, yours) in enumerate(pairs) if mine != yours]
    found = judging.log_odds([pairs[place] for place in different])
    odds[different] = [math.nan if value is None else value for value in found]
    return odds


def _on_one_process(judge: Responder, ask: Callable[[], np.ndarray]) -> np.ndarray:
    """What all processes are to take for the verdicts: a run is asked by all of them together, an
    endpoint, which answers each as it likes, by the first alone.

    Raises:
      UserError: it failed there; in all processes.
    """
    if jax.process_count() == 1 or not isinstance(judge, Endpoint):
        return ask()
    verdicts, failure = np.zeros(0), None
    if jax.process_index() == 0:
        try:
            verdicts = ask()
        except Exception as error:
            failure = one_line(error)
    # The numbers of pairs are equal everywhere, but where it failed there are none.
    count = int(multihost_utils.broadcast_one_to_all(np.int64(-1 if failure else len(verdicts))))
    if count < 0:
        raise UserError(failure or "the judge failed, as process 0 tells.")
    given = verdicts if jax.process_index() == 0 else np.zeros(count)
    return np.asarray(multihost_utils.broadcast_one_to_all(given))


def _prompts(config: WinRateConfig, subject: Subject) -> list[Prompt]:
    template = subject.template or make_template(config.data.template or DEFAULT_TEMPLATE)
    longest = subject.model.max_length - config.max_new_tokens
    if longest < 1:
        raise UserError(f"max_new_tokens={config.max_new_tokens} leaves no room for a prompt.")
    data = PromptData(config.data, template, subject.tokenizer, longest=longest, seed=config.seed)
    asked = data.validation if config.held_out else (*data.validation, *data.train)
    return list(asked[: config.rows])


def _responder(config: WinRateConfig, subject: Subject, params: Any) -> ModelResponder:
    template = subject.template or make_template(config.data.template or DEFAULT_TEMPLATE)
    return ModelResponder(
        dataclasses.replace(subject, template=template),
        params,
        SamplerConfig(config.temperature),
        max_new_tokens=config.max_new_tokens,
        lineage={"run": subject.name},
    )


def _judge(config: WinRateConfig, subject: Subject) -> Responder:
    """
    Raises:
      UserError: it cannot be asked.
    """
    if config.judge.startswith(_URL):
        return Endpoint(EndpointConfig(url=config.judge, model=config.judge_model))
    run = load_run(config.judge)
    template = run.stored.template
    if template is None:
        raise UserError(f"judge={config.judge!r} has no chat template: name a fine-tuned run.")
    return RunResponder(run, template, SamplerConfig(0.0), max_new_tokens=1, batch=subject.batch)

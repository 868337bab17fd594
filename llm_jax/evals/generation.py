"""Completions to prompts, scored by the rewards that on-policy stages train on: exact and numeric
match, unit tests, a judge of one's own, and pass@k."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from llm_jax.data.examples import Message
from llm_jax.data.prompts import Prompt, PromptData, PromptDataConfig
from llm_jax.data.templates import DEFAULT_TEMPLATE, make_template
from llm_jax.errors import UserError
from llm_jax.evals.objective import spread
from llm_jax.evals.statistics import mean
from llm_jax.evals.subject import Subject
from llm_jax.evals.task import TaskResult, stable_ids
from llm_jax.generation.sampler import SamplerConfig
from llm_jax.rl.rewards import RewardTerm, Scorer, Scores, check_answers, describe_scores
from llm_jax.rl.rollouts import RolloutConfig, Rollouts, sample_rollouts


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """What is asked, and how completions are sampled and scored.

    data, rewards: as in the config of an on-policy stage.
    held_out: whether only the prompts of the source are asked that such a stage, or fine-tuning,
      would hold out; False: all of them, of a source that is for evaluation alone.
    shots: prompts with their answers that stand as turns before each, of those not asked; of all
      others, where all are asked.
    passes: the score from which on a completion is right; None: no share of right ones is told.
    temperature: 0: greedy. samples: completions of each prompt. ks: of pass@k, up to samples.
    slots: rows that decode at a time; None: all.
    max_reward_failures: completions without a score, one more ends the task.
    rows: prompts at most. seed: of sampling, and of drawing shots.
    """

    data: PromptDataConfig = PromptDataConfig()
    held_out: bool = True
    rewards: tuple[RewardTerm, ...] = (RewardTerm("exact_match"),)
    shots: int = 0
    passes: float | None = 1.0
    rows: int = 256
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    samples: int = 1
    ks: tuple[int, ...] = (1,)
    slots: int | None = 64
    max_reward_failures: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "max_new_tokens", "samples"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.samples > 1 and self.temperature == 0:
            raise UserError(
                f"samples={self.samples} at temperature=0 are all alike: raise the temperature."
            )
        if not all(1 <= k <= self.samples for k in self.ks):
            raise UserError(f"ks={self.ks} must lie between 1 and samples={self.samples}.")

    @property
    def sampler(self) -> SamplerConfig:
        return SamplerConfig(self.temperature, self.top_k, self.top_p)


class GenerationTask:
    """Prompts, what samples completions to them, and what scores these.

    Attributes:
      prompts: those that are asked.
    """

    def __init__(
        self,
        config: GenerationConfig,
        subject: Subject,
        prompts: Sequence[Prompt],
        scorer: Scorer,
        stop_ids: Sequence[int],
    ):
        """
        Args:
          prompts: rendered; at most `config.rows` of them are asked.

        Raises:
          UserError: no prompt has an answer to compare with.
        """
        self.prompts = prompts[: config.rows]
        self._config, self._subject, self._scorer = config, subject, scorer
        self._stop_ids = stop_ids
        self._ids = stable_ids([prompt.text for prompt in self.prompts])
        check_answers(config.rewards, [prompt.row for prompt in self.prompts])

    def run(self, params: Any) -> TaskResult:
        """See `result`; failures of rewards are counted anew each time."""
        self._scorer.failures = 0
        return self.result(self.sample(params))

    def sample(self, params: Any, length: int | None = None) -> Rollouts:
        """`config.samples` completions of each prompt, prompt by prompt, as rows of `length`
        tokens; None: of as many as the longest may have."""
        config = self._config
        longest = max(len(prompt.ids) for prompt in self.prompts) + config.max_new_tokens
        return sample_rollouts(
            self._subject.model,
            params,
            self._subject.tokenizer,
            self.prompts,
            RolloutConfig(config.samples, config.max_new_tokens, slots=config.slots),
            stop_ids=self._stop_ids,
            length=longest if length is None else length,
            rng=jax.random.key(config.seed),
            sampler=config.sampler,
        )

    def result(self, rollouts: Rollouts) -> TaskResult:
        """
        Returns:
          What `describe_scores` tells; reward_stderr, prompts being the sampled units; and, where
          a score can pass, accuracy, the share of completions that do, and pass@k of each k: the
          unbiased estimate of the chance that one of k completions passes (Chen et al. 2021,
          arXiv:2107.03374, equation 1), each with its standard error. Completions without a score
          count nowhere.

        Raises:
          UserError: more rewards fail than the config's limit.
        """
        scores = self._scorer(rollouts.samples)
        plain = scores.plain.reshape(len(self.prompts), -1)
        known = np.isfinite(plain)
        has_any = known.any(axis=1)
        means = np.nansum(plain, axis=1)[has_any] / known.sum(axis=1)[has_any]
        metrics = describe_scores(scores, rollouts)
        if "reward_stderr" in (error := mean("reward", means)):
            metrics["reward_stderr"] = error["reward_stderr"]
        if self._config.passes is not None:
            metrics |= self._passing(plain, known)
        return TaskResult(metrics, self._examples(rollouts, scores, plain))

    def _passing(self, plain: np.ndarray, known: np.ndarray) -> dict[str, float]:
        assert self._config.passes is not None
        # Scores are float32.
        right = (known & (plain >= np.float32(self._config.passes) - 1e-6)).sum(axis=1)
        made = known.sum(axis=1)
        metrics = mean("accuracy", right[made > 0] / made[made > 0])
        for k in self._config.ks:
            enough = made >= k
            pairs = zip(made[enough].tolist(), right[enough].tolist(), strict=True)
            metrics |= mean(f"pass@{k}", [pass_at_k(n, c, k) for n, c in pairs])
        return metrics

    def _examples(
        self, rollouts: Rollouts, scores: Scores, plain: np.ndarray
    ) -> list[dict[str, Any]]:
        each = plain.shape[1]
        rows = []
        for number, (id, prompt) in enumerate(zip(self._ids, self.prompts, strict=True)):
            samples = rollouts.samples[number * each : (number + 1) * each]
            parts = {
                name: [_json(x) for x in values[number * each : (number + 1) * each]]
                for name, values in scores.parts.items()
            }
            rows.append(
                {
                    "id": id,
                    "rewards": [_json(x) for x in plain[number]],
                    "parts": parts,
                    "prompt": prompt.text,
                    "answer": prompt.answer,
                    "texts": [sample.completion_text for sample in samples],
                }
            )
        return rows


def generation_task(config: GenerationConfig, subject: Subject) -> Callable[[Any], TaskResult]:
    """See `GenerationTask.result`.

    Raises:
      UserError: prompts or rewards that cannot be read, or that do not fit.
    """
    return make_generation(config, subject).run


def make_generation(
    config: GenerationConfig,
    subject: Subject,
    kind: type[GenerationTask] = GenerationTask,
    fitting: Callable[[Sequence[Prompt], Callable[[str], None]], Sequence[Prompt]] | None = None,
) -> GenerationTask:
    """The task with its prompts read, and its rewards made.

    Args:
      kind: what is to be made.
      fitting: `(prompts, log) → those that can be asked`; None = all.

    Raises:
      UserError: see `generation_task`.
    """
    longest = subject.model.max_length - config.max_new_tokens
    if longest < 1:
        raise UserError(
            f"max_new_tokens={config.max_new_tokens} leaves no room for a prompt in the "
            f"{subject.model.max_length} that {subject.name} reads: lower it."
        )
    template = subject.template or make_template(config.data.template or DEFAULT_TEMPLATE)
    data = PromptData(config.data, template, subject.tokenizer, longest=longest, seed=config.seed)
    asked: Sequence[Prompt] = data.validation
    if not config.held_out:
        asked = (*data.validation, *data.train)
    if fitting is not None:
        asked = fitting(asked, subject.log)
    # Those that are held out are told by their hash, so that the first ones are any.
    chosen = list(asked[: config.rows])
    if not config.held_out:
        chosen = [asked[place] for place in spread(asked, config.rows)]
    if config.shots:
        pool = data.train if config.held_out else asked
        rng = np.random.default_rng(config.seed)
        shown = [_with_shots(prompt, pool, config.shots, rng) for prompt in chosen]
        chosen = [
            dataclasses.replace(prompt, ids=ids)
            for prompt, turns in zip(chosen, shown, strict=True)
            if len(ids := _rendered(turns, prompt, template, subject)) <= longest
        ]
        if not chosen:
            raise UserError(
                f"shots={config.shots}: no prompt fits the {longest} tokens that completions leave "
                "with so many: lower it."
            )
        if len(chosen) < len(shown):
            subject.log(f"{len(shown) - len(chosen):,} prompts are too long with their shots.")
    policy = dataclasses.replace(subject.policy, template=template)
    scorer = Scorer(config.rewards, config.max_reward_failures, policy)
    return kind(config, subject, chosen, scorer, template.stop_ids(subject.tokenizer))


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that k of so many samples, drawn without putting back, hold one of the right ones:
    1 - C(n - c, k) / C(n, k)."""
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def _with_shots(
    prompt: Prompt, pool: Sequence[Prompt], count: int, rng: np.random.Generator
) -> list[Message]:
    """The turns of other prompts with their answers, then the prompt's own."""
    turns: list[Message] = []
    drawn = 0
    for place in rng.permutation(len(pool)):
        other = pool[place]
        if drawn == count:
            break
        if other.answer is not None and other.text != prompt.text:
            turns += [*other.messages, Message("assistant", other.answer)]
            drawn += 1
    if drawn < count:
        raise UserError(f"shots={count} are more than the {drawn} other prompts with an answer.")
    return [*turns, *prompt.messages]


def _rendered(
    turns: Sequence[Message], prompt: Prompt, template: Any, subject: Subject
) -> tuple[int, ...]:
    return tuple(template.render_prompt(turns, prompt.tools, subject.tokenizer))


def _json(value: np.floating) -> float | None:
    return float(value) if np.isfinite(value) else None

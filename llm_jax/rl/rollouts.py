"""Rounds: prompts, the completions that the current policy gives to them, and their scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from llm_jax.data.prompts import Prompt
from llm_jax.data.tokenizer_base import Tokenizer
from llm_jax.errors import UserError
from llm_jax.evals.batching import sequence_batch
from llm_jax.generation.continuous import DecodingCost, generate_many
from llm_jax.generation.decoding import Decodable
from llm_jax.generation.sampler import SamplerConfig
from llm_jax.rl.scoring import Sample
from llm_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled, and how often a round of them is trained on."""

    samples: int = 8  # completions of each prompt
    max_new_tokens: int = 64  # of a completion, its end included
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    slots: int | None = None  # rows that decode at a time; None: all of a round
    updates: int = 1  # steps that a round is cut into; each takes a part of its completions
    epochs: int = 1  # times that a round is gone through

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "updates", "epochs"):
            if getattr(self, name) < 1:
                raise UserError(f"config.rollout.{name}={getattr(self, name)} must be at least 1.")
        if not self.temperature > 0:
            raise UserError(
                f"config.rollout.temperature={self.temperature} must be above 0: a policy that "
                "never tries anything else learns nothing."
            )

    @property
    def sampler(self) -> SamplerConfig:
        return SamplerConfig(self.temperature, self.top_k, self.top_p)

    @property
    def steps(self) -> int:
        """Training steps from one round to the next."""
        return self.updates * self.epochs

    def prompts(self, batch: int, kept: int) -> int:
        """Prompts of a round, where a step takes `batch` completions and `kept` of each prompt's
        are trained on.

        Raises:
          UserError: the completions of a round are no whole number of prompts.
        """
        rows = batch * self.updates
        if rows % kept:
            raise UserError(
                f"a round trains on {rows} completions (the batch of {batch} times config.rollout."
                f"updates={self.updates}), which is no multiple of the {kept} of each prompt: make "
                "it one."
            )
        return rows // kept


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Completions of one round, prompt by prompt.

    samples: as rewards see them. sequences: a Batch of numpy arrays [batch, time], weights 1 where
    the target is a token of the completion. logprobs: float32 [batch, time], of these targets when
    they were sampled, 0 elsewhere. lengths: int [batch], tokens of the completions. finished: bool
    [batch], whether they ended by themselves.
    """

    samples: list[Sample]
    sequences: Batch
    logprobs: np.ndarray
    lengths: np.ndarray
    finished: np.ndarray

    def difference(self, logprobs: np.ndarray) -> float:
        """The largest difference between the sampler's log-probability of a token and that of a
        forward pass, float32 [batch, time].

        Anything but rounding means that other probabilities are trained than were sampled from.
        """
        mask = self.sequences.loss_weights > 0
        return float(np.abs(logprobs - self.logprobs)[mask].max(initial=0))

    def take(self, rows: np.ndarray) -> Rollouts:
        """The completions at these places, int [rows]."""
        return Rollouts(
            [self.samples[row] for row in rows],
            jax.tree.map(lambda x: x[rows], self.sequences),
            self.logprobs[rows],
            self.lengths[rows],
            self.finished[rows],
        )


def join_rollouts(parts: Sequence[Rollouts]) -> Rollouts:
    """One after the other; their rows are of one length."""
    return Rollouts(
        [sample for part in parts for sample in part.samples],
        jax.tree.map(lambda *x: np.concatenate(x), *[part.sequences for part in parts]),
        np.concatenate([part.logprobs for part in parts]),
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([part.finished for part in parts]),
    )


def completion_batch(samples: Sequence[Sample], length: int) -> Batch:
    """Prompts with their completions as a Batch of numpy arrays [samples, length], whose weights
    are 1 where the target is a token of the completion."""
    sequences = sequence_batch([[*s.prompt_ids, *s.completion_ids] for s in samples], length)
    places = np.arange(length)
    starts = np.array([len(sample.prompt_ids) - 1 for sample in samples])[:, None]
    lengths = np.array([len(sample.completion_ids) for sample in samples])[:, None]
    inside = (places >= starts) & (places < starts + lengths)
    return dataclasses.replace(sequences, loss_weights=inside.astype(np.float32))


def sample_rollouts(
    model: Decodable,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    config: RolloutConfig,
    *,
    stop_ids: Sequence[int],
    length: int,
    rng: jax.Array,
    sampler: SamplerConfig | None = None,
    cost: DecodingCost | None = None,
) -> Rollouts:
    """`config.samples` completions of each prompt, as rows of `length` tokens.

    `sampler` stands in for that of the config.

    Raises:
      UserError: see `generate_many`.
    """
    made = generate_many(
        model,
        params,
        [prompt.ids for prompt in prompts],
        samples=config.samples,
        max_new_tokens=config.max_new_tokens,
        sampler=sampler or config.sampler,
        rng=rng,
        stop_ids=stop_ids,
        pad_id=tokenizer.pad_id,
        slots=config.slots or len(prompts) * config.samples,
        cost=cost,
    )
    completions = [row[:n].tolist() for row, n in zip(made.tokens, made.lengths, strict=True)]
    repeated = [prompt for prompt in prompts for _ in range(config.samples)]
    samples = [
        Sample(
            number=number,
            prompt_text=prompt.text,
            completion_text=tokenizer.decode(ids),
            prompt_ids=prompt.ids,
            completion_ids=ids,
            finished=bool(finished),
            row=prompt.row,
        )
        for number, (prompt, ids, finished) in enumerate(
            zip(repeated, completions, made.stopped, strict=True)
        )
    ]
    logprobs = np.zeros((len(samples), length), np.float32)
    for row, (prompt, count) in enumerate(zip(repeated, made.lengths, strict=True)):
        start = len(prompt.ids) - 1
        logprobs[row, start : start + count] = made.logprobs[row, :count]
    sequences = completion_batch(samples, length)
    return Rollouts(samples, sequences, logprobs, made.lengths, made.stopped)

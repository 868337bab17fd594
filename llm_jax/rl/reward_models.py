"""Rewards that trained reward models give, one or two of them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import numpy as np

from llm_jax import sharding, stored
from llm_jax.data.fields import as_truth
from llm_jax.errors import UserError
from llm_jax.evals.batching import sequence_batch
from llm_jax.models import LanguageModel
from llm_jax.models.heads import REWARD, rewards
from llm_jax.placement import to_devices, to_host
from llm_jax.rl.scoring import Outcome, Policy, Reward, Sample, as_outcome

_SHORTEST = 32  # tokens that a batch is padded to at least; lengths double from there


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """run: a reward run, RUN@STEP, or a published classifier. batch: samples read at once, rounded
    up to what the mesh divides."""

    run: str
    batch: int = 16

    def __post_init__(self) -> None:
        _check_batch(self.batch)


@dataclasses.dataclass(frozen=True)
class Llama2Config:
    """safety, helpfulness: two reward runs. safety_field: the row's field that says whether the
    prompt is about safety; a row without it is not. threshold: the probability of being safe below
    which safety decides everywhere. batch: as for one model."""

    safety: str
    helpfulness: str
    safety_field: str = "safety"
    threshold: float = 0.15
    batch: int = 16

    def __post_init__(self) -> None:
        _check_batch(self.batch)
        if not 0 < self.threshold < 1:
            raise UserError(f"threshold={self.threshold} is a probability: give one in (0, 1).")


class RewardModel:
    """A trained reward model on the policy's mesh."""

    def __init__(self, run: str, batch: int, policy: Policy):
        """
        Raises:
          UserError: the run cannot be read, is no reward model, has another tokenizer than the
            policy, whose tokens it would misread, or another chat template, whose turns it has
            never seen.
        """
        found = stored.find(run)
        if REWARD not in found.heads:
            raise UserError(
                f"{found.name} is no reward model but of the stage {found.meta['stage']!r}: name a "
                "run of configs/reward.py."
            )
        if found.tokenizer().fingerprint != policy.tokenizer.fingerprint:
            raise UserError(
                f"{found.name} has another tokenizer than the policy: train the reward model from "
                "the run that the policy comes from."
            )
        _check_template(found, policy)
        self._mesh, self._rows = policy.mesh, sharding.batch_sharding(policy.mesh)
        self._longest = found.model.max_length
        shards = sharding.batch_shards(policy.mesh)
        self._batch = -(-batch // shards) * shards
        with jax.set_mesh(policy.mesh):
            self._params = found.read(policy.mesh)
        function = functools.partial(rewards, LanguageModel(found.model))
        self._rewards = jax.jit(function, out_shardings=self._rows)

    def __call__(self, samples: Sequence[Sample]) -> list[Outcome]:
        """The reward of prompt and completion, read at the completion's last token; none where they
        are longer than the model reads.

        Samples of like length are read together, padded to a power of two, so that few lengths
        compile.
        """
        sequences = [[*sample.prompt_ids, *sample.completion_ids] for sample in samples]
        lengths = np.asarray([len(sequence) for sequence in sequences], int)
        outcomes: list[Outcome] = [
            ValueError(f"{n} tokens are more than the {self._longest} that the reward model reads")
            for n in lengths
        ]
        order = np.argsort(lengths, kind="stable")
        order = order[lengths[order] <= self._longest]
        for begin in range(0, len(order), self._batch):
            chosen = order[begin : begin + self._batch]
            values = self._read([sequences[place] for place in chosen])
            for place, value in zip(chosen, values, strict=False):
                outcomes[place] = as_outcome(value)
        return outcomes

    def _read(self, sequences: list[list[int]]) -> np.ndarray:
        """float32 [batch]; the rows after those of the sequences mean nothing."""
        longest = max(_SHORTEST, len(sequences[-1]))
        length = min(1 << (longest - 1).bit_length(), self._longest)
        batch = sequence_batch([*sequences, *[[]] * (self._batch - len(sequences))], length)
        with jax.set_mesh(self._mesh):
            return to_host(self._rewards(self._params, to_devices(batch, self._rows)))


def model(config: ModelConfig, policy: Policy) -> Reward:
    """The reward of a trained reward model.

    Raises:
      UserError: see `RewardModel`.
    """
    return Reward(RewardModel(config.run, config.batch, policy), on_mesh=True)


def llama2(config: Llama2Config, policy: Policy) -> Reward:
    """A safety and a helpfulness model combined as in Llama 2 (arXiv:2307.09288, section 3.4).

    The reward is that of the safety model where the prompt is about safety, or where the safety
    model's probability of the completion is below the threshold, else that of the helpfulness
    model. What is combined are the logits of the probabilities, which the models give as they are;
    a sum takes them whitened.

    Raises:
      UserError: see `RewardModel`.
    """
    safety = RewardModel(config.safety, config.batch, policy)
    helpfulness = RewardModel(config.helpfulness, config.batch, policy)
    lowest = math.log(config.threshold / (1 - config.threshold))

    def choose(sample: Sample, safe: Outcome, helpful: Outcome) -> Outcome:
        tag = sample.row.get(config.safety_field)
        try:
            is_about_safety = tag is not None and as_truth(tag, config.safety_field)
        except Exception as error:
            return error
        if isinstance(safe, Exception) or is_about_safety or safe < lowest:
            return safe
        return helpful

    def score(samples: Sequence[Sample]) -> list[Outcome]:
        return list(map(choose, samples, safety(samples), helpfulness(samples)))

    return Reward(score, on_mesh=True, whitened=True)


def _check_template(found: stored.Stored, policy: Policy) -> None:
    if found.template is None or policy.template is None:
        return
    theirs, ours = found.template.describe(), policy.template.describe()
    # Of a Jinja template the source counts, wherever it was read from.
    if theirs.get("jinja", theirs) != ours.get("jinja", ours):
        raise UserError(
            f"{found.name} was trained with the chat template {theirs['name']!r}, and the policy "
            f"is prompted with {ours['name']!r}: set config.data.template to the former, or train "
            "the reward model with the latter."
        )


def _check_batch(batch: int) -> None:
    if batch < 1:
        raise UserError(f"batch={batch} must be at least 1.")

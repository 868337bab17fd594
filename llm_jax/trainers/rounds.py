"""Rounds of rollouts as a source of batches: the policy samples, its samples are scored, and steps
take them in parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import sharding
from llm_jax.data.phases import Phase
from llm_jax.data.prompts import Prompt, PromptData
from llm_jax.errors import UserError
from llm_jax.generation.continuous import DecodingCost
from llm_jax.models import LanguageModel
from llm_jax.objectives.policy import policy_outputs
from llm_jax.placement import to_host
from llm_jax.rl.advantages import constant_groups
from llm_jax.rl.rewards import Scorer, Scores, describe_scores
from llm_jax.rl.rollouts import RolloutConfig, Rollouts, join_rollouts, sample_rollouts
from llm_jax.rl.scoring import Sample
from llm_jax.step import Objective
from llm_jax.trainers.base import Source
from llm_jax.trainers.foundation import Foundation
from llm_jax.trainers.reference import ReferencePolicy
from llm_jax.types import Batch, RolloutBatch

Measure = Callable[[Any, Rollouts], dict[str, float]]  # (params, rollouts) → what to log
CHECKED = 64  # rows of a round whose log-probabilities are compared with the sampler's
FOLDER = "rollouts"  # of rounds that a checkpoint stands in the middle of


@dataclasses.dataclass(frozen=True)
class Round:
    """Rollouts and what is known of them when advantages are made.

    step: the training step at which it begins. prompts: each with `samples` rollouts, in order.
    scores: float32 [batch], NaN where there is none. score: `further samples → float32 [batch +
    further]`, their scores after those of the batch, by one scale. logprobs: of the policy, float32
    [batch, time], 0 outside completions. reference_logprobs: the same, None without a reference.
    """

    step: int
    prompts: Sequence[Prompt]
    rollouts: Rollouts
    scores: np.ndarray
    score: Callable[[Sequence[Sample]], np.ndarray]
    reference_logprobs: np.ndarray | None


class Learner(Protocol):
    """What makes advantages of scores: a critic's, or a group's."""

    def learn(self, params: Any, round: Round) -> tuple[RolloutBatch, dict[str, float]]:
        """The round as a batch of numpy arrays, and what to log of it."""

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


class Stateless:
    """Of a learner that keeps nothing from one round to the next."""

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        del state


@dataclasses.dataclass(frozen=True)
class Wiring:
    """What a stage adds: its objective, its learner, and its reference, if it has one.

    objective, learner: for a model and a phase. kept: how many completions of each prompt a round
    trains on; None = all. text: batches of pre-training text, one for each step. redraws: how often
    a round draws further prompts in place of those whose scores are all alike. measure: what else
    to log of answers to held-out prompts, for a model and a phase.
    """

    objective: Callable[[LanguageModel, Phase], Objective]
    learner: Callable[[LanguageModel, Phase], Learner]
    reference: ReferencePolicy | None = None
    kept: int | None = None
    text: Source | None = None
    redraws: int = 0
    measure: Callable[[LanguageModel, Phase], Measure] | None = None

    def prompts(self, rollout: RolloutConfig, phase: Phase) -> int:
        """Of a round.

        Raises:
          UserError: the phase's batch is no whole number of them.
        """
        return rollout.prompts(phase.batch, self.kept or rollout.samples)


@dataclasses.dataclass(frozen=True)
class _Draw:
    """Some of a round's prompts, sampled and scored. constant: bool [prompts], see
    `constant_groups`."""

    prompts: list[Prompt]
    rollouts: Rollouts
    scores: Scores
    constant: np.ndarray


class OnPolicySource:
    """Batches of completions that the policy has sampled at the first step of their round.

    A round is a function of the seed, its first step, the prompts taken so far, and the parameters.
    A checkpoint in the middle of a round brings the round along as a file.
    """

    def __init__(
        self,
        ground: Foundation,
        wiring: Wiring,
        prompts: PromptData,
        scorer: Scorer,
        workdir: Path,
    ):
        self._ground, self._wiring, self._prompts = ground, wiring, prompts
        self._config: Any = ground.config
        self._scorer, self._folder = scorer, workdir / FOLDER
        self._cost = DecodingCost()
        self._reference = wiring.reference
        self._cursor = 0  # prompts taken
        self._begin = self._served = -1  # first step of the round at hand; step of the last batch
        self._batch: RolloutBatch | None = None
        self._metrics: list[tuple[int, dict[str, float]]] = []  # first step of a round, and its log
        self._learner_state: dict[str, Any] | None = None

    def start(self, phase: Phase, first_step: int) -> None:
        """Turns to `phase`, whose step 0 is the global step `first_step`."""
        self._phase, self._first = phase, first_step
        self._size = self._wiring.prompts(self._config.rollout, phase)  # prompts of a round
        if self._wiring.text is not None:
            self._wiring.text.start(phase, first_step)
        self._model = LanguageModel(dataclasses.replace(self._ground.model, rope=phase.rope))
        self._learner = self._wiring.learner(self._model, phase)
        if self._learner_state is not None:
            self._learner.restore(self._learner_state)
        temperature = self._config.rollout.temperature
        self._logprobs = _jit_logprobs(self._ground, self._model, temperature)
        if self._reference is not None:
            self._reference_logprobs = _jit_logprobs(
                self._ground, self._reference.model, temperature
            )

    def next(self, params: Any, step: int) -> RolloutBatch:
        """The batch of the global step `step`; at the first step of a round it is sampled."""
        rollout, place = self._config.rollout, (step - self._first) % self._config.rollout.steps
        if self._begin != step - place or self._batch is None:
            if place == 0:
                self._collect(params, step)
            else:
                self._begin = step - place
                self._batch = _read_round(self._folder, self._begin)
        epoch, update = divmod(place, rollout.updates)
        assert self._batch is not None
        rows = self._phase.batch * rollout.updates
        order = np.random.default_rng([self._config.seed, self._begin, epoch]).permutation(rows)
        chosen = order[update * self._phase.batch : (update + 1) * self._phase.batch]
        self._served = step
        where = sharding.batch_sharding(self._ground.mesh)
        batch = jax.tree.map(
            lambda x: jax.make_array_from_callback(
                (len(chosen), *x.shape[1:]), where, lambda index: x[chosen][index]
            ),
            self._batch,
        )
        if self._wiring.text is None:
            return batch
        return dataclasses.replace(batch, pretraining=self._wiring.text.next(params, step))

    def progress(self, step: int) -> dict[str, float]:
        """What the round of the step before has shown: rewards, lengths, how sampling went."""
        # The loop asks for a step when the next one, and perhaps another round, has begun.
        begun = (metrics for begin, metrics in reversed(self._metrics) if begin < step)
        return next(begun, {})

    def state(self) -> dict[str, Any]:
        """Also writes the round at hand, where steps of it are still to come."""
        rollout = self._config.rollout
        inside = self._batch is not None and self._served + 1 < self._begin + rollout.steps
        if inside and jax.process_index() == 0:
            assert self._batch is not None
            keep = self._config.checkpoint.keep_latest + 1
            _write_round(self._folder, self._begin, self._batch, keep)
        return {
            "cursor": self._cursor,
            "metrics": list(self._metrics),
            "failures": self._scorer.failures,
            "learner": self._learner_state,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._cursor = state["cursor"]
        self._metrics = [(begin, metrics) for begin, metrics in state["metrics"]]
        self._scorer.failures = state["failures"]
        self._learner_state = state["learner"]

    def _collect(self, params: Any, step: int) -> None:
        """Samples and scores a round with the parameters of this step."""
        draws = self._draws(params, step)
        prompts, rollouts, scores = self._best(draws)
        sequences, reference = rollouts.sequences, None
        if self._reference is not None:
            reference = self._reference_logprobs(self._reference.weights(params), sequences)
        round_ = Round(
            step,
            prompts,
            rollouts,
            scores.total,
            lambda further: self._scorer.extend(scores, further).total,
            reference,
        )
        self._batch, learnt = self._learner.learn(params, round_)
        self._begin, self._learner_state = step, self._learner.state()
        metrics = {
            # Of the first draw alone: what the later ones add depends on what it was.
            **describe_scores(draws[0].scores, draws[0].rollouts),
            **learnt,
            "sampling_logprob_difference": self._difference(params, rollouts),
            "idle_share": self._cost.idle_share,
            "compilations": float(self._cost.compilations),
            "reward_failures": float(self._scorer.failures),
            "epoch": self._cursor / len(self._prompts.train),
        }
        if self._wiring.redraws:
            share = float(draws[0].constant.mean())
            metrics |= {"draws": float(len(draws)), "constant_groups": share}
        self._metrics = [*self._metrics[-1:], (step, metrics)]

    def _difference(self, params: Any, rollouts: Rollouts) -> float:
        """See `Rollouts.difference`; of some rows, evenly spread, since a forward pass of all takes
        a good part of a step."""
        rows, shards = len(rollouts.samples), sharding.batch_shards(self._ground.mesh)
        count = min(rows, -(-CHECKED // shards) * shards)
        checked = rollouts.take(np.arange(count) * rows // count)
        return checked.difference(self._logprobs(params, checked.sequences))

    def _draws(self, params: Any, step: int) -> list[_Draw]:
        """The draws of a round: one, and more while prompts are missing whose scores differ."""
        rng = jax.random.fold_in(jax.random.key(self._config.seed), step)
        missing, draws = self._size, list[_Draw]()
        while missing and len(draws) <= self._wiring.redraws:
            draws.append(self._draw(params, missing, jax.random.fold_in(rng, len(draws))))
            missing -= int((~draws[-1].constant).sum())
        return draws

    def _draw(self, params: Any, size: int, rng: jax.Array) -> _Draw:
        """Completions of the `size` prompts that are next, with their scores."""
        rollout = self._config.rollout
        prompts = self._prompts.take(self._cursor, size)
        self._cursor += size
        assert self._ground.template is not None
        rollouts = sample_rollouts(
            self._model,
            params,
            self._ground.tokenizer,
            prompts,
            # A later draw takes the next power of two of slots, so that few numbers compile.
            dataclasses.replace(rollout, slots=rollout.slots or self._size * rollout.samples),
            stop_ids=self._ground.template.stop_ids(self._ground.tokenizer),
            length=self._phase.length,
            rng=rng,
            cost=self._cost,
        )
        scores = self._scorer(rollouts.samples)
        return _Draw(prompts, rollouts, scores, constant_groups(scores.total.reshape(size, -1)))

    def _best(self, draws: Sequence[_Draw]) -> tuple[list[Prompt], Rollouts, Scores]:
        """As many prompts as a round has: those whose scores differ, and where these are too few
        the constant ones that were drawn first."""
        constant = np.concatenate([draw.constant for draw in draws])
        chosen = np.sort(np.argsort(constant, kind="stable")[: self._size])
        samples = self._config.rollout.samples
        rows = (chosen[:, None] * samples + np.arange(samples)).reshape(-1)
        prompts = [prompt for draw in draws for prompt in draw.prompts]
        parts = {
            name: np.concatenate([draw.scores.parts[name] for draw in draws])[rows]
            for name in draws[0].scores.parts
        }
        return (
            [prompts[place] for place in chosen],
            join_rollouts([draw.rollouts for draw in draws]).take(rows),
            self._scorer.sum(parts),
        )


def masked(batch: Batch, values: np.ndarray, scores: np.ndarray) -> tuple[Batch, np.ndarray]:
    """The rows that have a score, and the values at the tokens that count; others are 0."""
    known = np.isfinite(scores)[:, None]
    weights = np.where(known, batch.loss_weights, 0).astype(np.float32)
    counted = np.where(weights > 0, values, 0).astype(np.float32)
    return dataclasses.replace(batch, loss_weights=weights), counted


def _jit_logprobs(
    ground: Foundation, model: LanguageModel, temperature: float
) -> Callable[[Any, Batch], np.ndarray]:
    """`(params, sequences) → float32 [batch, time]`, of the counted targets; 0 elsewhere."""
    config: Any = ground.config
    chunk, longest = config.loss.chunk, config.rollout.max_new_tokens

    def read(params: Any, sequences: Batch) -> jax.Array:
        made = policy_outputs(
            model, params, sequences, longest=longest, temperature=temperature, chunk=chunk
        )
        return jnp.where(sequences.loss_weights > 0, made.logprobs, 0.0)

    jitted = ground.jit(read)
    return lambda params, sequences: to_host(jitted(params, sequences))


def _write_round(folder: Path, begin: int, batch: RolloutBatch, keep: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    arrays = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    temporary = folder / f".{begin}.npz"
    np.savez(temporary, **arrays)
    temporary.replace(folder / f"{begin}.npz")
    written = sorted((int(file.stem) for file in folder.glob("[0-9]*.npz")), reverse=True)
    for old in written[keep:]:
        (folder / f"{old}.npz").unlink()


def _read_round(folder: Path, begin: int) -> RolloutBatch:
    path = folder / f"{begin}.npz"
    try:
        with np.load(path) as file:
            arrays = dict(file)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}), the round in the middle of which the run stopped: "
            "start again in another --workdir."
        ) from error
    fields: dict[str, Any] = {
        f.name: arrays.get(f".{f.name}") for f in dataclasses.fields(RolloutBatch)
    }
    parts: dict[str, Any] = {
        f.name: arrays.get(f".sequences.{f.name}") for f in dataclasses.fields(Batch)
    }
    return RolloutBatch(**{**fields, "sequences": Batch(**parts)})

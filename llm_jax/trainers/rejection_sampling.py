"""Rejection sampling: fine-tuning on the best of several answers of the model's own.

Best-of-N as in Llama 2 (arXiv:2307.09288, section 3.2.3). The answers that were chosen are a data
set of their own, RUN/selected, to start other stages from.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax.data.examples import Message
from llm_jax.data.phases import Phase
from llm_jax.errors import UserError
from llm_jax.models import LanguageModel
from llm_jax.objectives import lm
from llm_jax.step import Objective, Pooled
from llm_jax.trainers import foundation, on_policy
from llm_jax.trainers.base import Trainer
from llm_jax.trainers.rounds import Round, Wiring, masked
from llm_jax.types import RolloutBatch

FOLDER = "selected"


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
    """Which answers are trained on."""

    keep: int = 1  # of each prompt, the best ones
    threshold: float | None = None  # those with a lower score are not trained on

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise UserError(f"config.selection.keep={self.keep} must be at least 1.")


@dataclasses.dataclass(frozen=True)
class RejectionSamplingConfig(on_policy.OnPolicyConfig):
    """The config of `trainer = "rejection_sampling"`."""

    trainer: str = "rejection_sampling"
    loss: lm.LossConfig = lm.LossConfig()
    selection: SelectionConfig = SelectionConfig()


class BestOfN:
    """Chooses answers and writes them down; it has no state."""

    def __init__(self, config: RejectionSamplingConfig, folder: Path):
        self._config, self._folder = config, folder

    def learn(self, params: Any, round: Round) -> tuple[RolloutBatch, dict[str, float]]:
        del params
        scores = round.scores.reshape(-1, self._config.rollout.samples)
        ranked = np.argsort(-np.nan_to_num(scores, nan=-np.inf), axis=1, kind="stable")
        first = np.arange(len(scores))[:, None] * scores.shape[1]
        rows = (first + ranked[:, : self._config.selection.keep]).reshape(-1)
        chosen = round.scores[rows]
        threshold = self._config.selection.threshold
        if threshold is not None:
            chosen = np.where(chosen >= threshold, chosen, np.nan)
        sequences = jax.tree.map(lambda x: x[rows], round.rollouts.sequences)
        sequences, logprobs = masked(sequences, round.rollouts.logprobs[rows], chosen)
        if jax.process_index() == 0:
            self._write(round, rows, chosen)
        batch = RolloutBatch(sequences, logprobs, advantages=np.zeros_like(logprobs))
        share = float(np.isfinite(chosen).mean())
        return batch, {"selected": share, **best_of(scores)}

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        del state

    def _write(self, round: Round, rows: np.ndarray, scores: np.ndarray) -> None:
        """The chosen answers of a round, in a file that a repeated round writes again."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{round.step:08}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for row, score in zip(rows.tolist(), scores.tolist(), strict=True):
                prompt = round.prompts[row // self._config.rollout.samples]
                answer = round.rollouts.samples[row].completion_text
                if math.isfinite(score) and answer.strip():
                    turns = [*prompt.messages, Message("assistant", answer)]
                    messages = [_fields(turn) for turn in turns]
                    line = {"messages": messages, "score": score, "step": round.step}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _fields(turn: Message) -> dict[str, Any]:
    """Those that say something, as examples have them."""
    fields = {"role": turn.role, "content": turn.content, "tool_calls": list(turn.tool_calls),
              "name": turn.name}  # fmt: skip
    return {name: value for name, value in fields.items() if value or name == "content"}


def best_of(scores_PS: np.ndarray) -> dict[str, float]:
    """The expected best score of 1, 2, 4, ... samples of a prompt, over prompts.

    Unbiased: of S samples, the k-th smallest is the best of n drawn ones in C(k - 1, n - 1) of the
    C(S, n) cases. Prompts with a sample that has no score are left out.
    """
    whole = np.sort(scores_PS[np.isfinite(scores_PS).all(axis=1)], axis=1)
    count = scores_PS.shape[1]
    if not len(whole):
        return {}
    sizes = [2**power for power in range(count.bit_length()) if 2**power <= count]
    ways = {n: [math.comb(k, n - 1) / math.comb(count, n) for k in range(count)] for n in sizes}
    return {f"best_of/{n}": float((whole @ np.asarray(ways[n])).mean()) for n in sizes}


def build(
    config: RejectionSamplingConfig, mesh: Mesh, workdir: Path, log: Callable[[str], None]
) -> Trainer:
    """Reads the prompts and wires the stage.

    Raises:
      UserError: whatever in the config or the data does not fit, before anything is written to
        `workdir`.
    """
    if config.selection.keep > config.rollout.samples:
        raise UserError(
            f"config.selection.keep={config.selection.keep} is more than config.rollout.samples="
            f"{config.rollout.samples}: lower it."
        )
    ground = foundation.lay_for_chats(config, mesh, workdir, log)

    def objective(model: LanguageModel, phase: Phase) -> Objective:
        del phase
        inner = lm.make_objective(model, config.loss)
        if not isinstance(inner, Pooled):
            return lambda params, batch, rng: inner(params, batch.sequences, rng)
        pooled: Pooled = inner
        return Pooled(
            lambda params, batch, rng: pooled.pool(params, batch.sequences, rng),
            lambda params, batch, rng, sums: pooled(params, batch.sequences, rng, sums),
        )

    wiring = Wiring(
        objective=objective,
        learner=lambda model, phase: BestOfN(config, workdir / FOLDER),
        kept=config.selection.keep,
    )
    return on_policy.build(ground, wiring, workdir)

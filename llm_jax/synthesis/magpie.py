"""Instructions and answers out of a fine-tuned model alone (MagPie, arXiv:2406.08464).

Given its template up to where a user begins to speak, a model writes what a user would say. What
it says is answered by the model itself and filtered.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from llm_jax.data.examples import Message
from llm_jax.errors import UserError
from llm_jax.generation.continuous import generate_many
from llm_jax.generation.sampler import SamplerConfig
from llm_jax.rl.reward_models import RewardModel
from llm_jax.rl.scoring import Sample
from llm_jax.synthesis.filters import NearDuplicates, is_garbled
from llm_jax.synthesis.responders import RunResponder, Unanswered

_CHUNK = 256  # instructions that go through all steps together, at most


@dataclasses.dataclass(frozen=True)
class MagpieConfig:
    """Which instructions and answers are kept."""

    max_instruction_tokens: int  # one that goes on is dropped
    min_instruction_tokens: int
    min_answer_tokens: int
    similarity: float  # of an instruction to one before it, from which it is dropped
    min_reward: float | None  # an answer with a lower one is dropped

    def __post_init__(self) -> None:
        shortest, longest = self.min_instruction_tokens, self.max_instruction_tokens
        if not 1 <= shortest <= longest:
            raise UserError(
                f"instructions of {shortest} to {longest} tokens: the first must be at least 1, "
                "and at most the second."
            )
        if self.min_answer_tokens < 1:
            raise UserError(f"min_answer_tokens={self.min_answer_tokens} must be at least 1.")
        if not 0 < self.similarity <= 1:
            raise UserError(f"similarity={self.similarity} must lie in (0, 1].")


class Magpie:
    """A source of conversations.

    Attributes:
      sampled: instructions so far.
      dropped: how many of them, by reason.
    """

    def __init__(
        self,
        responder: RunResponder,
        sampler: SamplerConfig,
        config: MagpieConfig,
        reward: RewardModel | None = None,
        *,
        batch: int,
    ):
        """
        Args:
          responder: gives the answers.
          sampler: of the instructions.
          reward: scores the answers.
          batch: rows that decode at a time; it changes no row.

        Raises:
          UserError: a template that does not tell where a user's turn begins or ends.
        """
        run = responder.run
        self._responder, self._sampler, self._config = responder, sampler, config
        self._reward, self._batch = reward, batch
        self._turn = responder.template.user_turn(run.tokenizer)
        self._seen = NearDuplicates(config.similarity)
        self.sampled = 0
        self.dropped: Counter[str] = Counter()

    def rows(self, count: int, attempts: int, seed: int) -> Iterator[dict[str, Any]]:
        """Yields `count` rows of the format `messages`, or fewer where `attempts` instructions give
        no more; with `instruction_tokens`, `answer_tokens`, and `reward` where there is a model.

        Raises:
          UserError: the prefix and an instruction are longer together than the model reads.
        """
        rng, kept = jax.random.key(seed), 0
        while kept < count and self.sampled < attempts:
            size = min(_CHUNK, count, attempts - self.sampled)
            key = jax.random.fold_in(rng, self.sampled)
            self.sampled += size
            rows = self._chunk(size, key)
            self.dropped["more than wanted"] += max(0, kept + len(rows) - count)
            rows = rows[: count - kept]
            kept += len(rows)
            yield from rows

    def _chunk(self, size: int, rng: jax.Array) -> list[dict[str, Any]]:
        """What is left of so many instructions."""
        asking, answering = jax.random.split(rng)
        instructions = [text for text in self._instructions(size, asking) if self._is_new(text)]
        answers = self._responder.sample([[Message("user", i)] for i in instructions], answering)
        pairs = [
            (instruction, answer)
            for instruction, answer in zip(instructions, answers, strict=True)
            if not isinstance(answer, Unanswered) and self._is_good(answer)
        ]
        self.dropped["instruction too long to answer"] += sum(
            isinstance(answer, Unanswered) for answer in answers
        )
        rewards = self._rewards([answer for _, answer in pairs])
        return [
            self._row(instruction, answer, reward)
            for (instruction, answer), reward in zip(pairs, rewards, strict=True)
            if reward is not None
        ]

    def _instructions(self, size: int, rng: jax.Array) -> Iterator[str]:
        """What the model writes in a user's place, where it comes to an end."""
        run, turn = self._responder.run, self._turn
        with jax.set_mesh(run.mesh):
            made = generate_many(
                run.model,
                run.params,
                [turn.prefix],
                samples=size,
                max_new_tokens=self._config.max_instruction_tokens,
                sampler=self._sampler,
                rng=rng,
                stop_ids=turn.stop_ids,
                slots=self._batch,
            )
        for tokens, length, stopped in zip(made.tokens, made.lengths, made.stopped, strict=True):
            text = run.tokenizer.decode(tokens[:length])
            if turn.stop_string is not None and turn.stop_string in text:
                text, stopped = text.partition(turn.stop_string)[0], True
            if stopped:
                yield text.strip()
            else:
                self.dropped["instruction unfinished"] += 1

    def _is_new(self, instruction: str) -> bool:
        if self._tokens(instruction) < self._config.min_instruction_tokens:
            why = "instruction short"
        elif is_garbled(instruction):
            why = "instruction garbled"
        elif not self._seen.add(instruction):
            why = "instruction repeated"
        else:
            return True
        self.dropped[why] += 1
        return False

    def _is_good(self, answer: Sample) -> bool:
        text = answer.completion_text.strip()
        if not answer.finished:
            why = "answer unfinished"
        elif self._tokens(text) < self._config.min_answer_tokens:
            why = "answer short"
        elif is_garbled(text):
            why = "answer garbled"
        else:
            return True
        self.dropped[why] += 1
        return False

    def _rewards(self, answers: Sequence[Sample]) -> Iterator[dict[str, float] | None]:
        """What a row says of its reward; None for an answer that is dropped for it."""
        if self._reward is None:
            yield from ({} for _ in answers)
            return
        lowest = self._config.min_reward
        for outcome in self._reward(answers):
            if isinstance(outcome, Exception):
                self.dropped["without a reward"] += 1
                yield None
            elif lowest is not None and outcome < lowest:
                self.dropped["reward low"] += 1
                yield None
            else:
                yield {"reward": outcome}

    def _row(self, instruction: str, answer: Sample, reward: dict[str, float]) -> dict[str, Any]:
        text = answer.completion_text.strip()
        return {
            "messages": [
                {"role": "user", "content": instruction},
                {"role": "assistant", "content": text},
            ],
            "instruction_tokens": self._tokens(instruction),
            "answer_tokens": self._tokens(text),
            **reward,
        }

    def _tokens(self, text: str) -> int:
        return len(self._responder.run.tokenizer.encode(text))

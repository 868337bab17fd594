"""Who answers: the interface that runs and endpoints share, and runs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np

from llm_jax.data.examples import Conversation, Message
from llm_jax.data.prompts import Prompt
from llm_jax.data.template_base import ChatTemplate
from llm_jax.errors import UserError
from llm_jax.evals.batching import sequence_batch
from llm_jax.generation.sampler import SamplerConfig
from llm_jax.objectives.logprobs import response_logprobs
from llm_jax.placement import to_host
from llm_jax.rl.rollouts import RolloutConfig, sample_rollouts
from llm_jax.rl.scoring import Sample
from llm_jax.runs import LoadedRun
from llm_jax.types import Batch

Turns = Sequence[Message]

LETTERS = ("A", "B")  # the answers to a question of choice

_SHORTEST = 32  # tokens that a batch is padded to at least; lengths double from there
_CHUNK = 512  # positions whose logits are held at once


class Unanswered(Exception):
    """Why a question has no answer: a clause without a full stop."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """finished: whether the answer ended by itself, before the limit of its length."""

    text: str
    finished: bool


@dataclasses.dataclass(frozen=True)
class Leaning:
    """How a judge answers a question of choice.

    log_odds: log p(A) - log p(B) of the two letters as the answer; infinite where the judge says
    one of them and no probabilities are known. mass: p(A) + p(B).
    """

    log_odds: float
    mass: float


class Responder(Protocol):
    """A model that answers.

    lineage: JSON-able, where its answers come from.
    """

    lineage: dict[str, Any]

    def answer(self, dialogues: Sequence[Turns], rng: jax.Array) -> list[Reply | Unanswered]:
        """The next turn of each dialogue, which ends with a user's.

        Args:
          rng: a typed PRNG key. Of an endpoint, whose randomness is its own, it decides nothing.
        """

    def lean(self, questions: Sequence[str]) -> list[Leaning | Unanswered]:
        """The answer to each question, whose end asks for one of `LETTERS`."""


class RunResponder:
    """A run or a published folder, asked in its own chat template."""

    def __init__(
        self,
        run: LoadedRun,
        template: ChatTemplate,
        sampler: SamplerConfig,
        *,
        max_new_tokens: int,
        batch: int,
    ):
        """
        Args:
          max_new_tokens: of an answer, its end included.
          batch: rows that decode, or are read, at a time; it changes no answer.

        Raises:
          UserError: a limit that leaves no room, or is not positive.
        """
        self._longest = run.model.config.max_length - max_new_tokens
        if max_new_tokens < 1 or self._longest < 1:
            raise UserError(
                f"answers of {max_new_tokens} tokens do not fit {run.path}, which reads "
                f"{run.model.config.max_length} with the prompt: choose another --max_new_tokens."
            )
        self.run, self.template = run, template
        self.lineage = {"run": run.stored.name, "stages": list(run.stored.lineage)}
        self._sampler, self._batch = sampler, batch
        self._config = RolloutConfig(samples=1, max_new_tokens=max_new_tokens, slots=batch)
        self._logprobs = jax.jit(functools.partial(response_logprobs, run.model, chunk=_CHUNK))

    def answer(self, dialogues: Sequence[Turns], rng: jax.Array) -> list[Reply | Unanswered]:
        return [
            made
            if isinstance(made, Unanswered)
            else Reply(made.completion_text.strip(), made.finished)
            for made in self.sample(dialogues, rng)
        ]

    def sample(self, dialogues: Sequence[Turns], rng: jax.Array) -> list[Sample | Unanswered]:
        """`answer` with the tokens. Dialogue i has its randomness from the key and i."""
        outcomes: list[Sample | Unanswered] = [Unanswered() for _ in dialogues]
        prompts, places = [], []
        for place, turns in enumerate(dialogues):
            try:
                prompts.append(self._prompt(turns))
                places.append(place)
            except Unanswered as reason:
                outcomes[place] = reason
        if prompts:
            with jax.set_mesh(self.run.mesh):
                made = sample_rollouts(
                    self.run.model,
                    self.run.params,
                    self.run.tokenizer,
                    prompts,
                    self._config,
                    stop_ids=self.template.stop_ids(self.run.tokenizer),
                    length=max(len(p.ids) for p in prompts) + self._config.max_new_tokens,
                    rng=rng,
                    sampler=self._sampler,
                )
            for place, sample in zip(places, made.samples, strict=True):
                outcomes[place] = sample
        return outcomes

    def lean(self, questions: Sequence[str]) -> list[Leaning | Unanswered]:
        """From the log-probabilities of the letters, each as the beginning of the answer."""
        sequences, places = [], []
        outcomes: list[Leaning | Unanswered] = [Unanswered() for _ in questions]
        for place, question in enumerate(questions):
            try:
                sequences += [self._lettered(question, letter) for letter in LETTERS]
                places.append(place)
            except Unanswered as reason:
                outcomes[place] = reason
        logprobs = self._read(sequences).reshape(-1, len(LETTERS))
        for place, (first, second) in zip(places, logprobs.tolist(), strict=True):
            outcomes[place] = Leaning(first - second, float(np.exp([first, second]).sum()))
        return outcomes

    def _prompt(self, turns: Turns) -> Prompt:
        """
        Raises:
          Unanswered: the template cannot write the turns, or they leave the answer no room.
        """
        try:
            ids = self.template.render_prompt(turns, (), self.run.tokenizer)
        except UserError as error:
            raise Unanswered(str(error).rstrip(".")) from error
        if len(ids) > self._longest:
            raise Unanswered(
                f"a prompt of {len(ids)} tokens, where answers leave {self._longest} to it"
            )
        text = "\n\n".join(turn.content for turn in turns)
        return Prompt(ids=tuple(ids), text=text, messages=tuple(turns), answer=None, row={})

    def _lettered(self, question: str, letter: str) -> tuple[list[int], list[bool]]:
        """The tokens of a question with its answer, and which of them are the letter's.

        Raises:
          Unanswered: the template cannot write them, or they are longer than the model reads.
        """
        turns = (Message("user", question), Message("assistant", letter))
        try:
            rendered = self.template.render(Conversation(turns), self.run.tokenizer)
        except UserError as error:
            raise Unanswered(str(error).rstrip(".")) from error
        longest = self.run.model.config.max_length
        if len(rendered.tokens) > longest:
            raise Unanswered(
                f"a question of {len(rendered.tokens)} tokens, where the judge reads {longest}"
            )
        # The end of the turn says nothing of the choice.
        ends = self.template.stop_ids(self.run.tokenizer)
        pairs = zip(rendered.tokens, rendered.trained, strict=True)
        return rendered.tokens, [trained and token not in ends for token, trained in pairs]

    def _read(self, sequences: Sequence[tuple[list[int], list[bool]]]) -> np.ndarray:
        """The log-probability of the counted tokens of each sequence, float32 [sequences].

        Sequences of like length are read together, padded to a power of two, so that few lengths
        compile.
        """
        logprobs = np.zeros(len(sequences), np.float32)
        order = sorted(range(len(sequences)), key=lambda place: len(sequences[place][0]))
        for begin in range(0, len(order), self._batch):
            chosen = order[begin : begin + self._batch]
            rows = self._rows([sequences[place] for place in chosen])
            with jax.set_mesh(self.run.mesh):
                values = to_host(self._logprobs(self.run.params, rows))
            logprobs[chosen] = values[: len(chosen)]
        return logprobs

    def _rows(self, sequences: Sequence[tuple[list[int], list[bool]]]) -> Batch:
        """The sequences with weight 1 where the target counts, and empty rows up to a batch."""
        tokens = [ids for ids, _ in sequences] + [[]] * (self._batch - len(sequences))
        longest = max(_SHORTEST, *map(len, tokens))
        length = min(1 << (longest - 1).bit_length(), self.run.model.config.max_length)
        batch = sequence_batch(tokens, length)
        weights = np.zeros(batch.tokens.shape, np.float32)
        for row, (_, counted) in enumerate(sequences):
            weights[row, : len(counted) - 1] = counted[1:]
        return dataclasses.replace(batch, loss_weights=weights)

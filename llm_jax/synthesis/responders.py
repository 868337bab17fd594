"""Who answers: the interface that runs and endpoints share, and runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np

from llm_jax.data.examples import Conversation, Message
from llm_jax.data.prompts import Prompt
from llm_jax.data.template_base import ChatTemplate
from llm_jax.errors import UserError
from llm_jax.evals.run_subject import run_subject
from llm_jax.evals.subject import Subject
from llm_jax.generation.sampler import SamplerConfig
from llm_jax.rl.rollouts import RolloutConfig, sample_rollouts
from llm_jax.rl.scoring import Sample
from llm_jax.runs import LoadedRun

Turns = Sequence[Message]

LETTERS = ("A", "B")  # the answers to a question of choice


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


class ModelResponder:
    """A language model, asked in the chat template of its subject."""

    def __init__(
        self,
        subject: Subject,
        params: Any,
        sampler: SamplerConfig,
        *,
        max_new_tokens: int,
        lineage: dict[str, Any],
    ):
        """
        Args:
          subject: has a template; its batch is how many rows decode, or are read, at a time.
          max_new_tokens: of an answer, its end included.

        Raises:
          UserError: a limit that leaves no room, or is not positive.
        """
        self._longest = subject.model.max_length - max_new_tokens
        if max_new_tokens < 1 or self._longest < 1:
            raise UserError(
                f"answers of {max_new_tokens} tokens do not fit {subject.name}, which reads "
                f"{subject.model.max_length} with the prompt: choose another --max_new_tokens."
            )
        assert subject.template is not None
        self.template, self.lineage = subject.template, lineage
        self._subject, self._params, self._sampler = subject, params, sampler
        self._config = RolloutConfig(samples=1, max_new_tokens=max_new_tokens, slots=subject.batch)

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
            tokenizer = self._subject.tokenizer
            with jax.set_mesh(self._subject.mesh):
                made = sample_rollouts(
                    self._subject.model,
                    self._params,
                    tokenizer,
                    prompts,
                    self._config,
                    stop_ids=self.template.stop_ids(tokenizer),
                    length=max(len(p.ids) for p in prompts) + self._config.max_new_tokens,
                    rng=rng,
                    sampler=self._sampler,
                )
            for place, sample in zip(places, made.samples, strict=True):
                outcomes[place] = sample
        return outcomes

    def lean(self, questions: Sequence[str]) -> list[Leaning | Unanswered]:
        """From the log-probabilities of the letters, each as the beginning of the answer."""
        lettered: list[tuple[list[int], list[int]]] = []
        places = []
        outcomes: list[Leaning | Unanswered] = [Unanswered() for _ in questions]
        for place, question in enumerate(questions):
            try:
                lettered += [self._lettered(question, letter) for letter in LETTERS]
                places.append(place)
            except Unanswered as reason:
                outcomes[place] = reason
        with jax.set_mesh(self._subject.mesh):
            found = self._subject.read(self._params, lettered)
        totals = np.array([each.total for each in found]).reshape(-1, len(LETTERS))
        for place, (first, second) in zip(places, totals.tolist(), strict=True):
            outcomes[place] = Leaning(first - second, float(np.exp([first, second]).sum()))
        return outcomes

    def _prompt(self, turns: Turns) -> Prompt:
        """
        Raises:
          Unanswered: the template cannot write the turns, or they leave the answer no room.
        """
        try:
            ids = self.template.render_prompt(turns, (), self._subject.tokenizer)
        except UserError as error:
            raise Unanswered(str(error).rstrip(".")) from error
        if len(ids) > self._longest:
            raise Unanswered(
                f"a prompt of {len(ids)} tokens, where answers leave {self._longest} to it"
            )
        text = "\n\n".join(turn.content for turn in turns)
        return Prompt(ids=tuple(ids), text=text, messages=tuple(turns), answer=None, row={})

    def _lettered(self, question: str, letter: str) -> tuple[list[int], list[int]]:
        """The tokens of a question with its answer, and the places of those that are the letter's.

        Raises:
          Unanswered: the template cannot write them, or they are longer than the model reads.
        """
        turns = (Message("user", question), Message("assistant", letter))
        try:
            rendered = self.template.render(Conversation(turns), self._subject.tokenizer)
        except UserError as error:
            raise Unanswered(str(error).rstrip(".")) from error
        longest = self._subject.model.max_length
        if len(rendered.tokens) > longest:
            raise Unanswered(
                f"a question of {len(rendered.tokens)} tokens, where the judge reads {longest}"
            )
        # The end of the turn says nothing of the choice.
        ends = self.template.stop_ids(self._subject.tokenizer)
        pairs = zip(rendered.tokens, rendered.trained, strict=True)
        places = [i for i, (token, trained) in enumerate(pairs) if trained and token not in ends]
        return rendered.tokens, places


class RunResponder(ModelResponder):
    """A run or a published folder, asked in a chat template."""

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
          batch: rows that decode, or are read, at a time; it changes no answer, and
            leanings by rounding alone.

        Raises:
          UserError: a limit that leaves no room, or is not positive; a reward model.
        """
        subject = run_subject(run, log=lambda line: None, batch=batch)
        super().__init__(
            dataclasses.replace(subject, template=template),
            run.params,
            sampler,
            max_new_tokens=max_new_tokens,
            lineage={"run": run.stored.name, "stages": list(run.stored.lineage)},
        )
        self.run = run

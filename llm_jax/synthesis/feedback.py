"""AI feedback by a constitution (Constitutional AI, arXiv:2212.08073).

A judge criticises and rewrites a policy's answers, which gives conversations to fine-tune on
(section 3), or chooses between two of them, which gives pairs for preference learning (section 4).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from llm_jax.data.examples import Message
from llm_jax.errors import UserError
from llm_jax.synthesis.constitution import Constitution, Principle, draw
from llm_jax.synthesis.responders import Leaning, Reply, Responder, Turns, Unanswered

REPORTED = 3  # failures that are told one by one

_CHUNK = 256  # prompts that go through all steps together

_QUESTION = """\
Here is a conversation, and two responses that could come next in it.

{dialogue}

Response A: {first}

Response B: {second}

{choice} Answer with its letter alone, A or B."""


@dataclasses.dataclass(frozen=True)
class Question:
    """number: its place among the prompts, from 0. turns: a dialogue that ends with a user's."""

    number: int
    turns: tuple[Message, ...]


class Ledger:
    """What became of the prompts that gave no row.

    Attributes:
      dropped: how many, by reason.
    """

    def __init__(self, max_failures: int, log: Callable[[str], None]):
        """
        Args:
          max_failures: one more ends the work.
        """
        self.dropped: Counter[str] = Counter()
        self._limit, self._log = max_failures, log

    def fail(self, question: Question, reason: Unanswered) -> None:
        """Tells of a question that somebody could not answer (the first few), and counts it.

        Raises:
          UserError: the limit is passed.
        """
        self.dropped["failed"] += 1
        count = self.dropped["failed"]
        line = f"prompt {question.number + 1} failed: {reason}"
        if count > self._limit:
            raise UserError(
                f"{count} prompts have failed, and --max_failures={self._limit}; mend the cause, "
                f"or raise it. The last: {line}."
            )
        if count <= REPORTED:
            self._log(line)
        if count == REPORTED:
            self._log("further failures are counted only.")

    def kept(
        self, questions: Sequence[Question], *replies: Sequence[Reply | Unanswered]
    ) -> list[tuple[int, tuple[str, ...]]]:
        """The places of the questions to which all replies say something and ended, each with the
        texts of its replies. The others are counted by what is wrong with the first bad one."""
        kept = []
        for place, (question, *given) in enumerate(zip(questions, *replies, strict=True)):
            texts = []
            for reply in given:
                if isinstance(reply, Unanswered):
                    self.fail(question, reply)
                elif not reply.finished:
                    self.dropped["unfinished"] += 1
                elif not reply.text:
                    self.dropped["empty"] += 1
                else:
                    texts.append(reply.text)
                    continue
                break
            else:
                kept.append((place, tuple(texts)))
        return kept


def revise(
    policy: Responder,
    judge: Responder,
    constitution: Constitution,
    questions: Iterable[Question],
    ledger: Ledger,
    *,
    rounds: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Answers of the policy, criticised and rewritten by the judge `rounds` times.

    Every round draws a principle of its own for each answer.

    Yields:
      Rows of the format `messages`: the prompt and the last revision; with `first_answer`, and
      `revisions`, of each the principle, the critique and the answer.

    Raises:
      UserError: a constitution without revisions, or more failures than the ledger's limit.
    """
    principles = constitution.revising
    for chunk, rng in _chunks(questions, seed):
        first = policy.answer([question.turns for question in chunk], jax.random.fold_in(rng, 0))
        drafts = [
            _Draft(chunk[place], text, text, ()) for place, (text,) in ledger.kept(chunk, first)
        ]
        for round in range(rounds):
            keys = jax.random.split(jax.random.fold_in(rng, round + 1))
            drawn = [draw(principles, seed, draft.question.number, round) for draft in drafts]
            drafts = _revised(judge, list(zip(drafts, drawn, strict=True)), ledger, keys)
        yield from (draft.row() for draft in drafts)


class PairJudge:
    """A judge of two answers, asked in both orders.

    What it gains or loses by the place of an answer has the same sign in both log-odds, and
    vanishes from their difference.

    Attributes:
      compared: pairs that the judge has answered on in both orders.
      swayed: those of them in which both orders gave the same letter.
      mass: the sum over them of p(A) + p(B), the mean of both orders.
    """

    def __init__(self, judge: Responder, constitution: Constitution, ledger: Ledger, seed: int):
        """
        Raises:
          UserError: a constitution without choices.
        """
        self._judge, self._ledger, self._seed = judge, ledger, seed
        self._principles = constitution.choosing
        self.compared = self.swayed = 0
        self.mass = 0.0

    def principle(self, question: Question) -> Principle:
        """By which answers to the question are compared."""
        return draw(self._principles, self._seed, question.number)

    def log_odds(self, pairs: Sequence[tuple[Question, str, str]]) -> list[float | None]:
        """Of the first answer of each pair over the second, from both orders; 0 where the judge
        contradicts itself, None where it has no answer.

        Raises:
          UserError: more failures than the ledger's limit.
        """
        both = [
            _question(question.turns, self.principle(question), *answers[::direction])
            for question, *answers in pairs
            for direction in (1, -1)
        ]
        leanings = self._judge.lean(both)
        questions = [question for question, *_ in pairs]
        each = zip(questions, leanings[::2], leanings[1::2], strict=True)
        return [self._from_both(*given) for given in each]

    def _from_both(
        self, question: Question, forward: Leaning | Unanswered, backward: Leaning | Unanswered
    ) -> float | None:
        for leaning in (forward, backward):
            if isinstance(leaning, Unanswered):
                self._ledger.fail(question, leaning)
                return None
        assert isinstance(forward, Leaning) and isinstance(backward, Leaning)
        self.compared += 1
        self.swayed += forward.log_odds * backward.log_odds > 0
        self.mass += (forward.mass + backward.mass) / 2
        log_odds = (forward.log_odds - backward.log_odds) / 2
        # Where a judge that is known by its letters contradicts itself, infinities give no number.
        return 0.0 if math.isnan(log_odds) else log_odds


class Comparer(PairJudge):
    """Pairs of answers of the policy, ordered by the judge."""

    def __init__(
        self,
        policy: Responder,
        judge: Responder,
        constitution: Constitution,
        ledger: Ledger,
        seed: int,
    ):
        """
        Raises:
          UserError: a constitution without choices.
        """
        super().__init__(judge, constitution, ledger, seed)
        self._policy = policy

    def rows(self, questions: Iterable[Question]) -> Iterator[dict[str, Any]]:
        """Rows of the format `preference`, with the principle and the probability that the judge
        gives to the chosen answer: 1 where it is known by a letter only.

        Raises:
          UserError: more failures than the ledger's limit.
        """
        for chunk, rng in _chunks(questions, self._seed):
            pairs = self._pairs(chunk, rng)
            for (question, *answers), log_odds in zip(pairs, self.log_odds(pairs), strict=True):
                if log_odds == 0:
                    self._ledger.dropped["tie"] += 1
                elif log_odds is not None:
                    chosen, rejected = answers if log_odds > 0 else answers[::-1]
                    yield {
                        "prompt": _fields(question.turns),
                        "chosen": chosen,
                        "rejected": rejected,
                        "principle": self.principle(question).name,
                        "probability": 1 / (1 + math.exp(-abs(log_odds))),
                    }

    def _pairs(self, chunk: Sequence[Question], rng: jax.Array) -> list[tuple[Question, str, str]]:
        """Two answers to each question, where they differ."""
        replies = self._policy.answer([q.turns for q in chunk for _ in range(2)], rng)
        pairs = []
        for place, (first, second) in self._ledger.kept(chunk, replies[::2], replies[1::2]):
            if first == second:
                self._ledger.dropped["alike"] += 1
            else:
                pairs.append((chunk[place], first, second))
        return pairs


@dataclasses.dataclass(frozen=True)
class _Draft:
    """An answer on its way to a better one."""

    question: Question
    first: str
    answer: str
    revisions: tuple[dict[str, str], ...]

    def revised(self, principle: Principle, critique: str, answer: str) -> _Draft:
        revision = {"principle": principle.name, "critique": critique, "answer": answer}
        return dataclasses.replace(self, answer=answer, revisions=(*self.revisions, revision))

    def row(self) -> dict[str, Any]:
        turns = (*self.question.turns, Message("assistant", self.answer))
        return {
            "messages": _fields(turns),
            "first_answer": self.first,
            "revisions": list(self.revisions),
        }


def _revised(
    judge: Responder,
    drafts: list[tuple[_Draft, Principle]],
    ledger: Ledger,
    keys: jax.Array,
) -> list[_Draft]:
    """One round of critique and revision."""

    def request(draft: _Draft, principle: Principle) -> tuple[Message, ...]:
        answer = Message("assistant", draft.answer)
        return (*draft.question.turns, answer, Message("user", principle.critique))

    critiques = judge.answer([request(*pair) for pair in drafts], keys[0])
    criticised = [
        (*drafts[place], critique)
        for place, (critique,) in ledger.kept([draft.question for draft, _ in drafts], critiques)
    ]
    dialogues = [
        (
            *request(draft, principle),
            Message("assistant", critique),
            Message("user", principle.revision),
        )
        for draft, principle, critique in criticised
    ]
    answers = judge.answer(dialogues, keys[1])
    questions = [draft.question for draft, *_ in criticised]
    return [
        criticised[place][0].revised(*criticised[place][1:], answer)
        for place, (answer,) in ledger.kept(questions, answers)
    ]


def _question(turns: Turns, principle: Principle, first: str, second: str) -> str:
    dialogue = "\n\n".join(f"{turn.role.capitalize()}: {turn.content}" for turn in turns)
    return _QUESTION.format(dialogue=dialogue, first=first, second=second, choice=principle.choice)


def _chunks(questions: Iterable[Question], seed: int) -> Iterator[tuple[list[Question], jax.Array]]:
    """The questions, some at a time, each time with a key of its own."""
    remaining = iter(questions)
    for number in itertools.count():
        chunk = list(itertools.islice(remaining, _CHUNK))
        if not chunk:
            return
        yield chunk, jax.random.fold_in(jax.random.key(seed), number)


def _fields(turns: Turns) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]

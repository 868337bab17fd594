"""The best of several answers to a prompt: which they are, and the data sets that are made of them.

Best-of-N as in Llama 2 (arXiv:2307.09288, section 3.2.3): answers that were chosen before compete
with the new ones, since choosing among the newest alone made its models forget what they could do.
The best and the worst answer to a prompt are a pair for preference learning, as in the rounds of
DPO of Llama 3 (arXiv:2407.21783, section 4.1.4).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax.data.examples import Conversation, Message
from llm_jax.data.formats import read_examples
from llm_jax.data.prompts import Prompt
from llm_jax.data.sources import SourceConfig
from llm_jax.data.template_base import ChatTemplate, assistant_text
from llm_jax.data.tokenizer_base import Tokenizer
from llm_jax.errors import UserError
from llm_jax.json_files import write_json, write_json_lines
from llm_jax.rl.scoring import Sample

SELECTED, PAIRS = "selected", "pairs"


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
    """Which answers are chosen, and with what they compete."""

    keep: int = 1  # of each prompt, the best ones of different texts
    threshold: float | None = None  # those with a lower score are not chosen
    margin: float = 0.0  # by how much the scores of a pair differ at least; 0: by anything
    # Runs of this stage, or folders made by tools.sample, whose chosen answers compete, too.
    earlier: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise UserError(f"config.selection.keep={self.keep} must be at least 1.")
        if not self.margin >= 0:
            raise UserError(f"config.selection.margin={self.margin} must not be negative.")


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a policy said to a prompt. finished: whether it ended by itself. run, step: of the
    policy, as far as they are known."""

    text: str
    finished: bool
    run: str | None
    step: int | None


@dataclasses.dataclass(frozen=True)
class _Candidate:
    sample: Sample
    answer: Answer
    score: float


@dataclasses.dataclass(frozen=True)
class Selection:
    """What was chosen of a round.

    samples: `keep` places for each prompt, the best first, None where fewer were good enough.
    pairs: how many there are. earlier: how many of the samples were chosen before.
    """

    samples: list[Sample | None]
    pairs: int
    earlier: int

    @property
    def chosen(self) -> int:
        return sum(sample is not None for sample in self.samples)


class Selector:
    """Chooses the best answers of each round and keeps them as data sets.

    FOLDER/selected has rows of the format `messages`, FOLDER/pairs of the format `preference`, a
    file for each round, with the scores and the policy that gave the answer. Beside each stands
    what it was made with, such as FOLDER/selected.lineage.json.

    A choice is a function of the round and of what stands in FOLDER for earlier rounds: files of
    later ones, which a run left that was killed, do not count and are written again.
    """

    def __init__(
        self,
        config: SelectionConfig,
        folder: Path,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        lineage: dict[str, Any],
    ):
        """
        Args:
          lineage: JSON-able; what the answers are made with.

        Raises:
          UserError: an earlier run without chosen answers.
        """
        self._config, self._folder = config, folder
        self._template, self._tokenizer = template, tokenizer
        self._lineage = {"selection": dataclasses.asdict(config), **lineage}
        self._known: dict[str, list[Answer]] = {}  # chosen before, by prompt
        self._begun = False
        for run in config.earlier:
            for key, answers in _read_run(run).items():
                self._known.setdefault(key, []).extend(answers)

    def select(
        self,
        number: int,
        prompts: Sequence[Prompt],
        samples: Sequence[Sample],
        score: Callable[[Sequence[Sample]], np.ndarray],
        *,
        run: str,
        step: int,
        length: int,
    ) -> Selection:
        """Chooses, and writes the files of the round.

        Args:
          number: of the round; those of earlier rounds are lower.
          prompts, samples: as many samples of each prompt, prompt by prompt.
          score: the scores of the samples and of further ones, see `trainers.rounds.Round`. Earlier
            answers are scored anew: all are judged alike, and none stays for a lucky score.
          run, step: of the policy.
          length: tokens of prompt and answer at most; longer earlier answers are left out.

        Raises:
          UserError: files of earlier rounds that cannot be read.
        """
        if not self._begun:
            self._begin(number)
        recalled = [self._recall(place, prompt, length) for place, prompt in enumerate(prompts)]
        scores = iter(score([sample for some in recalled for sample, _ in some]).tolist())
        count = len(samples) // len(prompts)
        new = [
            [
                _Candidate(s, Answer(s.completion_text, s.finished, run, step), next(scores))
                for s in samples[place * count : (place + 1) * count]
            ]
            for place in range(len(prompts))
        ]
        old = [[_Candidate(*known, next(scores)) for known in some] for some in recalled]
        best = [self._best([*n, *o]) for n, o in zip(new, old, strict=True)]
        pairs = [self._pair(n, o) for n, o in zip(new, old, strict=True)]
        self._write(number, prompts, best, pairs)
        self._remember(prompts, best)
        keep = self._config.keep
        return Selection(
            [s for some in best for s in [*(c.sample for c in some), *[None] * (keep - len(some))]],
            pairs=sum(pair is not None for pair in pairs),
            earlier=sum(c in o for some, o in zip(best, old, strict=True) for c in some),
        )

    def _best(self, candidates: Iterable[_Candidate]) -> list[_Candidate]:
        """The chosen ones; of equal scores the first, that is, new answers before old ones."""
        lowest = -math.inf if self._config.threshold is None else self._config.threshold
        best: dict[str, _Candidate] = {}
        for candidate in _ranked(candidates):
            if candidate.score >= lowest:
                best.setdefault(candidate.answer.text, candidate)
        return list(best.values())[: self._config.keep]

    def _pair(
        self, new: Sequence[_Candidate], old: Sequence[_Candidate]
    ) -> tuple[_Candidate, _Candidate] | None:
        """The best answer of all and the worst of the new ones, where one is better."""
        every, fresh = _ranked([*new, *old]), _ranked(new)
        if not fresh:
            return None
        best, worst = every[0], fresh[-1]
        difference = best.score - worst.score
        alike = difference <= 0 or best.answer.text == worst.answer.text
        return None if alike or difference < self._config.margin else (best, worst)

    def _begin(self, number: int) -> None:
        """Reads what was chosen in rounds before `number`."""
        for file in sorted((self._folder / SELECTED).glob("[0-9]*.jsonl")):
            if int(file.stem) < number and file.stat().st_size:
                self._known |= _read_answers(file)
        if jax.process_index() == 0:
            for name in (SELECTED, PAIRS):
                (self._folder / name).mkdir(parents=True, exist_ok=True)
                write_json(self._folder / f"{name}.lineage.json", self._lineage)
        self._begun = True

    def _recall(self, place: int, prompt: Prompt, length: int) -> list[tuple[Sample, Answer]]:
        """The answers that were chosen for a prompt before, as the template writes them."""
        found = []
        for answer in self._known.get(_key(prompt.messages, prompt.tools), ()):
            turns = (*prompt.messages, Message("assistant", answer.text))
            rendered = self._template.render(Conversation(turns, prompt.tools), self._tokenizer)
            end = max(place for place, trained in enumerate(rendered.trained) if trained) + 1
            if end <= length:
                ids = rendered.tokens[len(prompt.ids) : end]
                sample = Sample(place, prompt.text, answer.text, prompt.ids, ids, True, prompt.row)
                found.append((sample, answer))
        return found

    def _remember(self, prompts: Sequence[Prompt], best: Sequence[Sequence[_Candidate]]) -> None:
        """What was chosen takes the place of what it has competed with."""
        self._known |= _by_prompt(
            (_key(prompt.messages, prompt.tools), candidate.answer)
            for prompt, some in zip(prompts, best, strict=True)
            for candidate in some
        )

    def _write(
        self,
        number: int,
        prompts: Sequence[Prompt],
        best: Sequence[Sequence[_Candidate]],
        pairs: Sequence[tuple[_Candidate, _Candidate] | None],
    ) -> None:
        if jax.process_index() != 0:
            return
        selected = [
            _row(prompt, candidate)
            for prompt, some in zip(prompts, best, strict=True)
            for candidate in some
        ]
        paired = [_pair_row(p, *pair) for p, pair in zip(prompts, pairs, strict=True) if pair]
        for name, rows in ((SELECTED, selected), (PAIRS, paired)):
            write_json_lines(self._folder / name / f"{number:08}.jsonl", rows)


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


def _ranked(candidates: Iterable[_Candidate]) -> list[_Candidate]:
    """Those that have a score and say something, the best first."""
    known = [c for c in candidates if math.isfinite(c.score) and c.answer.text.strip()]
    return sorted(known, key=lambda candidate: -candidate.score)


def _row(prompt: Prompt, candidate: _Candidate) -> dict[str, Any]:
    turns = [*prompt.messages, Message("assistant", candidate.answer.text)]
    return {
        "messages": [_turn(turn) for turn in turns],
        **_tools(prompt),
        "score": candidate.score,
        "finished": candidate.answer.finished,
        "run": candidate.answer.run,
        "step": candidate.answer.step,
    }


def _pair_row(prompt: Prompt, best: _Candidate, worst: _Candidate) -> dict[str, Any]:
    return {
        "prompt": [_turn(turn) for turn in prompt.messages],
        "chosen": best.answer.text,
        "rejected": worst.answer.text,
        **_tools(prompt),
        "chosen_score": best.score,
        "rejected_score": worst.score,
        "run": worst.answer.run,
        "step": worst.answer.step,
    }


def _tools(prompt: Prompt) -> dict[str, Any]:
    return {"tools": list(prompt.tools)} if prompt.tools else {}


def _turn(turn: Message) -> dict[str, Any]:
    """The fields that say something, as rows have them."""
    fields = {"role": turn.role, "content": turn.content, "tool_calls": list(turn.tool_calls),
              "name": turn.name}  # fmt: skip
    return {name: value for name, value in fields.items() if value or name == "content"}


def _key(messages: Iterable[Message], tools: Iterable[dict[str, Any]]) -> str:
    """What tells prompts apart, whichever run and tokenizer."""
    return json.dumps([[_turn(turn) for turn in messages], list(tools)], sort_keys=True)


def _read_run(run: str) -> dict[str, list[Answer]]:
    if not (Path(run) / SELECTED).is_dir():
        raise UserError(
            f"config.selection.earlier: {run} has no folder {SELECTED!r}: name a run of "
            "configs/rejection_sampling.py, or what tools.sample wrote."
        )
    return _read_answers(Path(run) / SELECTED)


def _read_answers(source: Path) -> dict[str, list[Answer]]:
    """The last turns of the conversations of a file or folder, by prompt."""

    def pairs() -> Iterator[tuple[str, Answer]]:
        for example in read_examples(SourceConfig(source=str(source)), "messages"):
            assert isinstance(example, Conversation)
            *prompt, last = example.messages
            text, row = assistant_text(last), example.row
            answer = Answer(text, row.get("finished", True), row.get("run"), row.get("step"))
            yield _key(prompt, example.tools), answer

    return _by_prompt(pairs())


def _by_prompt(pairs: Iterable[tuple[str, Answer]]) -> dict[str, list[Answer]]:
    """Those that may come back: not what was cut off, since the template would end it."""
    known: dict[str, list[Answer]] = {}
    for key, answer in pairs:
        if answer.finished:
            known.setdefault(key, []).append(answer)
    return known

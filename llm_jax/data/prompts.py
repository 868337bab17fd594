"""Prompts for the stages that sample answers: which there are, and which of them a round takes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from llm_jax.data.documents import split_hash
from llm_jax.data.example_store import ExampleConfig
from llm_jax.data.examples import Comparison, Example, Message, as_conversation, split_text
from llm_jax.data.formats import read_examples
from llm_jax.data.sources import ReadCounts, nothing_read
from llm_jax.data.template_base import ChatTemplate, assistant_text
from llm_jax.data.tokenizer_base import Tokenizer
from llm_jax.errors import UserError

ANSWER = "answer"  # the field under which reward functions find the reference answer


@dataclasses.dataclass(frozen=True)
class PromptDataConfig(ExampleConfig):
    """The prompts: rows of any format of examples, or of prompts alone."""

    source: str = "arithmetic:addition"
    template: str | None = None  # as for fine-tuning; None: that of the stage before, or "chatml"
    validation_fraction: float = 0.05  # of the prompts, chosen by their hash as for fine-tuning


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What an answer is sampled to, and all that is known of a good one.

    ids: the tokens up to where the answer begins. messages: its turns. text: what they say, with
    blank lines between them. answer: the reference answer, or None. row: the fields of the source's
    row, and the reference answer as `ANSWER` where the row has no value of that name. tools: JSON
    descriptions of the functions that the answer may call.
    """

    ids: tuple[int, ...]
    text: str
    messages: tuple[Message, ...]
    answer: str | None
    row: Mapping[str, Any]
    tools: tuple[dict[str, Any], ...] = ()


class PromptData:
    """The prompts of a data config, in memory, and the order in which training takes them.

    Attributes:
      train, validation: the prompts by split; the same prompts are held out as in fine-tuning on
        the source at the same fraction.
      too_long: prompts left out because they are longer than the limit.
      counts: what reading the source met; `empty` counts the examples that ask nothing, too.
      fingerprint: a hash of all prompts in their order, with their rows.
    """

    def __init__(
        self,
        config: PromptDataConfig,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        *,
        longest: int,
        seed: int,
    ):
        """Reads and renders the prompts.

        Args:
          longest: tokens of a prompt at most, such that its answer has room.
          seed: non-negative; another seed gives another order.

        Raises:
          UserError: a source that cannot be read; a fraction outside (0, 1); no prompt left to
            train on or to hold out.
        """
        if not 0 < config.validation_fraction < 1:
            raise UserError(
                f"validation_fraction={config.validation_fraction} is not between 0 and 1."
            )
        self._seed = seed
        self.counts, self.too_long = ReadCounts(), 0
        prompts, hashes = [], []
        for example in self._asking(config):
            prompt = _prompt(example, template, tokenizer)
            if len(prompt.ids) > longest:
                self.too_long += 1
            else:
                prompts.append(prompt)
                hashes.append(split_hash(split_text(example)))
        if not prompts:
            raise self._nothing_left(config, longest)
        is_held_out = _held_out(np.asarray(hashes), config)
        pairs = list(zip(prompts, is_held_out, strict=True))
        self.train = tuple(prompt for prompt, held_out in pairs if not held_out)
        self.validation = tuple(prompt for prompt, held_out in pairs if held_out)
        self.fingerprint = _fingerprint(self.train, self.validation)

    def take(self, cursor: int, size: int) -> list[Prompt]:
        """The `size` prompts of `train` that come after the first `cursor` ones.

        Their order is a function of the seed. It goes through all prompts once an epoch, in another
        order each time, whatever the sizes in which they are taken.
        """
        epochs, places = np.divmod(np.arange(cursor, cursor + size), len(self.train))
        orders = {
            int(epoch): np.random.default_rng([self._seed, int(epoch)]).permutation(len(self.train))
            for epoch in np.unique(epochs)
        }
        pairs = zip(epochs.tolist(), places.tolist(), strict=True)
        return [self.train[orders[epoch][place]] for epoch, place in pairs]

    def describe(self) -> str:
        """One line: what was read, and what was not."""
        text = f"{len(self.train):,} prompts, {len(self.validation):,} held out"
        if self.too_long:
            text += f", {self.too_long:,} longer than the limit left out"
        if self.counts.skipped:
            text += f", {self.counts.skipped:,} malformed rows skipped"
        if self.counts.empty:
            text += f", {self.counts.empty:,} rows of no use left out"
        return text

    def _asking(self, config: PromptDataConfig) -> Iterator[Example]:
        """The examples that have a prompt; a text to continue has none."""
        for example in read_examples(config.records, config.format, self.counts):
            if split_prompt(example)[0]:
                yield example
            else:
                self.counts.empty += 1

    def _nothing_left(self, config: PromptDataConfig, longest: int) -> UserError:
        if not self.too_long:
            return nothing_read("prompt", config.records, self.counts)
        return UserError(
            f"source={config.source!r}: all {self.too_long} prompts are longer than the {longest} "
            "tokens that answers leave: give phases a greater length, or answers fewer tokens."
        )


def split_prompt(example: Example) -> tuple[tuple[Message, ...], str | None]:
    """The turns before the last answer, and that answer, or None where there is no good one."""
    conversation = as_conversation(example)
    if conversation is None:
        assert isinstance(example, Comparison)
        return example.prompt, None
    turns = conversation.messages
    last = max(index for index, turn in enumerate(turns) if turn.role == "assistant")
    return turns[:last], assistant_text(turns[last])


def _prompt(example: Example, template: ChatTemplate, tokenizer: Tokenizer) -> Prompt:
    turns, answer = split_prompt(example)
    row = dict(example.row)
    if answer is not None and row.get(ANSWER) is None:
        row[ANSWER] = answer
    return Prompt(
        ids=tuple(template.render_prompt(turns, example.tools, tokenizer)),
        text="\n\n".join(turn.content for turn in turns),
        messages=turns,
        answer=answer,
        row=row,
        tools=example.tools,
    )


def _held_out(hashes: np.ndarray, config: PromptDataConfig) -> np.ndarray:
    """bool [prompts]: those of the smallest hash where none is below the fraction."""
    below = hashes < config.validation_fraction
    is_held_out = below if below.any() else hashes == hashes.min()
    if is_held_out.all():
        raise UserError(
            f"source={config.source!r} leaves no prompt to train on beside those held out "
            f"({len(hashes)}): give more prompts, or lower "
            f"validation_fraction={config.validation_fraction}."
        )
    return is_held_out


def _fingerprint(*splits: tuple[Prompt, ...]) -> str:
    # What JSON lacks (dates, images) counts by its type: a value's repr may hold its address.
    hash_ = hashlib.sha256()
    for split in splits:
        for prompt in split:
            fields = [prompt.ids, prompt.text, prompt.answer, dict(prompt.row)]
            line = json.dumps(fields, sort_keys=True, default=lambda v: type(v).__name__)
            hash_.update(f"{line}\n".encode())
        hash_.update(b"\n")
    return hash_.hexdigest()[:16]

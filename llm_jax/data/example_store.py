"""Examples rendered once by a chat template and kept as token stores."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from llm_jax.data.documents import split_hash
from llm_jax.data.examples import (
    Comparison,
    Conversation,
    Example,
    Message,
    as_conversation,
    split_text,
)
from llm_jax.data.formats import read_examples
from llm_jax.data.sources import ReadCounts, SourceConfig, source_identity
from llm_jax.data.store import TokenStore, build_stores, in_batches
from llm_jax.data.store_writer import Entry
from llm_jax.data.template_base import ChatTemplate
from llm_jax.data.tokenizer_base import Tokenizer
from llm_jax.errors import UserError

RENDERING_VERSION = 2  # part of every cache key: raise it when equal examples give other tokens

# By how much the better answer of a comparison is better (Llama 2, arXiv:2307.09288, table 27),
# from most to least; a store holds the index, or -1 where the data does not say.
STRENGTHS = ("significantly better", "better", "slightly better", "negligibly better")


@dataclasses.dataclass(frozen=True)
class ExampleConfig:
    """Which examples.

    source: "stdlib:NAME" (the embedded ones, with the names of `stdlib_examples.EXAMPLES`);
      "arithmetic:TASK" (sums and the like, see `arithmetic`); a file, a folder, a glob pattern,
      "hf:NAME" or a saved dataset, as for pre-training.
    format: of the rows, see `formats.FORMATS`; None: told by the fields of the first row.
    file_format: "text", "jsonl", "parquet" or "array_record"; None goes by the file's extension.
    split: the split of a Hugging Face dataset.
    malformed: whether a bad row (an empty answer, roles out of order, ...) ends the run or is
      skipped and counted.
    """

    source: str
    format: str | None = None
    file_format: str | None = None
    split: str = "train"
    malformed: Literal["error", "skip"] = "error"

    @property
    def records(self) -> SourceConfig:
        """Where the rows come from."""
        return SourceConfig(
            source=self.source,
            format=self.file_format,
            split=self.split,
            malformed=self.malformed,
        )


def conversation_stores(
    config: ExampleConfig,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    *,
    validation_fraction: float,
    cache_dir: str | None,
) -> dict[str, TokenStore]:
    """A document for every conversation; a comparison counts as one with its best answer.

    Raises:
      UserError: see `read_examples` and `build_stores`; a row without an answer.
    """

    def entries(counts: ReadCounts) -> Iterator[Entry]:
        examples = _answered(config, counts)
        for batch in in_batches(examples, _characters):
            pairs = [(e, c) for e in batch if (c := as_conversation(e)) is not None]
            counts.empty += len(batch) - len(pairs)
            rendered = template.render_batch([c for _, c in pairs], tokenizer)
            for (example, conversation), row in zip(pairs, rendered, strict=True):
                yield Entry(
                    row.tokens,
                    split_hash(split_text(example)),
                    _bytes(conversation),
                    trained=row.trained,
                )

    return build_stores(
        entries,
        identity=_identity(config, template, "conversations"),
        source=config.source,
        tokenizer=tokenizer,
        validation_fraction=validation_fraction,
        cache_dir=cache_dir,
        masked=True,
    )


def comparison_stores(
    config: ExampleConfig,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    *,
    validation_fraction: float,
    cache_dir: str | None,
) -> dict[str, TokenStore]:
    """A document for every answer of every comparison, those of one comparison in a row.

    Its columns: "group" (int64, the number of the comparison), "prompt" (int64, a hash of its
    prompt), "score" (float32), "strength" (int8, an index of `STRENGTHS` or -1). Only the answer is
    trained on, not earlier turns.

    Raises:
      UserError: see `read_examples` and `build_stores`; a row that is no comparison, or that has
        no answer; a strength that is none of `STRENGTHS`.
    """

    def entries(counts: ReadCounts) -> Iterator[Entry]:
        number = 0
        examples = _answered(config, counts)
        for batch in in_batches(examples, _characters):
            answers = [
                _Answer(number + index, comparison, response, score)
                for index, comparison in enumerate(_comparison(e, config) for e in batch)
                for response, score in zip(comparison.responses, comparison.scores, strict=True)
            ]
            number += len(batch)
            conversations = [answer.conversation for answer in answers]
            rendered = template.render_batch(conversations, tokenizer)
            for answer, conversation, row in zip(answers, conversations, rendered, strict=True):
                yield Entry(
                    row.tokens,
                    split_hash(split_text(answer.comparison)),
                    _bytes(conversation),
                    trained=row.trained,
                    numbers={
                        "group": answer.group,
                        "prompt": _prompt_hash(answer.comparison),
                        "score": answer.score,
                        "strength": _strength(answer.comparison),
                    },
                )

    return build_stores(
        entries,
        identity=_identity(config, template, "comparisons"),
        source=config.source,
        tokenizer=tokenizer,
        validation_fraction=validation_fraction,
        cache_dir=cache_dir,
        masked=True,
        columns={"group": "int64", "prompt": "int64", "score": "float32", "strength": "int8"},
    )


@dataclasses.dataclass(frozen=True)
class _Answer:
    """One answer of the comparison with number `group`."""

    group: int
    comparison: Comparison
    response: tuple[Message, ...]
    score: float

    @property
    def conversation(self) -> Conversation:
        """Prompt and answer, of which only the answer is trained on."""
        comparison = self.comparison
        prompt = tuple(dataclasses.replace(message, trained=False) for message in comparison.prompt)
        return Conversation((*prompt, *self.response), comparison.tools, comparison.where)


def texts_of(config: ExampleConfig) -> Iterator[str]:
    """The texts of the examples, for training a tokenizer on."""
    for example in read_examples(config.records, config.format):
        conversations = (
            [example.prompt, *example.responses]
            if isinstance(example, Comparison)
            else [example.messages]
        )
        for messages in conversations:
            yield from (message.content for message in messages if message.content)


def _identity(config: ExampleConfig, template: ChatTemplate, kind: str) -> dict[str, object]:
    return {
        "rendering": RENDERING_VERSION,
        "kind": kind,
        "source": source_identity(config.records),
        "format": config.format,
        "template": template.describe(),
    }


def _answered(config: ExampleConfig, counts: ReadCounts) -> Iterator[Example]:
    """The examples of a source, all of which must have answers."""
    for example in read_examples(config.records, config.format, counts):
        if isinstance(example, Comparison) and not example.responses:
            raise UserError(
                f"{example.where}: the row is a prompt without an answer to learn from: give its "
                "answer, or train on it with a stage that samples answers."
            )
        yield example


def _comparison(example: Example, config: ExampleConfig) -> Comparison:
    if isinstance(example, Comparison):
        return example
    raise UserError(
        f"{example.where}: the row is a conversation, and this stage compares answers: give rows "
        f"with chosen and rejected, ranked responses, or completion and label."
    )


def _prompt_hash(comparison: Comparison) -> int:
    """A whole number below 2**48, which a float holds exactly."""
    turns = "\0".join(f"{message.role}\0{message.content}" for message in comparison.prompt)
    return int(split_hash(turns) * 2**48)


def _strength(comparison: Comparison) -> int:
    if comparison.strength is None:
        return -1
    name = comparison.strength.lower().replace("_", " ").strip()
    for index, known in enumerate(STRENGTHS):
        if name in (known, known.removesuffix(" better"), str(len(STRENGTHS) - 1 - index)):
            return index
    raise UserError(
        f"{comparison.where}: strength {comparison.strength!r} is not one of "
        f"{', '.join(STRENGTHS)} (3, 2, 1, 0): mend it, or leave the field out."
    )


def _characters(example: Example) -> int:
    """Roughly how much text an example holds."""
    if isinstance(example, Comparison):
        prompt = sum(len(message.content) for message in example.prompt)
        return sum(prompt + sum(len(m.content) for m in r) for r in example.responses)
    return sum(len(message.content) for message in example.messages)


def _bytes(conversation: Conversation) -> int:
    return sum(len(message.content.encode("utf-8")) for message in conversation.messages)

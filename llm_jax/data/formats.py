"""The formats in which rows of data sets hold examples: their table, detection and reading."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from llm_jax.data import parsers
from llm_jax.data.examples import (
    Comparison,
    Conversation,
    Example,
    MalformedExample,
    check_messages,
)
from llm_jax.data.fields import Fields, has, optional_text
from llm_jax.data.readers import Malformed
from llm_jax.data.sources import (
    ReadCounts,
    SourceConfig,
    count_malformed,
    nothing_read,
    read_records,
)
from llm_jax.data.transcripts import is_transcript, is_tree, join_trees, tools_of
from llm_jax.errors import UserError, did_you_mean

__all__ = ["FORMATS", "Format", "detect", "parse", "read_examples"]

_SHOWN = 200  # characters of a row in a message


@dataclasses.dataclass(frozen=True)
class Format:
    """How rows hold examples.

    kind: what a row becomes. fields: those that mark the format, all of them; "a|b" is either.
    parse: a row's examples, see `parsers`. optional: further fields that are read. fits: what the
    values of the row must be on top, for formats that share their fields' names.
    """

    kind: Literal["conversation", "comparison"]
    fields: tuple[str, ...]
    parse: Callable[[Fields], Sequence[Example]]
    optional: tuple[str, ...] = ()
    fits: Callable[[Fields], bool] = lambda fields: True


def _are_transcripts(fields: Fields) -> bool:
    return not has(fields, "prompt") and is_transcript(fields["chosen"])


def _are_ranked(fields: Fields) -> bool:
    if "ranks" in fields or "scores" in fields:
        return True
    answers = fields.get("completions")
    return isinstance(answers, list) and all(
        isinstance(a, dict) and "overall_score" in a for a in answers
    )


def _are_solutions(fields: Fields) -> bool:
    return any(map(parsers.is_solution, fields.values()))


# The first that fits a row is its format. So those with more fields come before those with fewer,
# and comparisons before conversations: a data set of pairs may give the best dialogue on top.
FORMATS: dict[str, Format] = {
    "gsm8k_solutions": Format(
        "comparison", ("question", "ground_truth"), parsers.gsm8k_solutions, fits=_are_solutions
    ),
    "hh_rlhf": Format(
        "comparison",
        ("chosen", "rejected"),
        parsers.hh_rlhf,
        optional=(parsers.STRENGTH,),
        fits=_are_transcripts,
    ),
    "preference": Format(
        "comparison",
        ("chosen", "rejected"),
        parsers.preference,
        optional=("prompt", parsers.STRENGTH, "tools"),
    ),
    "ranked": Format(
        "comparison",
        ("prompt|instruction", parsers.ANSWERS),
        parsers.ranked,
        optional=("ranks", "scores", parsers.STRENGTH, "tools"),
        fits=_are_ranked,
    ),
    "unpaired": Format(
        "comparison",
        ("prompt", "completion", "label"),
        parsers.unpaired,
        optional=("tools",),
    ),
    "openassistant": Format(
        "conversation", ("prompt|message_tree_id",), parsers.openassistant, fits=is_tree
    ),
    "messages": Format("conversation", ("messages",), parsers.messages, optional=("tools",)),
    "sharegpt": Format(
        "conversation", ("conversations",), parsers.sharegpt, optional=("system", "tools")
    ),
    "self_instruct": Format("conversation", ("instruction", "instances"), parsers.self_instruct),
    "alpaca": Format(
        "conversation", ("instruction", "output"), parsers.alpaca, optional=("input",)
    ),
    "dolly": Format(
        "conversation", ("instruction", "response"), parsers.dolly, optional=("context",)
    ),
    "openorca": Format("conversation", ("system_prompt", "question", "response"), parsers.openorca),
    "flan": Format("conversation", ("inputs", "targets"), parsers.flan),
    "prompt_completion": Format(
        "conversation",
        ("prompt", "completion|response"),
        parsers.prompt_completion,
        optional=("tools",),
    ),
    "gsm8k": Format("conversation", ("question", "answer"), parsers.gsm8k),
    "text": Format("conversation", ("text",), parsers.text),
    # Prompts alone, to which an on-policy stage makes the answers.
    "prompt": Format(
        "comparison", ("prompt|question|problem",), parsers.prompt, optional=("tools",)
    ),
}


def detect(fields: Fields, where: str) -> str:
    """The name of the format that a row's fields mark.

    Raises:
      UserError: no format fits.
    """
    try:
        return _fitting(fields)
    except MalformedExample as error:
        raise UserError(f"{where}: {error}; the row is {_excerpt(fields)}.") from None


def parse(fields: Fields, format_name: str, where: str) -> list[Example]:
    """The examples of a row, none where it teaches nothing.

    Any row may have the field "split_text", which decides the examples' side of the split.

    Raises:
      MalformedExample: the row does not hold what the format wants.
      UserError: no such format.
    """
    format = _known(format_name)
    common: dict[str, Any] = {"where": where, "row": fields}
    if "tools" in format.optional and has(fields, "tools"):
        common["tools"] = tools_of(fields["tools"])
    if has(fields, "split_text"):
        common["split_text"] = optional_text(fields, "split_text")
    examples = [dataclasses.replace(example, **common) for example in format.parse(fields)]
    for example in examples:
        _check(example)
    return examples


def read_examples(
    source: SourceConfig, format: str | None = None, counts: ReadCounts | None = None
) -> Iterator[Example]:
    """Streams the examples of a source.

    Args:
      source: where the rows are.
      format: a key of FORMATS; None takes that which the first good row fits, for all rows.
      counts: filled while reading.

    Raises:
      UserError: no such source or format; a file that cannot be read; a malformed row, unless the
        source skips those; a source without any example. It is raised while reading.
    """
    counts = ReadCounts() if counts is None else counts
    rows = read_records(source)
    if format in (None, "openassistant"):
        rows = join_trees(rows)
    for row in rows:
        if isinstance(row, Malformed):
            count_malformed(row, source, counts)
            continue
        try:
            found = format or _fitting(row.fields)
            examples = parse(row.fields, found, row.where)
        except MalformedExample as error:
            why = f"{error}; the row is {_excerpt(row.fields)}"
            count_malformed(Malformed(row.where, why), source, counts)
            continue
        format = found
        counts.documents += len(examples)
        counts.empty += not examples
        yield from examples
    if not counts.documents:
        raise nothing_read("example", source, counts)


def _known(name: str) -> Format:
    if name not in FORMATS:
        raise UserError(f"the format {name!r} of examples is unknown.{did_you_mean(name, FORMATS)}")
    return FORMATS[name]


def _fitting(fields: Fields) -> str:
    for name, format in FORMATS.items():
        if all(_any_of(fields, names) for names in format.fields) and format.fits(fields):
            return name
    known = ", ".join(f"{name} ({', '.join(f.fields)})" for name, f in FORMATS.items())
    raise MalformedExample(f"the fields are those of no known format, which are {known}")


def _any_of(fields: Fields, names: str) -> bool:
    return any(name in fields for name in names.split("|"))


def _excerpt(fields: Fields) -> str:
    """The row on one line, shortened; fit to be printed whatever it holds."""
    row = json.dumps(fields, ensure_ascii=False, default=repr)
    row = row.encode("utf-8", "backslashreplace").decode("utf-8")
    return row if len(row) <= _SHOWN else f"{row[:_SHOWN]}…"


def _check(example: Example) -> None:
    if isinstance(example, Conversation):
        check_messages(example.messages)
        if not any(m.role == "assistant" and m.trained for m in example.messages):
            raise MalformedExample("there is no assistant's turn to learn from")
    else:
        _check_answers(example)


def _check_answers(example: Comparison) -> None:
    if not example.responses:
        check_messages(example.prompt)
        if (role := example.prompt[-1].role) not in ("user", "tool"):
            raise MalformedExample(f"the prompt ends with role {role!r}, so nothing is asked")
    scores: dict[str, float] = {}
    for number, (response, score) in enumerate(
        zip(example.responses, example.scores, strict=True), start=1
    ):
        if response[0].role != "assistant":
            raise MalformedExample(f"answer {number} does not start with the assistant's turn")
        try:
            check_messages(example.prompt + response)
        except MalformedExample as error:
            raise MalformedExample(f"answer {number}: {error}") from None
        if scores.setdefault(repr(response), score) != score:
            raise MalformedExample(f"answer {number} equals another one of a different score")

"""Scores texts with a trained model: log-probabilities of their tokens, or rewards.

    python -m tools.score --workdir=RUN[@STEP] --input=F.jsonl --output=G.jsonl [--batch=16]

Each line of the input is an object with one of

    {"text": ...}                       every token of a document, from its first one on; without
                                        the first where the tokenizer puts no bos before a document,
                                        since nothing stands before it: it is context, not scored
    {"tokens": [...]}                   every token but the first, which nothing stands before
    {"prompt": ..., "completion": ...}  the completion's tokens; an exchange where the run has a
                                        chat template, plain text where it has none
    {"messages": [...]}                 the assistant's tokens, as fine-tuning counts them

and gives a line {"tokens": [...], "logprobs": [...], "sum": ...} of what is scored, in nats, or,
where the run is a reward model, {"reward": ...} of the whole.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from llm_jax.errors import UserError
from tools.cli import require, run_tool

if TYPE_CHECKING:
    import numpy as np

    from llm_jax.runs import LoadedRun
    from llm_jax.types import Batch


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string(
        "workdir", None, "run directory; RUN@STEP for an older checkpoint", flag_values=values
    )
    flags.DEFINE_string("input", None, "JSON lines to score", flag_values=values)
    flags.DEFINE_string("output", None, "where the JSON lines of scores go", flag_values=values)
    flags.DEFINE_integer("batch", 16, "rows at once", flag_values=values)
    return values


def main(values: flags.FlagValues) -> None:
    require(values, "workdir", "input", "output")
    if values.batch < 1:
        raise UserError(f"--batch={values.batch} must be at least 1.")
    import jax

    from llm_jax.compilation import use_compilation_cache
    from llm_jax.json_files import write_json_lines
    from llm_jax.runs import load_run

    if not Path(values.input).is_file():
        raise UserError(f"--input={values.input} does not exist.")
    use_compilation_cache()
    run = load_run(values.workdir)
    sequences = (encode(run, row, where) for where, row in _read(Path(values.input)))
    with jax.set_mesh(run.mesh):
        count = write_json_lines(Path(values.output), score(run, sequences, values.batch))
    print(f"{count:,} rows scored by {run.path}, checkpoint {run.step}", file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class Scored:
    """A row as tokens. scored: for each of them whether its log-probability is wanted."""

    tokens: list[int]
    scored: list[bool]


def encode(run: LoadedRun, row: dict[str, Any], where: str) -> Scored:
    """The tokens of a row, and which of them are scored.

    Raises:
      UserError: a row of no known form, or one that the model cannot read.
    """
    sequence = _encode(run, row, where)
    vocab_size, limit = run.model.config.vocab_size or 0, run.model.config.max_length
    if not 1 < len(sequence.tokens) <= limit:
        raise UserError(
            f"{where}: {len(sequence.tokens)} tokens, and the model reads 2 to {limit}: leave the "
            "row out, or shorten it."
        )
    if not all(0 <= token < vocab_size for token in sequence.tokens):
        raise UserError(f"{where}: a token is outside the vocabulary of {vocab_size}.")
    return sequence


def _encode(run: LoadedRun, row: dict[str, Any], where: str) -> Scored:
    from llm_jax.generation.generate import document_prompt

    tokenizer = run.tokenizer
    if "text" in row:
        tokens = [*tokenizer.document_start, *tokenizer.encode(_string(row, "text", where))]
        return Scored(tokens, [False, *[True] * (len(tokens) - 1)])
    if "tokens" in row:
        tokens = row["tokens"]
        if not (isinstance(tokens, list) and all(type(token) is int for token in tokens)):
            raise UserError(f"{where}: 'tokens' is no list of whole numbers.")
        return Scored(tokens, [False, *[True] * (len(tokens) - 1)])
    if "messages" not in row and not ("prompt" in row and "completion" in row):
        raise UserError(
            f"{where}: the row has the fields {', '.join(row) or 'none'}; text, tokens, messages, "
            "or prompt and completion are wanted."
        )
    if "template" not in run.meta:
        if "messages" in row:
            raise UserError(
                f"{where}: {run.path} has no chat template, since it is not fine-tuned: score "
                "text, tokens, or prompt and completion."
            )
        prompt, completion = (_string(row, name, where) for name in ("prompt", "completion"))
        context = document_prompt(tokenizer, prompt)
        ids = tokenizer.encode(completion, "after_text" if prompt else "start")
        return Scored(context + ids, [False] * len(context) + [True] * len(ids))
    return _rendered(run, row, where)


def _rendered(run: LoadedRun, row: dict[str, Any], where: str) -> Scored:
    from llm_jax.data.examples import Conversation, MalformedExample
    from llm_jax.data.formats import parse
    from llm_jax.data.templates import load_template

    format = "messages" if "messages" in row else "prompt_completion"
    try:
        (conversation,) = parse(row, format, where)
    except MalformedExample as error:
        raise UserError(f"{where}: {error}.") from error
    assert isinstance(conversation, Conversation)
    rendered = load_template(run.meta["template"]).render(conversation, run.tokenizer)
    return Scored(rendered.tokens, rendered.trained)


def score(run: LoadedRun, sequences: Iterator[Scored], batch_size: int) -> Iterator[dict[str, Any]]:
    """The output of each sequence, in order."""
    from llm_jax.models.heads import REWARD

    is_reward = REWARD in run.meta.get("heads", ())
    compute = _rewards(run) if is_reward else _logprobs(run)
    while part := list(itertools.islice(sequences, batch_size)):
        values = compute(_batch(part, batch_size))
        for row, sequence in zip(values, part, strict=False):
            if is_reward:
                yield {"reward": float(row)}
                continue
            places = [i for i, scored in enumerate(sequence.scored) if scored and i > 0]
            logprobs = [float(row[i - 1]) for i in places]
            tokens = [sequence.tokens[i] for i in places]
            yield {"tokens": tokens, "logprobs": logprobs, "sum": sum(logprobs)}


def _rewards(run: LoadedRun) -> Callable[[Batch], np.ndarray]:
    import jax
    import numpy as np

    from llm_jax.models.heads import rewards

    compute = jax.jit(functools.partial(rewards, run.model))
    return lambda batch: np.asarray(compute(run.params, batch))


def _logprobs(run: LoadedRun) -> Callable[[Batch], np.ndarray]:
    import jax
    import numpy as np

    from llm_jax.objectives.lm import token_nats

    compute = jax.jit(functools.partial(token_nats, run.model, chunk=512))
    return lambda batch: -np.asarray(compute(run.params, batch))


def _batch(sequences: Sequence[Scored], rows: int) -> Batch:
    """Sequences padded to a power of two, so that few lengths compile, and empty rows to `rows`."""
    from llm_jax.evals.batching import sequence_batch

    longest = max(len(sequence.tokens) for sequence in sequences)
    tokens = [sequence.tokens for sequence in sequences] + [[]] * (rows - len(sequences))
    return sequence_batch(tokens, max(32, 1 << (longest - 1).bit_length()))


def _read(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row with its place."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:
                raise UserError(f"{path}:{number}: the line is not JSON ({error}).") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: an object with fields is wanted.")
            yield f"{path}:{number}", row


def _string(row: dict[str, Any], name: str, where: str) -> str:
    if not isinstance(row[name], str):
        raise UserError(f"{where}: {name!r} is no string.")
    try:
        row[name].encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair
        raise UserError(f"{where}: {name!r} is not Unicode text ({error}).") from error
    return row[name]


if __name__ == "__main__":
    sys.exit(run_tool(main, define_flags(), __doc__ or ""))

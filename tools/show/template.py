"""Shows examples as a chat template writes them, and which of their tokens are trained.

    python -m tools.show template --data=FILE [--template=chatml] [--tokenizer=PATH | --workdir=RUN]

Trained tokens are coloured on a terminal, and stand in ⟦⟧ elsewhere or where NO_COLOR is set.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from llm_jax.data.examples import Conversation, Example
from llm_jax.data.formats import read_examples
from llm_jax.data.sources import SourceConfig
from llm_jax.data.templates import (
    DEFAULT_TEMPLATE,
    ChatTemplate,
    Rendered,
    load_template,
    make_template,
)
from llm_jax.data.tokenizers import Tokenizer, TokenizerConfig, make_tokenizer
from llm_jax.errors import UserError
from tools.show.text import make_console, print_tokens, visible


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string("data", None, "file, folder or other source", flag_values=values)
    flags.DEFINE_string(
        "format", None, "format of the examples; absent = the one they fit", flag_values=values
    )
    flags.DEFINE_string(
        "template",
        None,
        "chat template: a name, a Jinja file, or a folder; absent = that of the run, or chatml",
        flag_values=values,
    )
    flags.DEFINE_string(
        "tokenizer", None, "path of a tokenizer or run; absent = bytes", flag_values=values
    )
    flags.DEFINE_string(
        "workdir", None, "run whose tokenizer and template are taken", flag_values=values
    )
    flags.DEFINE_integer("rows", 3, "examples to show", flag_values=values)
    return values


def main(values: flags.FlagValues) -> None:
    _check(values)
    template, tokenizer = _template(values), _tokenizer(values)
    examples = read_examples(SourceConfig(source=values.data), values.format)
    console = make_console()
    shown = []
    for number, example in enumerate(itertools.islice(examples, values.rows), start=1):
        parts = _parts(example, template, tokenizer)
        rendered = [part for _, part in parts]
        shown += rendered
        print(f"example {number}, {visible(example.where)}: {_count(rendered)}", flush=True)
        for title, part in parts:
            if title:
                print(f"{title}:")
            print_tokens(console, part.tokens, part.trained, tokenizer)
        print(flush=True)
    print(f"together: {_count(shown)}")


def _check(values: flags.FlagValues) -> None:
    """Refuses what can be refused before anything is read."""
    if not values.data:
        raise UserError("--data is required, for example --data=chats.jsonl.")
    if values.rows < 1:
        raise UserError(f"--rows={values.rows} must be at least 1.")
    if values.tokenizer and values.workdir:
        raise UserError("--tokenizer and --workdir both name a tokenizer: give one of them.")


def _template(values: flags.FlagValues) -> ChatTemplate:
    if values.template is None and values.workdir is not None:
        from llm_jax import checkpoint

        meta = checkpoint.read_meta(*checkpoint.locate(values.workdir))
        if "template" in meta:
            return load_template(meta["template"])
    return make_template(values.template or DEFAULT_TEMPLATE)


def _tokenizer(values: flags.FlagValues) -> Tokenizer:
    path = values.tokenizer or values.workdir or "bytes"
    if path != "bytes" and not Path(path).expanduser().exists():
        path = path.partition("@")[0]  # the steps of a run share its tokenizer
    return make_tokenizer(TokenizerConfig(path=path), lambda: ())


def _parts(
    example: Example, template: ChatTemplate, tokenizer: Tokenizer
) -> list[tuple[str, Rendered]]:
    """The tokens of an example with a title; those of a comparison are its prompt, its answers."""
    if isinstance(example, Conversation):
        return [("", template.render(example, tokenizer))]
    prompt = template.render_prompt(example.prompt, example.tools, tokenizer)
    parts = [("prompt", Rendered(prompt, [False] * len(prompt)))]
    for number, (response, score) in enumerate(
        zip(example.responses, example.scores, strict=True), start=1
    ):
        whole = Conversation(example.prompt + response, example.tools, example.where)
        rendered = template.render(whole, tokenizer)
        answer = Rendered(rendered.tokens[len(prompt) :], rendered.trained[len(prompt) :])
        parts.append((f"answer {number}, score {score:g}", answer))
    return parts


def _count(parts: Sequence[Rendered]) -> str:
    tokens = sum(len(part.tokens) for part in parts)
    trained = sum(sum(part.trained) for part in parts)
    return f"{tokens} tokens, {trained} trained ({trained / max(1, tokens):.1%})"

"""Shows examples as a chat template writes them, and which of their tokens are trained.

    python -m tools.show --data=FILE [--template=chatml] [--tokenizer=PATH | --workdir=RUN]

Trained tokens are coloured on a terminal, and stand in ⟦⟧ elsewhere or where NO_COLOR is set.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.text import Text

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
from tools.cli import run_tool

TRAINED, SPECIAL = "green", "bold"
# An escape sequence in an example must not command the terminal; its signs are shown instead.
_VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_VISIBLE |= dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)


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
    # Rich knows of NO_COLOR, FORCE_COLOR and dumb terminals.
    console = Console(highlight=False, soft_wrap=True)
    is_coloured = console.color_system is not None and not console.no_color
    shown = []
    for number, example in enumerate(itertools.islice(examples, values.rows), start=1):
        parts = _parts(example, template, tokenizer)
        rendered = [part for _, part in parts]
        shown += rendered
        print(f"example {number}, {_visible(example.where)}: {_count(rendered)}", flush=True)
        for title, part in parts:
            if title:
                print(f"{title}:")
            runs = _runs(part, tokenizer)
            if is_coloured:
                console.print(Text.assemble(*_coloured(runs)))
            else:
                print(_marked(runs))
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


@dataclasses.dataclass(frozen=True)
class _Run:
    """Neighbouring tokens of one kind, as text."""

    text: str
    trained: bool
    special: bool


def _runs(rendered: Rendered, tokenizer: Tokenizer) -> list[_Run]:
    specials = set(tokenizer.specials.values())
    pairs = zip(rendered.tokens, rendered.trained, strict=True)
    return [
        _Run(_visible(tokenizer.decode([t for t, _ in run], skip_special=False)), trained, special)
        for (trained, special), run in itertools.groupby(
            pairs, key=lambda pair: (pair[1], pair[0] in specials)
        )
    ]


def _coloured(runs: Iterable[_Run]) -> Iterator[tuple[str, str]]:
    for run in runs:
        yield run.text, f"{TRAINED if run.trained else ''} {SPECIAL if run.special else ''}".strip()


def _marked(runs: Iterable[_Run]) -> str:
    text = ""
    for trained, group in itertools.groupby(runs, key=lambda run: run.trained):
        words = "".join(run.text for run in group)
        text += f"⟦{words}⟧" if trained else words
    return text


def _visible(text: str) -> str:
    return text.translate(_VISIBLE)


if __name__ == "__main__":
    sys.exit(run_tool(main, define_flags(), __doc__ or ""))

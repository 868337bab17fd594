"""Tokens as text that is safe to print, in colours or with marks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.text import Text

from llm_jax.data.tokenizers import Tokenizer

SPECIAL = "bold"
# An escape sequence in an example must not command the terminal, nor turn the direction of what
# follows; signs are shown instead.
_VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_VISIBLE |= dict.fromkeys(
    (*range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD
)


def visible(text: str) -> str:
    """The text without characters that command a terminal."""
    return text.translate(_VISIBLE)


def make_console() -> Console:
    """Where coloured text goes; Rich knows of NO_COLOR, FORCE_COLOR and dumb terminals."""
    return Console(highlight=False, soft_wrap=True)


def is_coloured(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def print_tokens(
    console: Console,
    tokens: Sequence[int],
    trained: Sequence[bool],
    tokenizer: Tokenizer,
    trained_style: str = "green",
    other_style: str = "",
) -> None:
    """Prints tokens as text: specials bold, trained ones in a style, or in ⟦⟧ without colours."""
    runs = _runs(tokens, trained, tokenizer)
    if not is_coloured(console):
        print(_marked(runs))
        return
    styles = (trained_style if run.trained else other_style for run in runs)
    parts = (
        (run.text, f"{style} {SPECIAL if run.special else ''}".strip())
        for run, style in zip(runs, styles, strict=True)
    )
    console.print(Text.assemble(*parts))


@dataclasses.dataclass(frozen=True)
class _Run:
    """Neighbouring tokens of one kind, as text."""

    text: str
    trained: bool
    special: bool


def _runs(tokens: Sequence[int], trained: Sequence[bool], tokenizer: Tokenizer) -> list[_Run]:
    specials = set(tokenizer.specials.values())
    pairs = zip(tokens, trained, strict=True)
    return [
        _Run(visible(tokenizer.decode([t for t, _ in run], skip_special=False)), trained, special)
        for (trained, special), run in itertools.groupby(
            pairs, key=lambda pair: (pair[1], pair[0] in specials)
        )
    ]


def _marked(runs: Iterable[_Run]) -> str:
    text = ""
    for trained, group in itertools.groupby(runs, key=lambda run: run.trained):
        words = "".join(run.text for run in group)
        text += f"⟦{words}⟧" if trained else words
    return text

"""A conversation with a fine-tuned model, in the terminal.

    python -m tools.chat --workdir=RUN[@STEP] [--system=TEXT --temperature=0.8 --top_p=0.95 ...]
    python -m tools.chat --workdir=BASE --expert=TUNED --anti_expert=UNTUNED [--strength=1 ...]

A line is a message; one that begins with / is a command, and /help lists those. Ctrl-C stops an
answer, Ctrl-D ends the conversation. Answers go to stdout, notes to stderr, so that messages may
come from a file and answers go to one. See tools.generate for experts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from llm_jax.data.examples import Message
from llm_jax.errors import UserError, did_you_mean
from tools.cli import run_tool
from tools.sampling import (
    Speaker,
    check_text,
    define_speaker_flags,
    load_speaker,
    make_sampler,
)

if TYPE_CHECKING:
    from llm_jax.data.templates import ChatTemplate
    from llm_jax.generation.sampler import SamplerConfig

COMMANDS = {
    "/new": "forget the conversation; a system turn stays",
    "/undo": "take the last message and its answer back",
    "/save": "/save FILE adds the conversation to FILE, as a line of JSON",
    "/help": "these lines",
    "/quit": "end, as Ctrl-D does",
}
ANSWER_TOKENS = 256


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    define_speaker_flags(values)
    flags.DEFINE_string("system", "", "the system turn; empty = none", flag_values=values)
    flags.DEFINE_integer(
        "max_new_tokens", None, f"tokens of an answer at most; absent = {ANSWER_TOKENS}, but no "
        "more than half of the model's length", flag_values=values,
    )  # fmt: skip
    return values


def main(values: flags.FlagValues) -> None:
    _check(values)
    import jax

    from llm_jax.compilation import use_compilation_cache

    sampler = make_sampler(values)
    use_compilation_cache()
    speaker = load_speaker(values)
    template = speaker.chat_template
    partner = Partner(speaker, template, sampler, _answer_tokens(speaker, values), values.seed)
    note(f"{speaker.name}; /help lists the commands")
    with jax.set_mesh(speaker.mesh):
        Chat(partner, values.system).talk(_lines())


@dataclasses.dataclass(frozen=True)
class Partner:
    """The model's side of a conversation.

    max_new_tokens: tokens of an answer at most. seed: of the sampling; the number of the answer is
    mixed in.
    """

    speaker: Speaker
    template: ChatTemplate
    sampler: SamplerConfig
    max_new_tokens: int
    seed: int

    def answer(self, messages: Sequence[Message], number: int) -> Iterator[str]:
        """The answer to the last message, in pieces; the oldest turns go where not all fit.

        Raises:
          UserError: the last message alone is too long, or the template cannot write the messages.
        """
        import jax

        from llm_jax.generation.generate import stream

        prompt, left_out = self._prompt(messages)
        if left_out:
            note(f"(the oldest {left_out} turns no longer fit into the model and are left out)")
        return stream(
            self.speaker.model,
            self.speaker.params,
            self.speaker.tokenizer,
            prompt,
            max_new_tokens=self.max_new_tokens,
            sampler=self.sampler,
            rng=jax.random.fold_in(jax.random.key(self.seed), number),
            stop_ids=self.template.stop_ids(self.speaker.tokenizer),
        )

    def _prompt(self, messages: Sequence[Message]) -> tuple[list[int], int]:
        """The tokens of the system turn and the newest turns that fit, and how many do not."""
        room = self.speaker.model.max_length - self.max_new_tokens
        start = 1 if messages[0].role == "system" else 0
        for left_out in range(0, len(messages) - start, 2):
            kept = [*messages[:start], *messages[start + left_out :]]
            tokens = self.template.render_prompt(kept, (), self.speaker.tokenizer)
            if len(tokens) <= room:
                return tokens, left_out
        raise UserError(
            f"the message takes {len(tokens)} tokens and the model has room for {room} beside an "
            "answer: say it shorter, or start with a smaller --max_new_tokens."
        )


class Chat:
    """A conversation: what was said, and the commands.

    messages: the system turn if there is one, then messages and answers in turn.
    """

    def __init__(self, partner: Partner, system: str = ""):
        self._partner = partner
        self._opening = [Message("system", system)] if system else []
        self._answers = 0
        self.messages = [*self._opening]

    def talk(self, lines: Iterator[str]) -> None:
        """Answers each line until there is none or one says /quit."""
        for line in lines:
            if line == "/quit":
                return
            if line.startswith("/"):
                self._obey(line)
            elif line:
                self._answer(line)

    def _answer(self, line: str) -> None:
        """Puts the message and its answer on record; an answer that was stopped counts, too."""
        messages = [*self.messages, Message("user", line)]
        self._answers += 1
        pieces: list[str] = []
        stopped = False
        try:
            for piece in self._partner.answer(messages, self._answers):
                pieces.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            stopped = True
        except UserError as error:
            note(f"error: {error}")
            return
        print(flush=True)
        if stopped:
            note("(stopped)")
        answer = "".join(pieces)
        if answer.strip():
            self.messages = [*messages, Message("assistant", answer)]
        else:
            note("(there is no answer, so the message is forgotten)")

    def _obey(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if command == "/new":
            self.messages = [*self._opening]
        elif command == "/undo":
            self._undo()
        elif command == "/save":
            self._save(argument.strip())
        elif command == "/help":
            note("\n".join(f"{name}  {what}" for name, what in COMMANDS.items()))
        else:
            note(f"{command} is no command.{did_you_mean(command, COMMANDS)}")

    def _undo(self) -> None:
        if self.messages == self._opening:
            note("nothing has been said yet.")
        else:
            self.messages = self.messages[:-2]

    def _save(self, file: str) -> None:
        if not file:
            note("/save needs a file, for example /save chat.jsonl")
        elif self.messages == self._opening:
            note("nothing has been said yet.")
        else:
            messages = [{"role": m.role, "content": m.content} for m in self.messages]
            try:
                with Path(file).expanduser().open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
            except OSError as error:
                note(f"{file} cannot be written: {error.strerror}.")


def note(text: str) -> None:
    """Says something that is no part of the conversation."""
    print(text, file=sys.stderr, flush=True)


def _check(values: flags.FlagValues) -> None:
    """Refuses what can be refused before anything is loaded."""
    if not values.workdir:
        raise UserError("--workdir is required, for example --workdir=runs/sft.")
    check_text("system", values.system)


def _answer_tokens(speaker: Speaker, values: flags.FlagValues) -> int:
    length = speaker.model.max_length
    if values.max_new_tokens is None:
        return min(ANSWER_TOKENS, length // 2)
    if not 1 <= values.max_new_tokens < length:
        raise UserError(
            f"--max_new_tokens={values.max_new_tokens} must lie between 1 and {length - 1}: the "
            f"model's length is {length}, question and answer together."
        )
    return values.max_new_tokens


def _lines() -> Iterator[str]:
    """What is typed, or piped in, without the space around it."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a stray byte must not end the conversation
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives `input` editing and a history
    while True:
        try:
            line = input("> " if is_terminal else "")
        except EOFError:
            if is_terminal:
                note("")
            return
        except KeyboardInterrupt:
            if not is_terminal:
                return
            note("\n(Ctrl-D ends)")
        else:
            yield line.strip()


if __name__ == "__main__":
    sys.exit(run_tool(main, define_flags(), __doc__ or ""))

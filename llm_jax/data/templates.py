"""Chat templates by name, by file, or from a checkpoint's record."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_jax.data.examples import ROLES, Conversation, Message, Role
from llm_jax.data.template_base import (
    ChatTemplate,
    Rendered,
    Segment,
    assistant_text,
    parse_tool_calls,
    with_tools,
    without_tool_turns,
)
from llm_jax.data.template_jinja import JinjaTemplate, read_jinja
from llm_jax.data.tokenizer_base import Tokenizer
from llm_jax.errors import UserError, did_you_mean

__all__ = [
    "TEMPLATES",
    "ChatTemplate",
    "Rendered",
    "load_template",
    "make_template",
    "parse_tool_calls",
]


@dataclasses.dataclass(frozen=True)
class Markup:
    """What stands around the turns.

    headers: the pieces before a turn's text, by role; tools speak as the user where they have none.
    end: the token that ends a turn. after: the text that follows it.
    bos: whether the conversation begins with that token.
    strip: whether white space around a turn's text is dropped.
    """

    headers: Mapping[Role, tuple[str | int, ...]]
    end: int
    after: str = ""
    bos: bool = True
    strip: bool = False


class NamedTemplate(ChatTemplate):
    """A template that its name describes."""

    def __init__(self, name: str):
        self.name = name

    def describe(self) -> dict[str, Any]:
        return {"name": self.name}


class HeaderTemplate(NamedTemplate):
    """Each turn is a header that names the role, the text, and a token that ends it."""

    @abc.abstractmethod
    def markup(self, tokenizer: Tokenizer) -> Markup:
        """The markup in the tokens of this tokenizer."""

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        return tuple(dict.fromkeys((self.markup(tokenizer).end, *tokenizer.eos_ids)))

    def _segments(
        self, conversation: Conversation, tokenizer: Tokenizer, is_prompt: bool
    ) -> list[Segment]:
        markup = self.markup(tokenizer)
        messages = with_tools(conversation.messages, conversation.tools)
        if "tool" not in markup.headers:
            messages = without_tool_turns(messages)
        segments = [Segment(tokenizer.bos_id)] if markup.bos else []
        for message in messages:
            segments += [Segment(piece) for piece in markup.headers[message.role]]
            segments += _turn(message, markup)
        if is_prompt:
            segments += [Segment(piece) for piece in markup.headers["assistant"]]
        return segments


class ChatML(HeaderTemplate):
    """One special token a role; ChatML as it is published where the tokenizer has no such tokens,
    in its own two tokens where it has those."""

    def markup(self, tokenizer: Tokenizer) -> Markup:
        start, end = tokenizer.special_id("<|im_start|>"), tokenizer.special_id("<|im_end|>")
        if start is not None and end is not None:
            return Markup({r: (start, f"{r}\n") for r in ROLES}, end, after="\n", bos=False)
        ids, end = tokenizer.special_ids, _end_of_turn(tokenizer)
        if all(role in ids for role in ROLES):
            return Markup({role: (ids[role],) for role in ROLES}, end)
        return Markup({r: (f"<|im_start|>{r}\n",) for r in ROLES}, end, after="\n", bos=False)


class Llama3(HeaderTemplate):
    """Headers in two tokens around the role's name; a tool's role is called ipython."""

    def markup(self, tokenizer: Tokenizer) -> Markup:
        opening = _special(tokenizer, "<|start_header_id|>")
        closing = _special(tokenizer, "<|end_header_id|>")
        names = {role: "ipython" if role == "tool" else role for role in ROLES}
        headers = {role: (opening, name, closing, "\n\n") for role, name in names.items()}
        end = tokenizer.special_id("<|eot_id|>")
        # One token ends a turn, whatever it is called: as text, it could not stop a generation.
        end = _end_of_turn(tokenizer) if end is None else end
        return Markup(headers, end, strip=True)


class Zephyr(HeaderTemplate):
    """The role on a line of its own; eos ends every turn."""

    def markup(self, tokenizer: Tokenizer) -> Markup:
        roles: tuple[Role, ...] = ("system", "user", "assistant")
        headers = {role: (_special(tokenizer, f"<|{role}|>"), "\n") for role in roles}
        return Markup(headers, tokenizer.eos_id, after="\n")


class Llama2(NamedTemplate):
    """[INST] around what the user says, the system turn inside the first one; eos ends answers."""

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        return tokenizer.eos_ids

    def _segments(
        self, conversation: Conversation, tokenizer: Tokenizer, is_prompt: bool
    ) -> list[Segment]:
        messages = with_tools(conversation.messages, conversation.tools)
        messages = _without_system_turn(without_tool_turns(messages))
        starts_with_user = bool(messages) and messages[0].role == "user"
        segments = [] if starts_with_user else [Segment(tokenizer.bos_id)]
        for message in messages:
            if message.role == "assistant":
                words = f" {assistant_text(message).strip()} "
                answer = Segment(words, answer=True, trained=message.trained)
                segments += [answer, answer._replace(content=tokenizer.eos_id)]
            else:
                text = f"[INST] {message.content.strip()} [/INST]"
                segments += [Segment(tokenizer.bos_id), Segment(text)]
        return segments


class Plain(NamedTemplate):
    """No roles: the turns' texts one after another, and eos."""

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        return tokenizer.eos_ids

    def _segments(
        self, conversation: Conversation, tokenizer: Tokenizer, is_prompt: bool
    ) -> list[Segment]:
        segments = [Segment(tokenizer.bos_id)]
        for message in with_tools(conversation.messages, conversation.tools):
            segments.append(_words(message))
        if not is_prompt:
            segments.append(segments[-1]._replace(content=tokenizer.eos_id))
        return segments


TEMPLATES: dict[str, ChatTemplate] = {
    template.name: template
    for template in (
        ChatML("chatml"),
        Llama2("llama2"),
        Llama3("llama3"),
        Zephyr("zephyr"),
        Plain("plain"),
    )
}

DEFAULT_TEMPLATE = "chatml"


def make_template(name_or_path: str) -> ChatTemplate:
    """The template of this name, or the Jinja template of a file or folder.

    Args:
      name_or_path: a name in TEMPLATES; a .jinja file; a tokenizer_config.json or
        chat_template.json; a folder that holds one of those, as published models do.

    Raises:
      UserError: no such template, or a file that holds none.
    """
    if name_or_path in TEMPLATES:
        return TEMPLATES[name_or_path]
    path = Path(name_or_path).expanduser()
    if path.exists():
        return read_jinja(path)
    raise UserError(
        f"the chat template {name_or_path!r} is neither a known name nor a file."
        f"{did_you_mean(name_or_path, TEMPLATES)}"
    )


def load_template(description: Mapping[str, Any]) -> ChatTemplate:
    """The template whose `describe` this is.

    Raises:
      UserError: the description is damaged, or of a template that this version lacks.
    """
    name, sources = description.get("name"), description.get("jinja")
    if isinstance(name, str) and isinstance(sources, Mapping):
        return JinjaTemplate(name, tuple(sources.items()))
    if name in TEMPLATES:
        return TEMPLATES[name]
    raise UserError(
        f"the recorded chat template {name!r} is unknown.{did_you_mean(str(name), TEMPLATES)}"
    )


def _special(tokenizer: Tokenizer, string: str) -> str | int:
    """The id of a special token; its string, to be written as text, where there is none."""
    id_ = tokenizer.special_id(string)
    return string if id_ is None else id_


def _end_of_turn(tokenizer: Tokenizer) -> int:
    return tokenizer.special_ids.get("end_of_turn", tokenizer.eos_id)


def _words(message: Message) -> Segment:
    """The text of a turn."""
    if message.role == "assistant":
        return Segment(assistant_text(message), answer=True, trained=message.trained)
    return Segment(message.content)


def _turn(message: Message, markup: Markup) -> list[Segment]:
    """The text of a turn, and what follows it."""
    words = _words(message)
    if markup.strip:
        words = words._replace(content=str(words.content).strip())
    return [words, words._replace(content=markup.end), Segment(markup.after)]


def _without_system_turn(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages with the system turn as the beginning of the first user turn."""
    if not messages or messages[0].role != "system":
        return messages
    system, rest = messages[0].content, messages[1:]
    words = ""
    if rest and rest[0].role == "user":
        words, rest = rest[0].content, rest[1:]
    return (Message("user", f"<<SYS>>\n{system}\n<</SYS>>\n\n{words}"), *rest)

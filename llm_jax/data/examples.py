"""What the stages after pre-training learn from: conversations, and comparisons of answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn.

    content: its text; may be empty where the assistant calls tools.
    tool_calls: {"name": str, "arguments": dict} of each call that the assistant makes.
    name: the tool that a turn of role "tool" answers for.
    trained: whether the loss counts an assistant's turn; other roles' turns never count.
    """

    role: Role
    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()
    name: str | None = None
    trained: bool = True


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A dialogue to imitate.

    messages: an optional system turn, then user and assistant (and tool) turns in a legal order.
    tools: JSON descriptions of the functions that the assistant may call.
    where: file:line, for messages. split_text: what decides the side of the validation split;
    None: the text up to the first answer, so that one prompt never stands on both sides.
    row: the fields that the example was read from, for reward functions.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    where: str = ""
    split_text: str | None = None
    row: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Answers to one prompt and how good they are.

    prompt: the turns before the answers; may be empty. responses: the answers, each one or more
    turns that begin with the assistant's. scores: one for each answer, the higher the better; only
    their order counts. A pair is two answers; an unpaired example is one answer with the score 1
    (good) or 0 (bad); without any answer it is a prompt alone, for stages that make answers.
    strength: by how much the best answer is better, as a level's name. The rest is as in
    `Conversation`.
    """

    prompt: tuple[Message, ...]
    responses: tuple[tuple[Message, ...], ...]
    scores: tuple[float, ...]
    strength: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    where: str = ""
    split_text: str | None = None
    row: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)


Example = Conversation | Comparison


class MalformedExample(Exception):
    """Why a row makes no example: a clause without a full stop, as in `readers.Malformed`."""


def split_text(example: Example) -> str:
    """The text whose hash decides the side of the validation split."""
    if example.split_text is not None:
        return example.split_text
    if isinstance(example, Comparison):
        messages = example.prompt or example.responses[0][:1]
    else:
        first = next((i for i, m in enumerate(example.messages) if m.role == "assistant"), 0)
        messages = example.messages[:first] or example.messages[:1]
    return "\n".join(message.content for message in messages)


def as_conversation(example: Example) -> Conversation | None:
    """The dialogue to imitate: of a comparison the best answer; None where that is not good.

    It falls on the same side of the validation split as the example.
    """
    if isinstance(example, Conversation):
        return example
    if not example.responses or (len(example.scores) == 1 and example.scores[0] != 1):
        return None
    best = max(range(len(example.scores)), key=example.scores.__getitem__)
    return Conversation(
        messages=example.prompt + example.responses[best],
        tools=example.tools,
        where=example.where,
        split_text=split_text(example),
        row=example.row,
    )


def check_messages(messages: tuple[Message, ...]) -> None:
    """Checks the order of the turns of a dialogue.

    A system turn comes first or not at all; user and assistant take turns, starting with the user;
    a tool's turn follows an assistant's turn that calls a tool, or another tool's turn; after tools
    comes the assistant. A dialogue of assistant turns alone (plain text to continue) is legal, too.

    Raises:
      MalformedExample: a turn out of order, without a text, or no turn at all.
    """
    if not messages:
        raise MalformedExample("the conversation has no turn")
    before: str | None = None
    calls = False
    for number, message in enumerate(messages, start=1):
        allowed = _followers(before, calls)
        if message.role not in allowed:
            after = f"after {before!r}" if before else "at the start"
            raise MalformedExample(
                f"turn {number} has role {message.role!r} {after}, where {' or '.join(allowed)} "
                "is wanted"
            )
        if not message.content.strip() and not message.tool_calls and message.role != "tool":
            raise MalformedExample(f"turn {number} ({message.role}) is empty")
        before, calls = message.role, bool(message.tool_calls)


def _followers(role: str | None, calls: bool) -> tuple[str, ...]:
    if role is None:
        return ("system", "user", "assistant")
    if role == "system":
        return ("user", "assistant")
    if role == "user":
        return ("assistant",)
    if role == "tool":
        return ("assistant", "tool")
    return ("tool",) if calls else ("user",)

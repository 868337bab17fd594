"""Turns out of the shapes in which data sets keep them: lists, transcripts, trees of replies."""

from __future__ import annotations

import itertools
import math
import re
import reprlib
from collections.abc import Iterable, Iterator
from typing import Any

from llm_jax.data.examples import MalformedExample, Message, Role, check_messages
from llm_jax.data.fields import (
    Fields,
    as_json,
    as_list,
    as_number,
    as_object,
    as_text,
    as_truth,
    has,
    optional_text,
    text_of,
    value_of,
)
from llm_jax.data.readers import Malformed, Record, Row

Turns = tuple[Message, ...]

# A role by any of its names in the wild. "function_call" is a call written out as its turn's text.
_ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "bing"), "assistant"),
    **dict.fromkeys(("tool", "function", "ipython", "observation"), "tool"),
    "function_call": "assistant",
}

_CONTENT = "content|value"
_WEIGHT = "weight|train"

_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")

# What tells a row that is one message of a tree whose other messages are the rows around it.
_TREE_ROW = ("message_tree_id", "message_id", "parent_id", "role", "text")


# --- lists of messages


def asked(value: Any, field: str) -> Turns:
    """A prompt: the user's turn of that text, or the messages of a list.

    Raises:
      MalformedExample: the value is neither.
    """
    return _turns_or_text(value, field, "user")


def answered(value: Any, field: str) -> Turns:
    """An answer: the assistant's turn of that text, or the messages of a list.

    Raises:
      MalformedExample: the value is neither.
    """
    return _turns_or_text(value, field, "assistant")


def turns_of(value: Any, field: str) -> Turns:
    """The turns of a list of {"role", "content"} or {"from", "value"}.

    Raises:
      MalformedExample: the list or one of its messages is of another shape.
    """
    turns: list[Message] = []
    calls: list[tuple[Any, str]] = []  # of the last assistant's turn, still to answer: (id, tool)
    for number, entry in enumerate(as_list(value, field), start=1):
        where = f"turn {number} of {field!r}"
        try:
            message = _message(as_object(entry, "the turn"), calls)
        except MalformedExample as error:
            raise MalformedExample(f"{where}: {error}") from None
        turns.append(message)
        if message.tool_calls:
            named = zip(_calls(entry), message.tool_calls, strict=True)
            calls = [(call.get("id"), parsed["name"]) for call, parsed in named]
    if not turns:
        raise MalformedExample(f"{field!r} holds no turn")
    return tuple(turns)


def tools_of(value: Any) -> tuple[Fields, ...]:
    """Descriptions of functions, out of a list or the JSON of one.

    Raises:
      MalformedExample: the value is of another shape.
    """
    tools = as_list(as_json(value, "tools") or [], "tools")
    return tuple(_function(tool, "a tool") for tool in tools)


def _turns_or_text(value: Any, field: str, role: Role) -> Turns:
    if isinstance(value, list | tuple):
        return turns_of(value, field)
    return (Message(role, as_text(value, field)),)


def _message(fields: Fields, calls: list[tuple[Any, str]]) -> Message:
    role = _role(fields)
    own = tuple(_call(call) for call in _calls(fields)) if role == "assistant" else ()
    return Message(
        role=role,
        content=_content(fields, has_calls=bool(own)),
        tool_calls=own,
        name=_tool(fields, calls) if role == "tool" else None,
        trained=as_truth(value_of(fields, _WEIGHT), "weight") if has(fields, _WEIGHT) else True,
    )


def _role(fields: Fields) -> Role:
    role = text_of(fields, "role|from")
    if role.lower() not in _ROLES:
        raise MalformedExample(f"the role {reprlib.repr(role)} is unknown")
    return _ROLES[role.lower()]


def _content(fields: Fields, has_calls: bool) -> str:
    """The text of a message: a string or a list of parts; none is needed next to calls."""
    if _is_call(fields) or (has_calls and not has(fields, _CONTENT)):
        return ""
    value = value_of(fields, _CONTENT)
    if not isinstance(value, list | tuple):
        return as_text(value, "content")
    parts = [as_object(part, "a part of 'content'") for part in value]
    for part in parts:
        if part.get("type") != "text":
            kind = reprlib.repr(part.get("type"))
            raise MalformedExample(f"a part of 'content' has type {kind}, not 'text'")
    return "".join(text_of(part, "text") for part in parts)


def _calls(fields: Fields) -> list[Any]:
    """The calls of an assistant's turn as they are written."""
    if _is_call(fields):
        value = as_json(value_of(fields, _CONTENT), "the call")
        return value if isinstance(value, list) else [value]
    if has(fields, "function_call"):
        return [fields["function_call"]]
    return as_list(fields.get("tool_calls") or [], "tool_calls")


def _is_call(fields: Fields) -> bool:
    return text_of(fields, "role|from").lower() == "function_call"


def _call(value: Any) -> Fields:
    function = _function(value, "a call")
    name = text_of(function, "name")
    what = f"the value of the arguments of {name!r}"
    arguments = as_json(function.get("arguments"), what)
    return {"name": name, "arguments": {} if arguments is None else as_object(arguments, what)}


def _function(value: Any, what: str) -> Fields:
    """{"type": "function", "function": {...}} without its wrapping."""
    wrapped = as_object(value, what)
    return as_object(wrapped.get("function") or wrapped, what)


def _tool(fields: Fields, calls: list[tuple[Any, str]]) -> str | None:
    """The tool that a turn answers for: as it says, else that of its call, else the next one's."""
    named = [call for call in calls if call[0] == fields.get("tool_call_id")]
    answers = (named or calls)[:1]
    for call in answers:
        calls.remove(call)
    return optional_text(fields, "name") or next((tool for _, tool in answers), None)


# --- transcripts


def transcript_of(text: str) -> Turns:
    """The turns of a text in which "Human:" and "Assistant:" start the paragraphs of a dialogue.

    Raises:
      MalformedExample: the text starts otherwise.
    """
    before, *parts = _SPEAKER.split(text)
    if before or not parts:
        raise MalformedExample("the transcript does not start with 'Human:' or 'Assistant:'")
    roles: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return tuple(Message(roles[speaker], said.strip()) for speaker, said in pairs)


def is_transcript(value: Any) -> bool:
    """Whether a value is a dialogue of "Human:" and "Assistant:"."""
    is_text = isinstance(value, str) and "\n\nAssistant:" in value
    return is_text and _SPEAKER.match(value) is not None


def shared_turns(first: Turns, second: Turns) -> tuple[Turns, Turns, Turns]:
    """Cuts two dialogues into the turns that both start with, and the two answers to those.

    The cut is the latest one after which both go on with the assistant's turn.

    Raises:
      MalformedExample: the turns of one are out of order.
    """
    for turns in (first, second):
        check_messages(turns)
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    cut = len(list(pairs))
    while cut and not all(_is_answered(turns[cut:]) for turns in (first, second)):
        cut -= 1
    return first[:cut], first[cut:], second[cut:]


def _is_answered(turns: Turns) -> bool:
    return bool(turns) and turns[0].role == "assistant"


# --- trees of replies


def best_path(tree: Any) -> Turns:
    """The dialogue of a tree that takes the reply of the best rank at each turn.

    Messages that are deleted or were not approved are left out with all that replies to them. The
    path ends with the assistant's turn; there may be none.

    Raises:
      MalformedExample: a message on the path is of another shape.
    """
    turns: list[Message] = []
    replies = [tree]
    while kept := [node for node in _objects(replies) if _is_kept(node)]:
        node = min(kept, key=_rank)
        turns.append(Message(_role(node), text_of(node, "text")))
        replies = as_list(node.get("replies") or [], "replies")
    while turns and turns[-1].role != "assistant":
        turns.pop()
    return tuple(turns)


def is_tree(fields: Fields) -> bool:
    """Whether a row is a tree of replies, or one message of such a tree."""
    return isinstance(fields.get("prompt"), dict) or _is_tree_row(fields)


def join_trees(rows: Iterable[Row]) -> Iterator[Row]:
    """Joins consecutive rows that are the messages of one tree, in any order, into a row.

    The row has the field "prompt", the tree's first message with its "replies". Other rows stay.
    """
    for tree, group in itertools.groupby(rows, key=_tree_id):
        if tree is None:
            yield from group
        else:
            yield _joined([row for row in group if isinstance(row, Record)])


def _joined(rows: list[Record]) -> Row:
    nodes = {str(row.fields["message_id"]): {**row.fields, "replies": []} for row in rows}
    first = None
    for node in nodes.values():
        if node["parent_id"] is None:
            first = node
        elif (parent := str(node["parent_id"])) in nodes:
            nodes[parent]["replies"].append(node)
    if first is None:
        why = "the tree has no first message; all rows of a tree must stand together"
        return Malformed(rows[0].where, why)
    return Record({"prompt": first}, rows[0].where)


def _tree_id(row: Row) -> str | None:
    if isinstance(row, Record) and _is_tree_row(row.fields):
        return str(row.fields["message_tree_id"])
    return None


def _is_tree_row(fields: Fields) -> bool:
    return all(name in fields for name in _TREE_ROW)


def _objects(values: list[Any]) -> list[Fields]:
    return [as_object(value, "a message of the tree") for value in values]


def _is_kept(node: Fields) -> bool:
    return not node.get("deleted") and node.get("review_result") is not False


def _rank(node: Fields) -> float:
    """The place among the replies, the last where there is none."""
    rank = node.get("rank")
    if rank is None or rank != rank:  # tables write a missing number as not-a-number
        return math.inf
    return as_number(rank, "rank")

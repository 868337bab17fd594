"""What every chat template can do, and how tools and their calls are written as text."""

from __future__ import annotations

import abc
import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from llm_jax.data.examples import Conversation, Message
from llm_jax.data.tokenizer_base import Place, Tokenizer
from llm_jax.errors import UserError

CALL_START, CALL_END = "<tool_call>", "</tool_call>"
RESPONSE_START, RESPONSE_END = "<tool_response>", "</tool_response>"
_SPACE = re.compile(r"\s*")
_WORDS = "\ue000"  # for private use: stands for what a user says where its place is looked for
_TOOLS = """\
You may call these functions, described in JSON, one a line:
<tools>
{lines}
</tools>
A call is a line of its own: <tool_call>{{"name": "...", "arguments": {{...}}}}</tool_call>"""


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation as tokens. trained[i]: whether the loss counts token i as a target."""

    tokens: list[int]
    trained: list[bool]


class Segment(NamedTuple):
    """A piece of a rendered conversation.

    content: text, or the id of a special token.
    answer: whether the assistant writes it: its words, its calls and what ends its turn.
    trained: whether the loss counts it; only answers are trained.
    """

    content: str | int
    answer: bool = False
    trained: bool = False


@dataclasses.dataclass(frozen=True)
class UserTurn:
    """What stands around a user's first words, for a model that is to write them.

    prefix: the tokens before them. stop_ids: the tokens at which the turn is over. stop_string: the
    text that ends it, where the template has no token for that.
    """

    prefix: tuple[int, ...]
    stop_ids: tuple[int, ...]
    stop_string: str | None


class ChatTemplate(abc.ABC):
    """How a conversation is written as tokens.

    Text is cut where an answer begins and ends, and tokens never span a cut. So the prompt of an
    answer has the very tokens that stand before the answer in the whole conversation, and every
    token is either the assistant's or not.
    """

    name: str

    def render(self, conversation: Conversation, tokenizer: Tokenizer) -> Rendered:
        """The tokens of a conversation and which of them are trained: trained answers.

        Raises:
          UserError: the template cannot write this conversation.
        """
        return self.render_batch([conversation], tokenizer)[0]

    def render_batch(
        self, conversations: Iterable[Conversation], tokenizer: Tokenizer
    ) -> list[Rendered]:
        """`render` of each conversation, in one call to the tokenizer.

        Raises:
          UserError: the template cannot write one of the conversations.
        """
        batch = [
            _joined(_stripped(self._segments(c, tokenizer, is_prompt=False), tokenizer))
            for c in conversations
        ]
        ids = _encode(batch, tokenizer)
        return [_rendered(segments, ids) for segments in batch]

    def render_prompt(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], tokenizer: Tokenizer
    ) -> list[int]:
        """The tokens up to where the assistant's answer to `messages` begins.

        Raises:
          UserError: the template cannot write these messages.
        """
        conversation = Conversation(tuple(messages), tuple(tools))
        segments = self._segments(conversation, tokenizer, is_prompt=True)
        segments = _joined(_stripped(segments, tokenizer))
        return _rendered(segments, _encode([segments], tokenizer)).tokens

    def user_turn(self, tokenizer: Tokenizer) -> UserTurn:
        """What stands around the words of a user who begins a conversation.

        Raises:
          UserError: the template does not write out these words, or nothing tells their end.
        """
        asking = Conversation((Message("user", _WORDS),))
        segments = _joined(self._segments(asking, tokenizer, is_prompt=True))
        texts = [s.content if isinstance(s.content, str) else "" for s in segments]
        place = next((i for i, text in enumerate(texts) if _WORDS in text), None)
        if place is None:
            raise UserError(f"the chat template {self.name!r} does not write out what users say.")
        before, _, after = texts[place].partition(_WORDS)
        # A space before a word belongs to the token of the word, so it is the model's to write.
        segments[place] = segments[place]._replace(content=before.rstrip(" "))
        opening = _joined(_stripped(segments[: place + 1], tokenizer))
        prefix = _rendered(opening, _encode([opening], tokenizer)).tokens
        ends = [segment.content for segment in segments[place + 1 :]][:1]
        if after.strip():
            return UserTurn(tuple(prefix), tokenizer.eos_ids, after.rstrip())
        if not (ends and isinstance(ends[0], int)):
            raise UserError(f"the chat template {self.name!r} does not tell where users end.")
        stop_ids = tuple(dict.fromkeys((ends[0], *tokenizer.eos_ids)))
        return UserTurn(tuple(prefix), stop_ids, None)

    @abc.abstractmethod
    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The tokens at which the assistant's turn is over; the tokenizer's eos is among them."""

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """JSON-able values from which `load_template` makes this template again."""

    @abc.abstractmethod
    def _segments(
        self, conversation: Conversation, tokenizer: Tokenizer, is_prompt: bool
    ) -> list[Segment]:
        """The pieces of a conversation; a prompt goes on to where the next answer begins."""


def assistant_text(message: Message) -> str:
    """What the assistant writes in a turn: its words, then each call on a line of its own."""
    calls = [
        CALL_START
        + _json({"name": call["name"], "arguments": call.get("arguments", {})})
        + CALL_END
        for call in message.tool_calls
    ]
    return "\n".join([message.content, *calls] if message.content else calls)


def parse_tool_calls(text: str) -> tuple[str, tuple[dict[str, Any], ...]]:
    """The words and the calls of what an assistant wrote: the inverse of `assistant_text`.

    White space around a call's JSON is allowed. What looks like a call but is none (no JSON, no
    name, arguments that are no object) stays in the words as it is.
    """
    words, calls, start = "", [], 0
    while (place := text.find(CALL_START, start)) >= 0:
        call, end = _parse_call(text, place + len(CALL_START))
        if call is None:
            words += text[start:end]
        else:
            words += text[start:place].removesuffix("\n")
            calls.append(call)
        start = end
    return words + text[start:], tuple(calls)


def with_tools(
    messages: tuple[Message, ...], tools: tuple[dict[str, Any], ...]
) -> tuple[Message, ...]:
    """The messages with the tools' descriptions in the system turn, made where there is none."""
    if not tools:
        return messages
    block = tools_block("\n".join(map(_json, tools)))
    if messages and messages[0].role == "system":
        return (Message("system", f"{messages[0].content}\n\n{block}"), *messages[1:])
    return (Message("system", block), *messages)


def tools_block(lines: str) -> str:
    """What the system turn says of the tools, which `lines` describe in JSON."""
    return _TOOLS.format(lines=lines)


def without_tool_turns(messages: Iterable[Message]) -> tuple[Message, ...]:
    """The messages with each run of tool turns as one user turn, for models without that role."""
    result: list[Message] = []
    before = ""
    for message in messages:
        if message.role == "tool":
            content = f"{RESPONSE_START}{message.content}{RESPONSE_END}"
            if before == "tool":
                content = f"{result.pop().content}\n{content}"
            result.append(Message("user", content))
        else:
            result.append(message)
        before = message.role
    return tuple(result)


def _parse_call(text: str, start: int) -> tuple[dict[str, Any] | None, int]:
    """The call whose JSON begins at `start`, if it is one, and where to read on."""
    try:
        # The decoder finds the end itself: an argument may hold the closing tag.
        call, end = json.JSONDecoder().raw_decode(text, _skip_space(text, start))
    except (ValueError, RecursionError):
        return None, start
    end = _skip_space(text, end)
    if not (text.startswith(CALL_END, end) and isinstance(call, dict)):
        return None, start
    if not (isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict)):
        return None, start
    return {"name": call["name"], "arguments": call["arguments"]}, end + len(CALL_END)


def _skip_space(text: str, start: int) -> int:
    match = _SPACE.match(text, start)
    return match.end() if match else start


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _stripped(segments: Iterable[Segment], tokenizer: Tokenizer) -> list[Segment]:
    """The segments without the white space that special tokens beside it take away."""
    before, after = tokenizer.stripping
    stripped = list(segments)
    for ids, step, strip in ((after, 1, str.lstrip), (before, -1, str.rstrip)):
        is_stripping = False
        for i in range(len(stripped))[::step] if ids else ():
            content = stripped[i].content
            if isinstance(content, int):
                is_stripping = content in ids
            elif is_stripping:
                stripped[i] = stripped[i]._replace(content=strip(content))
                is_stripping = not stripped[i].content
    return stripped


def _joined(segments: Iterable[Segment]) -> list[Segment]:
    """The segments, with texts that no cut keeps apart joined into one, and empty texts gone."""
    joined: list[Segment] = []
    for segment in segments:
        if segment.content == "":
            continue
        last = joined[-1] if joined else None
        if (
            last is not None
            and isinstance(last.content, str)
            and isinstance(segment.content, str)
            and last[1:] == segment[1:]
        ):
            joined[-1] = segment._replace(content=last.content + segment.content)
        else:
            joined.append(segment)
    return joined


def _placed(segments: Iterable[Segment]) -> Iterator[tuple[Segment, Place]]:
    """Each segment with the place where it stands."""
    place: Place = "start"
    for segment in segments:
        yield segment, place
        place = "after_special" if isinstance(segment.content, int) else "after_text"


def _encode(
    batch: Iterable[Iterable[Segment]], tokenizer: Tokenizer
) -> dict[tuple[str, Place], list[int]]:
    """The ids of each text among the segments; one that stands often is encoded once a place."""
    texts: dict[Place, dict[str, None]] = {}
    for segment, place in itertools.chain.from_iterable(map(_placed, batch)):
        if isinstance(segment.content, str):
            texts.setdefault(place, {})[segment.content] = None
    return {
        (text, place): ids
        for place, some in texts.items()
        for text, ids in zip(some, tokenizer.encode_batch(list(some), place), strict=True)
    }


def _rendered(segments: Iterable[Segment], ids: dict[tuple[str, Place], list[int]]) -> Rendered:
    tokens: list[int] = []
    trained: list[bool] = []
    for segment, place in _placed(segments):
        content = segment.content
        piece = ids[content, place] if isinstance(content, str) else [content]
        tokens += piece
        trained += [segment.trained] * len(piece)
    return Rendered(tokens, trained)

"""Chat templates written in Jinja, as published models bring them.

Characters that stand nowhere in the conversation mark places in the rendered text: where an answer
starts and ends, and a break inside what would otherwise be read as a special token though it stands
in somebody's message.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llm_jax.data.examples import Conversation, Message
from llm_jax.data.template_base import ChatTemplate, Segment
from llm_jax.data.tokenizer_base import Tokenizer
from llm_jax.errors import UserError

TEMPLATE_FILE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"  # a folder beside TEMPLATE_FILE, a file a template
JSON_FILES = ("chat_template.json", "tokenizer_config.json")

_GENERATION = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")
_PRIVATE_USE = range(0xF0000, 0xFFFFE)


class Marks(NamedTuple):
    """The characters that mark the starts and ends of answers, and breaks."""

    start: str
    end: str
    gap: str


@dataclasses.dataclass(frozen=True)
class JinjaTemplate(ChatTemplate):
    """A Jinja chat template.

    sources: name and text of each template: "default", and perhaps "tool_use" for conversations
    with tools.

    Which tokens the assistant writes is told by {% generation %} tags, whose output is an answer.
    A template without them is rendered a second time with marks in place of the assistant's words,
    which serves where the template writes those words out as they are and no tool is called.

    The prompt of an answer is what stands before it in the whole conversation, as with every
    template, unless the source itself writes its prompts otherwise.
    """

    name: str
    sources: tuple[tuple[str, str], ...]

    def __post_init__(self) -> None:
        for _, source in self.sources:
            _compile(source, self.name)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "jinja": dict(self.sources)}

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        probe = Conversation((Message("user", "a"), Message("assistant", "b")))
        try:
            answer = [s for s in self._segments(probe, tokenizer, is_prompt=False) if s.answer]
        except UserError:  # made to generate with, not to train on
            answer = []
        end = answer[-1].content if answer else ""
        if not isinstance(end, int):
            end = tokenizer.special_ids.get("end_of_turn", tokenizer.eos_id)
        return tuple(dict.fromkeys((end, *tokenizer.eos_ids)))

    def _segments(
        self, conversation: Conversation, tokenizer: Tokenizer, is_prompt: bool
    ) -> list[Segment]:
        source = self._source(conversation)
        marks = _unused_marks(source, conversation)
        specials = _specials(tokenizer, marks)
        text = _Rendering(self.name, source, conversation, specials, is_prompt).text()
        answers = [m.trained for m in conversation.messages if m.role == "assistant"]
        spans = text.count(marks.start)
        if answers and not spans and not is_prompt:
            raise UserError(_no_spans(self.name, conversation))
        flags = answers
        if is_prompt or len(set(answers)) <= 1:
            flags = (answers[:1] or [False]) * spans  # an answer may be written in several spans
        elif len(answers) != spans:
            raise UserError(
                f"{_at(conversation)}the chat template {self.name!r} marks {spans} assistant spans "
                f"for {len(answers)} assistant turns, so those that are not trained cannot be told "
                "apart: train all of them, or use one of the named templates."
            )
        return list(specials.split(text, flags))

    def _source(self, conversation: Conversation) -> str:
        sources = dict(self.sources)
        if conversation.tools and "tool_use" in sources:
            return sources["tool_use"]
        return sources["default"]


def read_jinja(path: Path) -> JinjaTemplate:
    """Reads a .jinja file, a JSON file with a field "chat_template", or a folder with one of them.

    Raises:
      UserError: no template there, or a damaged one.
    """
    if path.is_dir():
        found = template_file(path)
        if found is None:
            raise UserError(
                f"{path} holds no chat template: no {TEMPLATE_FILE}, and no chat_template in "
                f"{' or '.join(JSON_FILES)}."
            )
        path = found
    sources = _sources(path)
    if not sources:
        raise UserError(f"{path} holds no chat template: it is empty, or lacks 'chat_template'.")
    if "default" not in sources:
        raise UserError(f"{path} holds no chat template 'default', it has {', '.join(sources)}.")
    return JinjaTemplate(str(path), tuple(sources.items()))


def template_file(folder: Path) -> Path | None:
    """The file of a folder that holds its chat template; None where there is none.

    Raises:
      UserError: a damaged file.
    """
    candidates = (folder / name for name in (TEMPLATE_FILE, *JSON_FILES))
    return next((file for file in candidates if file.exists() and _sources(file)), None)


class _Specials:
    """The strings of a tokenizer's special tokens, told apart from their like in messages."""

    def __init__(self, tokenizer: Tokenizer, marks: Marks):
        self.tokenizer = tokenizer
        self.marks = marks
        self._strings = tuple(sorted(tokenizer.specials, key=len, reverse=True))
        self._beginnings = {s[:size] for s in self._strings for size in range(1, len(s))}
        firsts = re.escape("".join({string[0] for string in self._strings}))
        self._first = re.compile(f"[{firsts}]")
        start, end, gap = marks
        # The look at the first character spares most places the long list.
        special = f"(?=[{firsts}])(?:{_any_of(self._strings)})(?!{gap})"
        self._places = re.compile(f"({special}|{start}|{end})")
        strings = tokenizer.special_tokens
        ends = _any_of(strings[name] for name in ("eos", "end_of_turn") if name in strings)
        self._ending = re.compile(rf"({special})?{end}({special}|\s+(?:{ends})(?!{gap}))")

    def guard(self, value: Any) -> Any:
        """The value, of JSON's types, with a gap in each string that reads like a special token."""
        if isinstance(value, str):
            return self._guard_text(value)
        if isinstance(value, dict):
            return {self.guard(key): self.guard(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.guard(inner) for inner in value]
        return value

    def split(self, text: str, flags: Iterable[bool]) -> Iterator[Segment]:
        """The pieces of a rendered text; `flags` tell of each answer whether it is trained."""
        remaining = iter(flags)
        kind = outside = Segment("")
        for piece in self._places.split(self._ending.sub(self._end_turn, text)):
            if piece == self.marks.start:
                kind = Segment("", answer=True, trained=next(remaining))
            elif piece == self.marks.end:
                kind = outside
            elif piece:
                id_ = self.tokenizer.special_id(piece)
                content = piece.replace(self.marks.gap, "") if id_ is None else id_
                yield kind._replace(content=content)

    def _end_turn(self, match: re.Match[str]) -> str:
        """Takes the special token after an answer into it, unless the answer ends in one.

        White space may stand before it where the token is made for ends (`self._ending`).
        """
        return match[0] if match[1] else match[2] + self.marks.end

    def _guard_text(self, text: str) -> str:
        starts = (match.start() for match in self._first.finditer(text))
        gaps = {start + 1 for start in starts if text.startswith(self._strings, start)}
        # An end like "<|us" could make a special token with what the template writes after it.
        size = len(text.rstrip())
        tail = range(max(0, size - len(self._strings[0])), size)
        gaps |= {start + 1 for start in tail if text[start:size] in self._beginnings}
        return self.marks.gap.join(
            text[start:end] for start, end in itertools.pairwise([0, *sorted(gaps), len(text)])
        )


@functools.lru_cache(maxsize=8)
def _specials(tokenizer: Tokenizer, marks: Marks) -> _Specials:
    return _Specials(tokenizer, marks)


def _any_of(strings: Iterable[str]) -> str:
    return "|".join(map(re.escape, strings))


@dataclasses.dataclass(frozen=True)
class _Rendering:
    """One conversation on its way through a template."""

    name: str
    source: str
    conversation: Conversation
    specials: _Specials
    is_prompt: bool

    def text(self) -> str:
        """The rendered text with marks around the answers.

        A prompt goes without marks where they cannot be placed.
        """
        plain = self.render(str)
        marked = self.with_marks(plain)
        if marked is None:
            if self.is_prompt:
                return plain
            raise UserError(_no_spans(self.name, self.conversation))
        start = self.specials.marks.start
        space = _space_of_answers(self.name, self.source, self.specials)
        return marked.replace(space + start, start + space)

    def with_marks(self, plain: str) -> str | None:
        """`plain` with marks around the assistant's words, or None where they are not found."""
        if _GENERATION.search(self.source):
            return plain
        answers = [m for m in self.conversation.messages if m.role == "assistant"]
        if any(message.tool_calls for message in answers):
            return None  # the place of the words does not tell where the calls are
        marks = self.specials.marks
        marked, *rest = self.render(lambda words: marks.start).split(marks.start)
        if len(rest) != len(answers) or not plain.startswith(marked):
            return None
        place = len(marked)
        for message, after in zip(answers, rest, strict=True):
            words = self.specials.guard(message.content)
            written = [w for w in (words, words.strip()) if plain.startswith(w + after, place)]
            if not written:
                return None
            marked += f"{marks.start}{written[0]}{marks.end}{after}"
            place += len(written[0] + after)
        return marked if place == len(plain) else None

    def render(self, write: Callable[[str], str]) -> str:
        """Renders with `write(words)` for the assistant's words."""
        messages = self.specials.guard([_fields(m) for m in self.conversation.messages])
        for message in messages:
            if message["role"] == "assistant":
                message["content"] = write(message["content"])
        tokens = self.specials.tokenizer.special_tokens
        try:
            return _compile(self.source, self.name).render(
                messages=messages,
                tools=self.specials.guard(list(self.conversation.tools)) or None,
                documents=None,
                add_generation_prompt=self.is_prompt,
                bos_token=tokens.get("bos", ""),
                eos_token=tokens["eos"],
                pad_token=tokens.get("pad", ""),
                generation_marks=self.specials.marks,
            )
        except Exception as error:  # a template is a program, and fails in as many ways
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise UserError(
                f"{_at(self.conversation)}the chat template {self.name!r} cannot write the "
                f"conversation: {reason}."
            ) from error


@functools.lru_cache(maxsize=8)
def _space_of_answers(name: str, source: str, specials: _Specials) -> str:
    """The white space before an answer that the prompt of the answer lacks: the model writes it."""
    user = Message("user", "a")
    whole = Conversation((user, Message("assistant", "b")))
    try:
        prompt = _Rendering(name, source, Conversation((user,)), specials, True).render(str)
        rendering = _Rendering(name, source, whole, specials, False)
        marked = rendering.with_marks(rendering.render(str)) or ""
    except UserError:  # the template wants more turns than these
        return ""
    before = marked.partition(specials.marks.start)[0]
    space = before[len(prompt) :] if before.startswith(prompt) else ""
    return space if space.isspace() else ""


class _GenerationTag(Extension):
    """{% generation %}…{% endgeneration %}: marks around what is rendered inside."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = nodes.Name("generation_marks", "load")
        call = self.call_method("_mark", [marks])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, marks: Marks, caller: Callable[[], str]) -> str:
        return f"{marks.start}{caller()}{marks.end}"


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where Jinja's own filter escapes what HTML reserves."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


@functools.lru_cache(maxsize=16)
def _compile(source: str, name: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"the chat template {name!r} is no valid Jinja: {error.message} in line {error.lineno}."
        ) from error


def _sources(file: Path) -> dict[str, str]:
    """The templates in a file, by name."""
    try:
        templates: Any = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            templates = json.loads(templates).get("chat_template")
        if isinstance(templates, list):
            return {str(entry["name"]): str(entry["template"]) for entry in templates}
        more = sorted((file.parent / MORE_TEMPLATES).glob("*.jinja"))
        more = more if file.name == TEMPLATE_FILE else []
        others = {path.stem: path.read_text(encoding="utf-8") for path in more}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read as a chat template: {error}.") from error
    return {"default": str(templates), **others} if templates else {}


def _fields(message: Message) -> dict[str, Any]:
    """The message as templates expect it."""
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        fields["tool_calls"] = [
            {"type": "function", "function": call} for call in message.tool_calls
        ]
    if message.name is not None:
        fields["name"] = message.name
    return fields


def _unused_marks(source: str, conversation: Conversation) -> Marks:
    """Characters for private use that stand neither in the template nor in the conversation."""
    used = set(source)
    used.update(_to_json(conversation.tools))
    for message in conversation.messages:
        used.update(message.content, message.name or "", _to_json(message.tool_calls))
    unused = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
    return Marks(next(unused), next(unused), next(unused))


def _at(conversation: Conversation) -> str:
    return f"{conversation.where}: " if conversation.where else ""


def _no_spans(name: str, conversation: Conversation) -> str:
    return (
        f"{_at(conversation)}{name!r} is a chat template without assistant spans: it does not tell "
        "which tokens of this conversation the assistant writes. Put {% generation %} and "
        "{% endgeneration %} around those in the template, or use one of the named templates."
    )

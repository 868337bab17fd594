"""Chat templates as the Jinja text that published models bring, for one tokenizer.

Rendered and tokenised, the text gives the tokens of the template; {% generation %} marks those that
the assistant writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from llm_jax.data.template_base import (
    CALL_END,
    CALL_START,
    RESPONSE_END,
    RESPONSE_START,
    ChatTemplate,
    tools_block,
)
from llm_jax.data.template_jinja import JinjaTemplate
from llm_jax.data.templates import HeaderTemplate, Llama2, Plain
from llm_jax.data.tokenizer_base import Tokenizer

# What all share: `system` is the text of the system turn with the tools in it, or none; `turns` are
# the turns after it; `words` writes an answer with its calls.
_START = """\
{%- if messages and messages[0].role == 'system' %}
    {%- set system, turns = messages[0].content, messages[1:] %}
{%- else %}
    {%- set system, turns = none, messages %}
{%- endif %}
{%- if tools %}
    {%- set before = system + '\\n\\n' if system is not none else '' %}
    {%- set list = namespace(lines=[]) %}
    {%- for tool in tools %}
        {%- set list.lines = list.lines + [tool | tojson] %}
    {%- endfor %}
    {%- set system = before + TOOLS_BEFORE + list.lines | join('\\n') + TOOLS_AFTER %}
{%- endif %}
{%- macro words(message) %}
    {{- message.content or '' }}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n' if message.content or not loop.first else '' }}
        {%- set fields = {'name': call.function.name, 'arguments': call.function.arguments or {}} %}
        {{- CALL_START + fields | tojson + CALL_END }}
    {%- endfor %}
{%- endmacro %}
"""

# A run of tools' turns is one turn of the user.
_TOOL_TURNS = """\
    {%- elif message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}
            {{- RUN_BEFORE }}
        {%- else %}
            {{- '\\n' }}
        {%- endif %}
        {{- RESPONSE_START + message.content + RESPONSE_END }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}
            {{- RUN_AFTER }}
        {%- endif %}
"""

_HEADERS = (
    """\
{%- set headers = HEADERS %}
{{- BOS }}
{%- if system is not none %}
    {{- headers.system + SYSTEM + END + AFTER }}
{%- endif %}
{%- for message in turns %}
    {%- if message.role == 'assistant' %}
        {{- headers.assistant }}
        {%- generation %}
            {{- ANSWER + END }}
        {%- endgeneration %}
        {{- AFTER }}
"""
    + _TOOL_TURNS
    + """\
    {%- else %}
        {{- headers[message.role] + CONTENT + END + AFTER }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- headers.assistant }}
{%- endif %}
"""
)

_LLAMA2 = (
    """\
{%- set lead = namespace(text='') %}
{%- if system is not none %}
    {%- set lead.text = SYSTEM_BEFORE + system + SYSTEM_AFTER %}
{%- endif %}
{%- if not turns or turns[0].role != 'user' %}
    {{- BOS }}
    {%- if system is not none %}
        {{- USER_BEFORE + lead.text | trim + USER_AFTER }}
    {%- endif %}
{%- endif %}
{%- for message in turns %}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {{- ' ' + words(message) | trim + ' ' + EOS }}
        {%- endgeneration %}
"""
    + _TOOL_TURNS
    + """\
    {%- else %}
        {%- set content = lead.text + message.content if loop.first else message.content %}
        {{- BOS + USER_BEFORE + content | trim + USER_AFTER }}
    {%- endif %}
{%- endfor %}
"""
)

_PLAIN = """\
{{- BOS }}
{%- if system is not none %}
    {{- system }}
{%- endif %}
{%- set ends_itself = turns and turns[-1].role == 'assistant' and not add_generation_prompt %}
{%- for message in turns %}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {{- words(message) + (EOS if loop.last and ends_itself else '') }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
{%- endfor %}
{%- if not ends_itself and not add_generation_prompt %}
    {{- EOS }}
{%- endif %}
"""


def jinja_sources(template: ChatTemplate, tokenizer: Tokenizer) -> dict[str, str]:
    """The Jinja text of each form of a template, by name; "default" is among them.

    Args:
      template: a template of any kind.
      tokenizer: whose special tokens the named templates are written in.
    """
    if isinstance(template, JinjaTemplate):
        return dict(template.sources)
    if isinstance(template, HeaderTemplate):
        return {"default": _headers(template, tokenizer)}
    if isinstance(template, Llama2):
        return {"default": _llama2(tokenizer)}
    assert isinstance(template, Plain)
    return {"default": _filled(_PLAIN, tokenizer)}


def _headers(template: HeaderTemplate, tokenizer: Tokenizer) -> str:
    markup = template.markup(tokenizer)
    strings = {id_: string for string, id_ in tokenizer.specials.items()}

    def text(*pieces: str | int) -> str:
        return "".join(piece if isinstance(piece, str) else strings[piece] for piece in pieces)

    headers = {role: text(*pieces) for role, pieces in markup.headers.items()}
    end, trim = text(markup.end), " | trim" if markup.strip else ""
    code = {
        "SYSTEM": f"system{trim}",
        "ANSWER": f"words(message){trim}",
        "CONTENT": f"message.content{trim}",
        "HEADERS": json.dumps(headers, ensure_ascii=False),
    }
    strings_of = {
        "END": end,
        "AFTER": markup.after,
        "RUN_BEFORE": headers["user"],
        "RUN_AFTER": end + markup.after,
    }
    if not markup.bos:
        strings_of["BOS"] = ""
    body = _HEADERS.replace(_TOOL_TURNS, "") if "tool" in headers else _HEADERS
    return _filled(body, tokenizer, strings_of, code)


def _llama2(tokenizer: Tokenizer) -> str:
    before, after = "[INST] ", " [/INST]"
    strings = {
        "SYSTEM_BEFORE": "<<SYS>>\n",
        "SYSTEM_AFTER": "\n<</SYS>>\n\n",
        "USER_BEFORE": before,
        "USER_AFTER": after,
        "RUN_BEFORE": _bos(tokenizer) + before,
        "RUN_AFTER": after,
    }
    return _filled(_LLAMA2, tokenizer, strings)


def _filled(
    body: str,
    tokenizer: Tokenizer,
    strings: Mapping[str, str] | None = None,
    code: Mapping[str, str] | None = None,
) -> str:
    """The start and a body with the words in capitals replaced: by strings, or by code."""
    tools_before, tools_after = tools_block("\0").split("\0")
    strings = {
        "BOS": _bos(tokenizer),
        "EOS": tokenizer.special_tokens["eos"],
        "TOOLS_BEFORE": tools_before,
        "TOOLS_AFTER": tools_after,
        "CALL_START": CALL_START,
        "CALL_END": CALL_END,
        "RESPONSE_START": RESPONSE_START,
        "RESPONSE_END": RESPONSE_END,
        **(strings or {}),
    }
    values = {name: json.dumps(text, ensure_ascii=False) for name, text in strings.items()}
    values |= code or {}
    return re.sub(r"\b[A-Z][A-Z_]+\b", lambda match: values[match[0]], _START + body)


def _bos(tokenizer: Tokenizer) -> str:
    return tokenizer.special_tokens.get("bos", tokenizer.special_tokens["eos"])

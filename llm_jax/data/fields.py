"""Reads the fields of a row that someone else wrote: the value that is wanted, or why it is none.

A field may go by several names: "a|b" is the first of `a` and `b` that is there and not null.
Everything here raises `MalformedExample` where the row holds something else.
"""

from __future__ import annotations

import json
import math
import reprlib
from typing import Any

from llm_jax.data.examples import MalformedExample
from llm_jax.data.readers import no_field, unicode_text

Fields = dict[str, Any]


def has(fields: Fields, names: str) -> bool:
    """Whether one of the names is there with a value."""
    return any(fields.get(name) is not None for name in names.split("|"))


def name_of(fields: Fields, names: str) -> str:
    """The name by which the field goes.

    Raises:
      MalformedExample: the row has no such field.
    """
    for name in names.split("|"):
        if fields.get(name) is not None:
            return name
    for name in names.split("|"):
        if name in fields:
            raise MalformedExample(f"{name!r} is null")
    raise MalformedExample(no_field(names, fields))


def value_of(fields: Fields, names: str) -> Any:
    """The value of a field, never None.

    Raises:
      MalformedExample: the row has no such field.
    """
    return fields[name_of(fields, names)]


def text_of(fields: Fields, names: str) -> str:
    """The text of a field.

    Raises:
      MalformedExample: the row has no such field, or the field holds no Unicode text.
    """
    name = name_of(fields, names)
    return as_text(fields[name], name)


def optional_text(fields: Fields, names: str) -> str:
    """The text of a field, empty where the row has none.

    Raises:
      MalformedExample: the field holds no Unicode text.
    """
    return text_of(fields, names) if has(fields, names) else ""


def list_of(fields: Fields, names: str) -> list[Any]:
    """The list of a field.

    Raises:
      MalformedExample: the row has no such field, or the field holds no list.
    """
    name = name_of(fields, names)
    return as_list(fields[name], name)


def as_text(value: Any, field: str) -> str:
    """The value as a string.

    Raises:
      MalformedExample: it is no Unicode text.
    """
    try:
        return unicode_text(value, field)
    except ValueError as error:
        raise MalformedExample(str(error)) from None


def as_list(value: Any, field: str) -> list[Any]:
    """The value as a list.

    Raises:
      MalformedExample: it is none.
    """
    if not isinstance(value, list | tuple):
        raise MalformedExample(f"{field!r} is {type(value).__name__}, a list is wanted")
    return list(value)


def as_object(value: Any, what: str) -> Fields:
    """The value as an object of fields.

    Raises:
      MalformedExample: it is none.
    """
    if not isinstance(value, dict):
        raise MalformedExample(f"{what} is {type(value).__name__}, an object is wanted")
    return value


def as_json(value: Any, what: str) -> Any:
    """What the value describes: itself, or what it is the JSON of; None for an empty string.

    Raises:
      MalformedExample: it is not JSON.
    """
    try:
        if isinstance(value, str):
            value = json.loads(value) if value.strip() else None
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise MalformedExample(f"{what} is not JSON ({error})") from None
    return value


def as_number(value: Any, field: str) -> float:
    """The value as a finite number.

    Raises:
      MalformedExample: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise MalformedExample(f"{field!r} holds {reprlib.repr(value)}, a number is wanted")
    return float(value)


def as_truth(value: Any, field: str) -> bool:
    """Whether the value says yes: a truth value, 1 or 0, or a word such as "true" or "no".

    Raises:
      MalformedExample: it says neither.
    """
    word = value.strip().lower() if isinstance(value, str) else value
    if word in (True, "true", "yes", "1"):
        return True
    if word in (False, "false", "no", "0"):
        return False
    raise MalformedExample(f"{field!r} is {reprlib.repr(value)}, true or false is wanted")

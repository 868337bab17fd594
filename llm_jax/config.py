"""From frozen dataclasses to ml_collections configs and back.

A default stands once, in the dataclass of the module that uses it. `defaults` turns such a
dataclass into a ConfigDict whose every leaf can be overridden on the command line; `build` turns
the resolved ConfigDict back, and refuses a key that no module knows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import ml_collections
from ml_collections import config_dict

from llm_jax.errors import UserError, did_you_mean

T = TypeVar("T")


def defaults(cls: type, **changes: Any) -> ml_collections.ConfigDict:
    """A ConfigDict with every field of the dataclass `cls` at its default.

    Nested dataclasses become nested ConfigDicts; a field whose default is None becomes a typed
    placeholder, because a plain None could not be overridden.

    Raises:
      UserError: `changes` names a field that `cls` does not have.
    """
    config = ml_collections.ConfigDict()
    hints = _hints(cls)
    for field in dataclasses.fields(cls):
        value = changes.pop(field.name) if field.name in changes else _default(field)
        config[field.name] = _to_config(value, hints[field.name])
    if changes:
        name = next(iter(changes))
        raise UserError(f"{cls.__name__} has no field {name!r}.{did_you_mean(name, hints)}")
    return config


def build(cls: type[T], config: Any, path: str = "config") -> T:
    """The frozen dataclass `cls` from a ConfigDict or mapping.

    Raises:
      UserError: an unknown key, or a value of the wrong type; the message names the full path.
    """
    hints = _hints(cls)
    values = dict(config.items())
    for name in values:
        if name not in hints:
            raise UserError(f"{path} has no key {name!r}.{did_you_mean(name, hints)}")
    built = {
        name: _from_config(value, hints[name], f"{path}.{name}") for name, value in values.items()
    }
    try:
        return cls(**built)
    except TypeError as error:
        raise UserError(f"{path}: {error}") from error


def parse_argument(argument: str | None, **defaults: str) -> dict[str, str]:
    """The parts of a config file's argument, `size=tiny,other=x`, over their defaults.

    Raises:
      UserError: a part that is not NAME=VALUE, or a name without a default.
    """
    values = dict(defaults)
    for part in filter(None, (argument or "").split(",")):
        name, equals, value = part.partition("=")
        if not equals or name not in defaults:
            raise UserError(
                f"config argument {part!r} is not understood: give NAME=VALUE, where the name is "
                f"one of {', '.join(defaults)}."
            )
        values[name] = value
    return values


def resolved(config: Any) -> Any:
    """The config as plain JSON values (dict, list, str, int, float, bool, None)."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: resolved(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, (ml_collections.ConfigDict, ml_collections.FrozenConfigDict, dict)):
        return {key: resolved(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [resolved(value) for value in config]
    return config


def digest(value: Any) -> str:
    """A short stable hash of a JSON-able value."""
    text = json.dumps(resolved(value), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of a resolved config by dotted path, list items as `phases[0].length`."""
    if isinstance(config, dict):
        items = [(f"{prefix}.{key}" if prefix else key, value) for key, value in config.items()]
    elif isinstance(config, list) and any(isinstance(v, (dict, list)) for v in config):
        items = [(f"{prefix}[{i}]", value) for i, value in enumerate(config)]
    else:
        return {prefix: config}
    return {path: leaf for key, value in items for path, leaf in flatten(value, key).items()}


ABSENT = "\0absent"  # a setting that a config does not have


def used(config: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, Any]:
    """A run's resolved config as the run used it: the architecture is what its checkpoints' meta
    says, and a stage that came from another has no tokenizer of its own."""
    whole = {**config, **({"model": meta["model"]} if "model" in meta else {})}
    return {k: v for k, v in whole.items() if k != "tokenizer" or not meta.get("lineage")}


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """The leaves that are not the same in all resolved configs, by dotted path: the value in each,
    `ABSENT` where it has none."""
    leaves = [flatten(dict(config)) for config in configs]
    keys = dict.fromkeys(key for config in leaves for key in config)
    found = {key: tuple(config.get(key, ABSENT) for config in leaves) for key in keys}
    return {
        key: values
        for key, values in found.items()
        if len({json.dumps(value) for value in values}) > 1
    }


def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None


def _to_config(value: Any, hint: Any) -> Any:
    if value is None:
        members = [m for m in _members(hint) if m is not type(None)]
        if typing.get_origin(members[0]) is typing.Literal:
            members = [type(typing.get_args(members[0])[0])]
        simple = members[0] if len(members) == 1 and isinstance(members[0], type) else object
        return config_dict.placeholder(simple if not dataclasses.is_dataclass(simple) else object)
    if dataclasses.is_dataclass(value):
        return defaults(
            type(value), **{f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        )
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        return tuple(_to_config(item, type(item)) for item in value)
    if isinstance(value, dict):
        return ml_collections.ConfigDict(value)
    return value


def _from_config(value: Any, hint: Any, path: str) -> Any:
    members = _members(hint)
    if value is None:
        if type(None) in members or Any in members:
            return None
        raise UserError(f"{path} is required and was not given.")
    for member in members:
        origin = typing.get_origin(member) or member
        if dataclasses.is_dataclass(member):
            if hasattr(value, "items"):
                return build(typing.cast(type, member), value, path)
        elif origin is tuple:
            if isinstance(value, (tuple, list)):
                item = typing.get_args(member)[0]
                return tuple(_from_config(v, item, f"{path}[{i}]") for i, v in enumerate(value))
        elif origin is dict:
            if hasattr(value, "items"):
                item = typing.get_args(member)[1]
                return {k: _from_config(v, item, f"{path}.{k}") for k, v in value.items()}
        elif origin is typing.Literal:
            if value in typing.get_args(member):
                return value
            choices = [str(c) for c in typing.get_args(member)]
            raise UserError(f"{path}={value!r} is not one of {', '.join(choices)}.")
        elif origin is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        elif member is Any or (
            isinstance(value, origin) and not (isinstance(value, bool) and origin is not bool)
        ):
            return value
    wanted = " or ".join(getattr(m, "__name__", str(m)) for m in members if m is not type(None))
    raise UserError(f"{path}={value!r} is of the wrong type: {wanted} is wanted.")


def _members(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)

"""Dataclasses to configs and back, and every config of the repository."""

import dataclasses
import importlib.util
import inspect
import json
from pathlib import Path
from typing import Literal

import ml_collections
import pytest

from llm_jax.config import (
    ABSENT,
    build,
    defaults,
    differences,
    digest,
    flatten,
    parse_argument,
    resolved,
)
from llm_jax.errors import UserError, did_you_mean
from llm_jax.main import parse
from llm_jax.models.config import check_length
from llm_jax.models.presets import PRESETS
from llm_jax.trainers import TRAINERS
from tools.sweep.points import read_sweep, resolve

ROOT = Path(__file__).parents[1]
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.py"))
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.py") if path not in SWEEPS)
STAGES = [path for path in CONFIGS if path.stem != "evaluation"]  # which has tasks


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int = 3
    note: str | None = None


@dataclasses.dataclass(frozen=True)
class Outer:
    size: int
    rate: float = 0.5
    is_on: bool = False
    kind: Literal["a", "b"] = "a"
    limit: int | None = None
    inner: Inner = Inner()
    optional: Inner | None = None
    parts: tuple[Inner, ...] = (Inner(1), Inner(2))
    names: tuple[str, ...] = ("x", "y")
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    choice: Literal["a", "b"] | None = None


# --- round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", [
    Outer(1),
    Outer(2, 0.25, True, "b", 7, Inner(9, "n"), Inner(4), (Inner(5),), ("z",), {"w": 0.5}, "b"),
    Outer(1, parts=(), names=()),
])  # fmt: skip
def test_a_dataclass_comes_back_from_its_config(outer):
    fields = {field.name: getattr(outer, field.name) for field in dataclasses.fields(outer)}
    config = defaults(Outer, **fields)
    assert isinstance(config, ml_collections.ConfigDict)
    assert build(Outer, config) == outer
    assert build(Outer, json.loads(json.dumps(resolved(config)))) == outer
    assert resolved(config) == resolved(outer)


def test_absent_values_are_placeholders_that_take_their_type_alone():
    config = defaults(Outer, size=1)
    config.limit, config.inner.note, config.choice = 4, "n", "b"
    built = build(Outer, config)
    assert (built.limit, built.inner.note, built.choice) == (4, "n", "b")
    with pytest.raises(TypeError):
        config.limit = "four"
    with pytest.raises(TypeError):
        config.choice = 3
    config.choice = "c"
    with pytest.raises(UserError, match=r"config\.choice='c' is not one of a, b"):
        build(Outer, config)


def test_a_locked_type_is_kept_by_the_config():
    config = defaults(Outer, size=1)
    with pytest.raises(TypeError):
        config.size = 1.5
    config.sise = 1  # in code a new key can be set; it is refused when the config is used
    with pytest.raises(UserError, match="has no key 'sise'"):
        build(Outer, config)


def test_an_integer_is_a_float_where_one_is_wanted():
    built = build(Outer, {"size": 1, "rate": 2})
    assert built.rate == 2.0 and isinstance(built.rate, float)


# --- refusals -------------------------------------------------------------------------------------


def test_defaults_refuse_a_field_that_does_not_exist():
    with pytest.raises(UserError, match=r"Outer has no field 'sise'\. Did you mean 'size'\?"):
        defaults(Outer, sise=1)


@pytest.mark.parametrize("values, message", [
    ({"size": 1, "rtae": 2.0}, "config has no key 'rtae'. Did you mean 'rate'?"),
    ({"size": 1, "inner": {"widht": 2}}, "config.inner has no key 'widht'. Did you mean 'width'?"),
    ({"size": 1, "parts": [{"widht": 2}]}, "config.parts[0] has no key 'widht'."),
    ({"size": None}, "config.size is required and was not given."),
    ({}, "config: "),
    ({"size": "1"}, "config.size='1' is of the wrong type: int is wanted."),
    ({"size": True}, "config.size=True is of the wrong type: int is wanted."),
    ({"size": 1, "is_on": 1}, "config.is_on=1 is of the wrong type: bool is wanted."),
    ({"size": 1, "rate": True}, "config.rate=True is of the wrong type"),
    ({"size": 1, "kind": "c"}, "config.kind='c' is not one of a, b."),
    ({"size": 1, "limit": 1.5}, "config.limit=1.5 is of the wrong type: int is wanted."),
    ({"size": 1, "inner": 3}, "config.inner=3 is of the wrong type: Inner is wanted."),
    ({"size": 1, "names": "xy"}, "config.names='xy' is of the wrong type"),
    ({"size": 1, "names": ["x", 1]}, "config.names[1]=1 is of the wrong type: str is wanted."),
    ({"size": 1, "weights": {"w": "x"}}, "config.weights.w='x' is of the wrong type"),
])  # fmt: skip
def test_build_names_the_path_of_what_is_wrong(values, message):
    with pytest.raises(UserError) as caught:
        build(Outer, values)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_suggestions_are_close_or_the_short_list():
    assert did_you_mean("lenght", ["length", "batch"]) == " Did you mean 'length'?"
    assert did_you_mean("zzz", ["b", "a"]) == " Known: a, b."
    assert did_you_mean("zzz", [f"name{i}" for i in range(25)]) == ""


# --- arguments ------------------------------------------------------------------------------------


def test_an_argument_overrides_its_defaults():
    assert parse_argument(None, size="tiny") == {"size": "tiny"}
    assert parse_argument("", size="tiny") == {"size": "tiny"}
    parsed = parse_argument("size=1b,mesh=v5e=16", size="tiny", mesh="", other="x")
    assert parsed == {"size": "1b", "mesh": "v5e=16", "other": "x"}


@pytest.mark.parametrize("argument", ["tiny", "siez=tiny", "size=a,b", "=tiny"])
def test_an_argument_that_is_not_understood_is_refused(argument):
    with pytest.raises(UserError, match="is not understood: give NAME=VALUE"):
        parse_argument(argument, size="tiny")


# --- plain values ---------------------------------------------------------------------------------


def test_leaves_are_named_by_their_path():
    config = {"a": {"b": 1}, "phases": [{"length": 2, "names": ["x"]}, {"length": 3}], "c": []}
    assert flatten(config) == {
        "a.b": 1, "phases[0].length": 2, "phases[0].names": ["x"], "phases[1].length": 3, "c": [],
    }  # fmt: skip


def test_a_digest_depends_on_values_and_not_on_order_or_container():
    value = digest({"a": 1, "b": (1, 2)})
    assert value == digest({"b": [1, 2], "a": 1})
    assert value != digest({"a": 1, "b": [2, 1]})
    assert digest(Inner(3)) == digest({"width": 3, "note": None})


# --- the configs of the repository ----------------------------------------------------------------


def load(path, argument=None):
    module_spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    takes_argument = bool(inspect.signature(module.get_config).parameters)
    return module.get_config(argument) if takes_argument else module.get_config()


def build_stage(config):
    return build(TRAINERS[config.trainer].config, config)


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_every_config_opens_with_its_command_and_builds(path):
    text = path.read_text()
    assert text.startswith('"""')
    assert f"python -m llm_jax.main --config={path.relative_to(ROOT)}" in text.split('"""')[1]
    config = load(path)
    stages = [config[name] for name in config.stages] if "stages" in config else [config]
    assert all(build_stage(stage).phases for stage in stages)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_opens_with_its_command_and_its_points_build(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    name = str(path.relative_to(ROOT))
    assert f"python -m tools.sweep --config={name}" in path.read_text().split('"""')[1]
    points = resolve(read_sweep(name, [], []))
    assert len({point.hash for point in points}) == len(points) > 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_leaf_of_every_config_can_be_overridden_by_its_path(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    leaves = flatten(resolved(load(path)))
    flags = [
        f"--config.{leaf}={value}"
        for leaf, value in leaves.items()
        if isinstance(value, (bool, int, float, str))
        and value != ""
        and not leaf.startswith("stages")
    ]
    assert len(flags) > 50
    config, _ = parse(["main", f"--config={path.relative_to(ROOT)}", *flags])
    assert flatten(resolved(config)) == leaves


def test_a_placeholder_and_one_item_of_a_list_can_be_overridden(monkeypatch):
    monkeypatch.chdir(ROOT)
    path = Path("configs/pretrain.py")
    config, _ = parse(
        ["main", f"--config={path}", "--config.phases[1].length=48",
         "--config.phases[1].tokens=960"]
    )  # fmt: skip
    assert config.phases[1].length == 48 and config.phases[1].tokens == 960
    assert config.phases[0].length == load(path).phases[0].length


@pytest.mark.parametrize("size", ["tiny", *PRESETS])
def test_every_size_of_pretraining_builds_and_fits_its_positions(size):
    built = build_stage(load(ROOT / "configs" / "pretrain.py", f"size={size}"))
    for phase in built.phases:
        check_length(built.model, phase.length)


def test_differences_are_the_leaves_that_are_not_the_same_everywhere():
    first = {"seed": 0, "phases": [{"length": 4}], "model": {"moe": None, "heads": 2}}
    second = {"seed": 0, "phases": [{"length": 8}], "model": {"moe": {"experts": 4}, "heads": 2}}
    assert differences([first, second]) == {
        "phases[0].length": (4, 8),
        "model.moe": (None, ABSENT),
        "model.moe.experts": (ABSENT, 4),
    }
    assert differences([first, first]) == {}

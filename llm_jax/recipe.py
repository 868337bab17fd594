"""A recipe: stages that run one after another, each in its own folder under one workdir."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from llm_jax import checkpoint
from llm_jax.binding import binding_digest
from llm_jax.config import build, defaults, flatten, resolved
from llm_jax.distributed import wait_for_all
from llm_jax.errors import UserError
from llm_jax.json_files import require_json
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.metrics import read_metrics_file
from llm_jax.yardstick import Measurements, YardstickConfig

RECIPE = "recipe"  # what `config.trainer` says
BEST = "best"  # what stands for the best stage so far
STAGES = "stages"  # the order in which they run
_YARDSTICK = "yardstick"

# What the report shows of each stage's evaluations, where it is measured.
_SHOWN = (
    "bits_per_byte",
    "loss",
    "exact_match",
    "token_f1",
    "accuracy",
    "calibration_error",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "reward",
)


def recipe(
    *, yardstick: YardstickConfig | None = None, **stages: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
    """The config of a recipe: stages by name, in their order.

    In any text of a stage's config "{NAME}" stands for the folder of a stage before it, so that
    init_from="{sft}" starts from what that left and data.source="{sft}/pairs" reads what it wrote.
    Every leaf of every stage can be overridden: --config.sft.optimizer.learning_rate=1e-4.

    A yardstick measures its `stages` as soon as they are finished, and so are those that its texts
    name; "{best}" is the folder of the one, of those so far, whose answers have the highest mean
    reward.
    """
    config = ml_collections.ConfigDict({"trainer": RECIPE, STAGES: tuple(stages), **stages})
    if yardstick is not None:
        config[_YARDSTICK] = defaults(YardstickConfig, **vars(yardstick))
    return config


def load_config(path: Path, argument: str | None = None) -> ml_collections.ConfigDict:
    """What `get_config` of another config file returns."""
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument)


def run_recipe(config: Any, workdir: Path, run: Callable[[Any, Path], int]) -> int:
    """Runs the stages with `run(config, workdir)`; those that are finished are left alone.

    Returns:
      The exit status: 0 when all stages are finished, else that of the one that was stopped.

    Raises:
      UserError: a stage that cannot run, or that was made from another version of the one before.
    """
    names = tuple(config[STAGES])
    _check_names(config, names)
    yardstick = config.get(_YARDSTICK)
    measured, waiting = Measurements(workdir / "yardstick.jsonl"), list[str]()
    folders: dict[str, Path] = {}  # of finished stages, and of the best one
    for number, name in enumerate(names, start=1):
        folder = workdir / name
        _say(f"stage {number} of {len(names)}: {name}, in {folder}")
        stage = _filled(config[name], folders)
        _check_parent(folder)
        status = run(stage, folder)
        if status:
            return status
        wait_for_all(f"stage {name} is finished")  # the next one reads what process 0 has written
        folders[name] = folder.resolve()
        if yardstick is None:
            continue
        waiting += [name] if name in yardstick.stages else []
        if _named(yardstick, names) <= folders.keys():
            filled = build(YardstickConfig, _filled(yardstick, folders))
            mesh = make_mesh(build(MeshConfig, stage.mesh))
            for each in waiting:
                _say(measured.take(each, folders[each], filled, mesh, _say))
            waiting.clear()
        if measured.best is not None:
            folders[BEST] = folders[measured.best.stage]
    if jax.process_index() == 0:
        report = describe({name: workdir / name for name in names}) + measured.describe()
        (workdir / "report.md").write_text(report, encoding="utf-8")
        _say(f"\n{report}\nreport: {workdir / 'report.md'}")
    return 0


def _check_names(config: ml_collections.ConfigDict, names: Sequence[str]) -> None:
    """
    Raises:
      UserError: a stage names one that does not come before it, or the best of none.
    """
    finished: set[str] = set()
    yardstick = config.get(_YARDSTICK)
    for name in names:
        missing = sorted(_named(config[name], (*names, BEST)) - finished)
        if missing:
            raise UserError(
                f"config.{name} names {{{missing[0]}}}, and no such stage is finished by then."
            )
        finished.add(name)
        if yardstick is not None and _named(yardstick, names) <= finished:
            finished |= {BEST} if finished & set(yardstick.stages) else set()


def _named(config: ml_collections.ConfigDict, names: Sequence[str]) -> set[str]:
    """Which of the names the texts of a config have in braces."""
    texts = [str(leaf) for leaf in flatten(resolved(config)).values()]
    return {name for name in names if any(f"{{{name}}}" in text for text in texts)}


def _filled(
    config: ml_collections.ConfigDict, folders: Mapping[str, Path]
) -> ml_collections.ConfigDict:
    """A copy of a config with folders where its texts name stages."""

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            for name, folder in folders.items():
                value = value.replace(f"{{{name}}}", str(folder))
            return value
        if isinstance(value, ml_collections.ConfigDict):
            for key, item in list(value.items()):
                if fill(item) != item:
                    value[key] = fill(item)
            return value
        return type(value)(map(fill, value)) if isinstance(value, (tuple, list)) else value

    return fill(copy.deepcopy(config))


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def _check_parent(folder: Path) -> None:
    """Refuses a stage that has begun and whose parent has been made anew with another config."""
    own = checkpoint.newest_meta(folder)
    if own is None or not own[1]["lineage"]:
        return
    before = own[1]["lineage"][-1]
    parent = Path(before["run"])
    if (parent / "config.json").exists() and binding_digest(parent) != before["config"]:
        raise UserError(
            f"{folder} was made from {parent} before that was made anew with another config: "
            f"delete {folder} to make it again, too."
        )


def describe(folders: Mapping[str, Path]) -> str:
    """A Markdown table of stages: what they cost, and their held-out figures, first and last."""
    lines = [
        "| stage | steps | tokens | seconds | held out, from the first evaluation to the last |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, folder in folders.items():
        result = _result(folder)
        figures = "; ".join(_figures(read_metrics_file(folder / "metrics.jsonl")))
        lines.append(
            f"| {name} | {result['step']:,} | {result['tokens']:,} | {result['seconds']:.0f} "
            f"| {figures} |"
        )
    return "\n".join(lines) + "\n"


def _figures(records: list[dict[str, float]]) -> list[str]:
    series: dict[str, list[float]] = {}
    for record in records:
        for key, value in record.items():
            parts = key.split("/", 2)
            if parts[0] == "eval" and len(parts) == 3 and parts[2] in _SHOWN:
                series.setdefault(f"{parts[1]} {parts[2]}", []).append(value)
    return [f"{key} {values[0]:.3f} → {values[-1]:.3f}" for key, values in series.items()]


def _result(folder: Path) -> dict[str, Any]:
    return require_json(folder / "result.json")

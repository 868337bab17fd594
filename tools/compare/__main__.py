"""Tells whether the difference between runs is real, and how sure that is.

    python -m tools.compare RUN[@STEP] RUN[@STEP] ... [--output=F.json] [--plot=F.png]

Runs whose configs differ in nothing but the seed are one model, as in tools.plot --mean. The first
model, A, is compared with each other one, B, on the same documents or examples: those of
RUN/evaluation.json where all runs have tasks in common, else the documents that the runs held out,
on which they are then measured by the task "perplexity" of tools.evaluate. The interval is that of
a bootstrap in pairs over documents or examples, and over the seeds where there are several. Runs of
different tokenizers are compared in bits per byte alone.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from llm_jax.errors import UserError
from tools.cli import run_tool

if TYPE_CHECKING:
    from llm_jax.evals.bootstrap import Difference
    from tools.compare.units import Measures


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Of two models on one measure, which is the key of a task."""

    a: str
    b: str
    task: str
    key: str
    lower_is_better: bool
    found: Difference

    @property
    def probability_a_better(self) -> float:
        lower = self.found.probability_lower
        return lower if self.lower_is_better else 1 - lower


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string("output", None, "JSON file of what was found", flag_values=values)
    flags.DEFINE_string("plot", None, "picture of the curves: .png, .svg", flag_values=values)
    flags.DEFINE_list("keys", ["loss"], "keys of metrics.jsonl to plot", flag_values=values)
    flags.DEFINE_integer(
        "documents", 1000, "held-out documents at most, of each component", 2, flag_values=values
    )
    flags.DEFINE_integer("resamples", 10_000, "of the bootstrap", 100, flag_values=values)
    flags.DEFINE_float("confidence", 0.95, "of the intervals", 0.5, 0.9999, flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the bootstrap", flag_values=values)
    return values


def main(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    if len(arguments) < 2:
        raise UserError("two runs or more are wanted: python -m tools.compare RUN_A RUN_B.")
    if len(set(arguments)) < len(arguments):
        raise UserError("a run is named twice: name each once.")
    from llm_jax.checkpoint import locate
    from tools.plot import group_name

    places = [locate(argument) for argument in arguments]
    folders = [path for path, _ in places]
    distinct = len({path.name for path in folders}) == len(folders)
    names = [
        path.name if distinct else argument
        for path, argument in zip(folders, arguments, strict=True)
    ]
    notes: list[str] = []
    groups = _groups(folders, notes)
    models = {group_name([names[place] for place in group]): group for group in groups}
    if values.plot:
        _plot(models, folders, values.keys, values.plot)
    measures = _measures(arguments, places, names, values.documents, notes)
    found = _compare(models, measures, values, notes)
    if not found:
        raise UserError(f"nothing can be compared: {'; '.join(notes)}.")
    for name, group in models.items():
        if len(group) == 1:
            notes.append(f"{name} is one seed: the noise of seeds is unknown and in no interval")
    changed = _differences(models, places)
    print(_describe(found, changed, list(models), notes, values.confidence))
    if values.output:
        _write(Path(values.output), found, changed, models, names, notes, values)
    for output in filter(None, (values.plot, values.output)):
        print(output)


def _groups(folders: Sequence[Path], notes: list[str]) -> list[list[int]]:
    """The runs of each model, by their places. Checkpoints of one run are models of their own, and
    so are runs of which there is nothing but seeds to compare."""
    from tools.plot import by_config

    alone = [[place] for place in range(len(folders))]
    if len(set(folders)) < len(folders):
        return alone
    groups = [[folders.index(path) for path in group] for group in by_config(folders)]
    if len(groups) == 1:
        notes.append("the runs differ in their seeds alone: what differs is noise of seeds")
        return alone
    return groups


def _plot(
    models: Mapping[str, Sequence[int]], folders: Sequence[Path], keys: Sequence[str], output: str
) -> None:
    from llm_jax.metrics import read_metrics_file
    from tools.plot import plot

    runs = {
        name: [read_metrics_file(folders[place] / "metrics.jsonl") for place in group]
        for name, group in models.items()
    }
    plot(runs, keys, output)


def _measures(
    arguments: Sequence[str],
    places: Sequence[tuple[Path, int]],
    names: Sequence[str],
    documents: int,
    notes: list[str],
) -> list[Measures]:
    """Of each run what evaluation.json tells, or else what it makes of its held-out documents."""
    from tools.compare.units import measure, of_evaluations, read_evaluation

    records = [read_evaluation(path, step, notes) for path, step in places]
    found = of_evaluations(names, records, notes)
    if not any(found):
        try:
            records = measure(arguments, documents, notes)
        except UserError as error:
            mend = "To compare such runs, measure all of them by tools.evaluate on one source."
            told = (f"({note}.)" for note in notes)
            raise UserError(" ".join([str(error), mend, *told])) from error
        found = of_evaluations(names, records, notes)
    if len({record.get("tokenizer") for record in records}) > 1:
        notes.append("the runs have different tokenizers: only bits per byte can be compared")
    return found


def _compare(
    models: Mapping[str, Sequence[int]],
    measures: Sequence[Measures],
    values: flags.FlagValues,
    notes: list[str],
) -> list[Comparison]:
    """The first model with each other one, on each measure."""
    from llm_jax.evals.bootstrap import compare
    from llm_jax.measures import best_end
    from tools.compare.units import paired

    found = []
    first, *others = models
    for task, key in dict.fromkeys(pair for of_run in measures for pair in of_run):
        for other in others:
            groups = [[measures[place] for place in models[name]] for name in (first, other)]
            samples = paired(groups, (task, key), notes)
            if samples is None:
                continue
            difference = compare(
                *samples,
                confidence=values.confidence,
                resamples=values.resamples,
                seed=values.seed,
            )
            found.append(Comparison(first, other, task, key, best_end(key) == "lowest", difference))
    return found


def _differences(
    models: Mapping[str, Sequence[int]], places: Sequence[tuple[Path, int]]
) -> dict[str, tuple[Any, ...]]:
    """The settings in which the models differ; of each its first seed's."""
    from llm_jax.checkpoint import newest_meta
    from llm_jax.config import differences, used
    from llm_jax.json_files import read_json

    configs = []
    for group in models.values():
        path, _ = places[group[0]]
        config = read_json(path / "config.json") or {}
        _, meta = newest_meta(path) or (0, {})
        configs.append(used(config, meta))
    changed = differences(configs)
    if any(len(group) > 1 for group in models.values()):
        changed.pop("seed", None)
    return changed


def _describe(
    found: Sequence[Comparison],
    changed: Mapping[str, tuple[Any, ...]],
    models: Sequence[str],
    notes: Sequence[str],
    confidence: float,
) -> str:
    from rich.console import Console
    from rich.table import Table

    from llm_jax.config import ABSENT
    from tools.report.words import minus, setting

    console = Console(highlight=False, soft_wrap=True, width=200)
    with console.capture() as capture:
        for other in models[1:]:
            table = Table(title=f"A = {models[0]}\nB = {other}", title_justify="left", box=None)
            table.add_column("measure")
            for name in (
                "A",
                "B",
                "A - B",
                f"{100 * confidence:g} % interval",
                "A is better",
                "units",
            ):
                table.add_column(name, justify="right")
            for one in (each for each in found if each.b == other):
                d = one.found
                table.add_row(
                    f"{one.task} {one.key}",
                    f"{d.a:.4f}",
                    f"{d.b:.4f}",
                    minus(f"{d.difference:+.4f}"),
                    minus(f"{d.low:+.4f} to {d.high:+.4f}"),
                    _share(one.probability_a_better),
                    f"{d.units:,}",
                )
            console.print(table)
        shown = {key: row for key, row in changed.items() if ABSENT not in row}
        if shown:
            table = Table("setting", *models, title="settings", title_justify="left", box=None)
            for key, row in shown.items():
                table.add_row(key, *(setting(value) for value in row))
            console.print(table)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    notes = list(dict.fromkeys(notes))
    if len(shown) < len(changed):
        notes.append(f"{len(changed) - len(shown)} more settings are those of some of them alone")
    return "\n".join([*lines, *(f"note: {note}." for note in notes)])


def _share(probability: float) -> str:
    """Of resamples, of which there are not enough for 100 %."""
    if probability > 0.999:
        return "> 99.9 %"
    return "< 0.1 %" if probability < 0.001 else f"{probability:.1%}".replace("%", " %")


def _write(
    output: Path,
    found: Sequence[Comparison],
    changed: Mapping[str, tuple[Any, ...]],
    models: Mapping[str, Sequence[int]],
    names: Sequence[str],
    notes: Sequence[str],
    values: flags.FlagValues,
) -> None:
    from llm_jax.config import ABSENT
    from llm_jax.json_files import write_json

    record = {
        "models": {name: [names[place] for place in group] for name, group in models.items()},
        "confidence": values.confidence,
        "resamples": values.resamples,
        "comparisons": [
            {
                **{k: v for k, v in dataclasses.asdict(one).items() if k != "found"},
                **{
                    k: v
                    for k, v in dataclasses.asdict(one.found).items()
                    if k not in ("a", "b", "probability_lower")
                },
                "value_a": one.found.a,
                "value_b": one.found.b,
                "probability_a_better": one.probability_a_better,
            }
            for one in found
        ],
        # A setting that a model does not have is not among its.
        "differences": {
            key: {n: v for n, v in zip(models, row, strict=True) if v != ABSENT}
            for key, row in changed.items()
        },
        "notes": list(dict.fromkeys(notes)),
    }
    try:
        write_json(output, record)
    except OSError as error:
        raise UserError(f"--output={output} cannot be written: {error.strerror}.") from error


if __name__ == "__main__":
    sys.exit(run_tool(main, define_flags(), __doc__ or "", takes_arguments=True))

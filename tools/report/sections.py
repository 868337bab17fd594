"""The section of one run: curves, samples, and the settings that its parent has otherwise."""

from __future__ import annotations

from collections.abc import Iterable

from llm_jax.config import ABSENT, differences, used
from llm_jax.measures import is_figure
from tools.report import words
from tools.report.charts import COLORS, Chart, Series, draw
from tools.report.content import Cell, Section, Table, anchor, make_table
from tools.report.reading import Run

# Curves that are shown first, where they were recorded; the others are folded away.
FIRST = (
    "loss",
    "bits_per_byte",
    "reward",
    "accuracy",
    "exact_match",
    "token_f1",
    "rewards/accuracies",
    "rewards/margins",
    "kl",
    "entropy",
    "completion_length",
    "grad_norm",
    "learning_rate",
)
OPEN = 3  # charts that are not folded away
NOT_CURVES = ("step", "tokens", "epoch", "phase", "length")
EXAMPLES = 3  # of each task of an evaluation
SAMPLE_CHARACTERS = 2000


def make_section(run: Run, parent: Run | None, with_charts: bool) -> Section:
    changes, alone = (None, None) if parent is None else _changes(run, parent)
    charts = list(_charts(run)) if with_charts else []
    origin = [] if run.stage == run.name else [run.stage]
    origin += [] if parent is None else [f"from {parent.name}"]
    return Section(
        anchor=anchor(run),
        title=run.name,
        subtitle=", ".join(origin),
        status=run.status,
        problems=(*run.problems, *_failed(run)),
        changes=changes,
        alone=alone,
        charts=tuple(charts[:OPEN]),
        more_charts=tuple(charts[OPEN:]),
        samples=tuple((step, _cut(text)) for step, text in reversed(run.samples)),
        examples=tuple(_examples(run)),
    )


def _changes(run: Run, parent: Run) -> tuple[Table | None, Table | None]:
    both: list[tuple[Cell, ...]] = []
    one: list[tuple[Cell, ...]] = []
    for key, values in differences(
        [used(each.config, each.meta) for each in (parent, run)]
    ).items():
        row = (Cell(key), *(Cell(words.setting(value)) for value in values))
        (one if ABSENT in values else both).append(row)
    head = ["setting", parent.name, run.name]
    return (
        make_table(f"Settings other than {parent.name}'s", head, both) if both else None,
        make_table("Settings of one of them alone", head, one) if one else None,
    )


def _charts(run: Run) -> Iterable[Chart]:
    """A chart for each key: its values in training steps, and those in evaluations."""
    measures: dict[str, list[str]] = {}
    colors = {"training": 1}  # of a series, in every chart
    for key in filter(is_figure, run.keys):
        parts = key.split("/", 2)
        is_evaluation = parts[0] == "eval" and len(parts) == 3
        measure = parts[2] if is_evaluation else key
        if measure not in NOT_CURVES:
            measures.setdefault(measure, []).append(key)
        if is_evaluation:
            colors.setdefault(parts[1], 1 + len(colors) % COLORS)
    rank = {measure: place for place, measure in enumerate(FIRST)}
    for measure in sorted(measures, key=lambda name: rank.get(name, len(rank))):
        series = []
        for key in sorted(measures[measure], key=lambda key: (key.startswith("eval/"), key)):
            name = key.split("/")[1] if key.startswith("eval/") else "training"
            series.append(Series(name, run.series(key), colors[name], name != "training"))
        chart = draw(measure.replace("_", " "), series)
        if chart is not None:
            yield chart


def _failed(run: Run) -> Iterable[str]:
    """The tasks of its evaluation that ended with an error."""
    for label, task in run.evaluation.get("tasks", {}).items():
        if "error" in task:
            yield f"the task {label} of evaluation.json failed: {task['error']}"


def _examples(run: Run) -> Iterable[tuple[str, Table]]:
    """The first examples of each task, with whatever the evaluation tells of them."""
    for label, task in run.evaluation.get("tasks", {}).items():
        examples = [e for e in task.get("examples", [])[:EXAMPLES] if isinstance(e, dict)]
        keys = list(dict.fromkeys(key for example in examples for key in example))
        rows = [
            tuple(Cell(_cut(words.setting(example.get(key, ABSENT)), 400)) for key in keys)
            for example in examples
        ]
        if rows:
            yield label, make_table(label, keys, rows)


def _cut(text: str, characters: int = SAMPLE_CHARACTERS) -> str:
    return text if len(text) <= characters else f"{text[:characters]} …"

"""A run's record: metrics.jsonl, samples.jsonl, TensorBoard event files, the console.

metrics.jsonl holds one flat JSON object a line, written together: `step` first, then keys in the
field's own words (`loss`, `learning_rate`, `grad_norm`, `tokens`, `eval/NAME/loss`, ...). A value
that was not measured is absent. A value that was measured and is not finite is null, because
strict JSON has no NaN. Evaluations have lines of their own at the step they were made.
samples.jsonl holds a line {"step", "text"} for each text that the model sampled.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax

from llm_jax.console import Progress
from llm_jax.errors import UserError
from llm_jax.measures import is_figure
from llm_jax.types import Mean


@dataclasses.dataclass(frozen=True)
class MetricsConfig:
    """What is recorded, and how often."""

    every: int = 10  # steps between two logged ones; a loss is the mean over all steps in between
    tensorboard: bool = True  # also write TensorBoard event files into the run directory

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"config.metrics.every={self.every} must be at least 1.")


class RunLog:
    """Writes what happens in a run to its directory and to the console.

    Only process 0 writes; on the others every method keeps its return value and does no more.
    `resume` comes before anything is recorded. A context manager; leaving it closes the files.

    Args:
      workdir: the run directory.
      config: the settings.
      run_config: the whole resolved config of the run, shown in TensorBoard.
    """

    def __init__(self, workdir: Path, config: MetricsConfig, run_config: Mapping[str, Any]):
        self._workdir, self._config, self._run_config = Path(workdir), config, run_config
        self._writes = jax.process_index() == 0
        self._progress = Progress() if self._writes else None
        self._lines: JsonLines | None = None
        self._samples: JsonLines | None = None
        self._events: EventFile | None = None
        self._means: dict[str, Mean] = {}
        self._phase, self._length, self._last_step = 1, 0, 0
        self._begun: tuple[int, float] | None = None  # step and time of the first phase's start
        self._step = 0

    def resume(self, step: int, sums: Mapping[str, Sequence[float]] | None = None) -> None:
        """Opens the files after `step` done steps (0: from the start).

        What was recorded later than `step` will happen again, so it is dropped: the record never
        holds two histories. `sums` is what `sums()` returned at `step`, so that the next recorded
        mean is over the same steps as if the run had not stopped.
        """
        self._step = step
        self._means = {key: Mean(*pair) for key, pair in (sums or {}).items()}
        if not self._writes:
            return
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._lines = JsonLines(self._workdir / "metrics.jsonl", step)
        self._samples = JsonLines(self._workdir / "samples.jsonl", step)
        if self._config.tensorboard:
            self._events = EventFile(self._workdir, step)
            text = json.dumps(self._run_config, indent=2)
            self._events.text(step, "config", f"```json\n{text}\n```")

    def start_phase(self, index: int, length: int, last_step: int) -> None:
        """Tells the progress line where the run stands.

        Args:
          index: the phase, from 0.
          length: its context length in tokens.
          last_step: the step at which the whole run ends, as planned now.
        """
        self._phase, self._length, self._last_step = index + 1, length, last_step
        if self._begun is None:
            self._begun = (self._step, time.monotonic())

    def accumulate(self, means: Mapping[str, Mean]) -> None:
        """Adds one step's Means of host arrays; `write_step` records and clears their sums."""
        for key, mean in means.items():
            # In float64: thousands of steps' tokens are summed here.
            mean = Mean(float(mean.total), float(mean.count))
            self._means[key] = self._means[key] + mean if key in self._means else mean

    def sums(self) -> dict[str, list[float]]:
        """Total and count of each Mean since the last recorded step; JSON-able, for `resume`."""
        return {key: [mean.total, mean.count] for key, mean in self._means.items()}

    def write_step(self, step: int, scalars: Mapping[str, float]) -> dict[str, float]:
        """Records a training step: `scalars`, and the Means since the last recorded step.

        Returns:
          What was recorded, without the step. A Mean that counted nothing is not among it.
        """
        means = {key: mean.total / mean.count for key, mean in self._means.items() if mean.count}
        self._means = {}
        values = {**means, **{key: float(value) for key, value in scalars.items()}}
        self.write(step, {**means, **scalars})
        if self._progress is not None:
            self._progress.update(
                step,
                self._last_step,
                phase=self._phase,
                length=self._length,
                loss=values.get("loss"),
                tokens_per_second=values.get("tokens_per_second"),
                seconds_left=self._seconds_left(step),
            )
        self._step = step
        return values

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records values at `step`; evaluations (`eval/NAME/KEY`) are also shown on the console."""
        if not values or self._lines is None or self._progress is None:
            return
        self._lines.write(step, values)
        if self._events is not None:
            self._events.scalars(step, values)
        for text in _evaluations(values):
            self._progress.message(f"step {step}  {text}")

    def sample(self, step: int, text: str) -> None:
        """Records a text that the model sampled at `step`."""
        if self._samples is not None:
            self._samples.write(step, {"text": text})
        if self._events is not None:
            self._events.text(step, "sample", f"```\n{text}\n```")

    def message(self, text: str) -> None:
        """Tells the person who watches."""
        if self._progress is not None:
            self._progress.message(text)

    def close(self) -> None:
        for writer in (self._progress, self._lines, self._samples, self._events):
            if writer is not None:
                writer.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _seconds_left(self, step: int) -> float | None:
        """From the mean pace of this process, evaluations and checkpoints included."""
        if self._begun is None or step <= self._begun[0]:
            return None
        first_step, begin = self._begun
        return (time.monotonic() - begin) / (step - first_step) * (self._last_step - step)


def _evaluations(values: Mapping[str, float]) -> Iterator[str]:
    """A line for each evaluation, `KEY_stderr` as the ± of `KEY`.

    Keys that end in a number, such as the loss by position, are left out: they make a curve.
    """
    lines: dict[str, list[str]] = {}
    for key, value in values.items():
        parts = key.split("/", 2)
        if parts[0] == "eval" and is_figure(key):
            error = values.get(f"{key}_stderr")
            spread = "" if error is None else f" ± {error:.2g}"
            lines.setdefault(parts[1], []).append(f"{parts[2]} {value:.4g}{spread}")
    for name, entries in lines.items():
        yield f"{name}: {', '.join(entries)}"


# --- metrics.jsonl and samples.jsonl --------------------------------------------------------------


class JsonLines:
    """Appends flat objects to a file, from which lines later than `step` are dropped first.

    The first of them makes the file. A run that stopped while a phase was closing evaluates once
    more at `step`; what the file already says about `step` is not written again.
    """

    def __init__(self, path: Path, step: int):
        self._there: list[set[str]] = []  # the keys of each record at `step`
        if path.exists():
            kept = [pair for pair in _read_lines(path) if pair[1]["step"] <= step]
            self._there = [set(record) for _, record in kept if record["step"] == step]
            temporary = path.with_name(f".{path.name}.new")
            temporary.write_text("".join(line for line, _ in kept), encoding="utf-8")
            os.replace(temporary, path)
        self._path, self._step = path, step
        self._file: TextIO | None = None

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        record = {"step": int(step), **{key: _json_value(v) for key, v in values.items()}}
        if step == self._step and set(record) in self._there:
            return
        if self._file is None:
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (see close)
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read_metrics_file(path: str | Path) -> list[dict[str, float]]:
    """The records of a metrics.jsonl in file order; null becomes NaN.

    Raises:
      UserError: no such file, or a malformed line (an unfinished last one is left out).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: name the metrics.jsonl of a run.")
    return [
        {key: math.nan if value is None else value for key, value in record.items()}
        for _, record in _read_lines(path)
    ]


def read_samples_file(path: str | Path) -> list[tuple[int, str]]:
    """Step and text of each line of a samples.jsonl, in file order; empty where there is none.

    Raises:
      UserError: a malformed line.
    """
    path = Path(path)
    if not path.is_file():
        return []
    return [(record["step"], str(record.get("text", ""))) for _, record in _read_lines(path)]


def _read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return  # a write that is under way, or that a crash cut off
            try:
                record = json.loads(line)
                record["step"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}:{number} is no metrics record ({error}): remove the line."
                ) from error
            yield line, record


def _json_value(value: Any) -> int | float | str | None:
    if isinstance(value, (int, str)):
        return value
    value = float(value)
    return value if math.isfinite(value) else None


# --- TensorBoard ----------------------------------------------------------------------------------


class EventFile:
    """A TensorBoard event file, written without TensorFlow even where that is installed.

    It opens with a session start, which makes TensorBoard forget what older files of the folder
    say about steps later than `step`.
    """

    def __init__(self, folder: Path, step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
        from tensorboard.plugins.text import metadata
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._tensor, self._string = tensor_pb2.TensorProto, types_pb2.DT_STRING
        self._text_metadata = metadata.create_summary_metadata(display_name="", description="")
        # TensorBoard reads a folder's files in the order of their names.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        self._file = open(folder / name, "xb")  # noqa: SIM115 (closed by close)
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=step + 1, session_log=start)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        entries = [
            self._summary.Value(tag=tag, simple_value=float(value)) for tag, value in values.items()
        ]
        self._write(step=step, summary=self._summary(value=entries))

    def text(self, step: int, tag: str, markdown: str) -> None:
        tensor = self._tensor(dtype=self._string, string_val=[markdown.encode()])
        value = self._summary.Value(tag=tag, tensor=tensor, metadata=self._text_metadata)
        self._write(step=step, summary=self._summary(value=[value]))

    def close(self) -> None:
        self._file.close()

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._records.flush()

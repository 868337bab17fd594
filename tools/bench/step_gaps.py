"""Shows from a profiler trace that steps wait for neither data nor log nor checkpoint.

    python -m tools.bench trace [--config=FILE --config.KEY=VALUE ...] [--steps=20]
    python -m tools.bench trace --workdir=RUN   # a run that was made with config.profile.steps=20

Runs a pre-training config for a while, traces some of its steps, two of them with a checkpoint, and
measures the gaps in which no train step executes. Whatever the loop's thread did during a gap is
named, by the outermost functions that dispatch no step. The profiler itself slows Python down, so
the gaps are upper bounds.
"""

from __future__ import annotations

import bisect
import collections
import gzip
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from llm_jax.errors import UserError
from tools.bench.protocol import Worker, WorkerError
from tools.bench.summary import show_spread, spread, tell, write_json

PROGRAM = "jit_train_step"
DISPATCH = "PjitFunction(jit(train_step))"
SHOWN_GAPS = 5


class Span(NamedTuple):
    """A stretch of time; begin and end in microseconds."""

    begin: float
    end: float
    name: str = ""


class Gap(NamedTuple):
    """The idle time after a step. meanwhile: microseconds by function of the loop's thread."""

    step: int
    kind: str  # plain, log or checkpoint: what the loop did about then
    microseconds: float
    meanwhile: dict[str, float]


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string(
        "config", "configs/pretrain.py:size=tiny", "pre-training config", flag_values=values
    )
    flags.DEFINE_integer("phase", 1, "which phase of the config, from 1", flag_values=values)
    flags.DEFINE_integer("steps", 20, "traced steps", flag_values=values)
    flags.DEFINE_string("workdir", None, "read this run's trace instead", flag_values=values)
    flags.DEFINE_string("output", None, "also write everything as JSON", flag_values=values)
    return values


def main(values: flags.FlagValues, overrides: list[str]) -> None:
    if values.steps < 4:
        raise UserError(f"--steps={values.steps} must be at least 4.")
    with write_json(values.output) as write:
        if values.workdir:
            result = analyse(Path(values.workdir))
        else:
            with tempfile.TemporaryDirectory(prefix="bench-run-") as folder:
                _make_run(values, overrides, folder)
                result = analyse(Path(folder))
        _report(result)
        write(result)


def _make_run(values: flags.FlagValues, overrides: list[str], folder: str) -> None:
    try:
        with Worker("tools.bench.run_worker") as worker:
            worker.ask(
                "trace",
                note=tell,
                config=values.config,
                overrides=overrides,
                phase=values.phase,
                steps=values.steps,
                workdir=folder,
            )
    except WorkerError as error:
        raise UserError(str(error)) from error
    tell("")


def analyse(workdir: Path) -> dict[str, Any]:
    """Steps and gaps of the newest trace in a run directory; all times in milliseconds.

    Raises:
      UserError: the run or its trace is not there, or shows no train steps.
    """
    if not (workdir / "config.json").is_file():
        raise UserError(f"--workdir={workdir} is no run: it has no config.json.")
    config = json.loads((workdir / "config.json").read_text())
    traces = sorted(workdir.glob("profile/plugins/profile/*/*.trace.json.gz"))
    if not traces:
        raise UserError(f"{workdir} holds no trace: run it with --config.profile.steps=20.")
    with gzip.open(traces[-1]) as file:
        events = json.load(file)["traceEvents"]
    dispatches = _dispatches(events)
    steps = _of_dispatches(executions(events), dispatches)
    if len(steps) < 3:
        raise UserError(f"{traces[-1]} shows {len(steps)} train steps, too few for gaps.")
    gaps = find_gaps(
        steps,
        _outermost(events, dispatches),
        first_step=config["profile"]["start"] + 1,
        log_every=config["metrics"]["every"],
        checkpoint_every=config["checkpoint"]["every"],
    )
    idle = sum(gap.microseconds for gap in gaps)
    return {
        "steps": len(steps),
        # The last one may have been cut short by the end of the trace.
        "step_milliseconds": spread([(step.end - step.begin) / 1000 for step in steps[:-1]]),
        "gap_milliseconds": _by_kind(gaps),
        "idle_share": idle / (steps[-1].end - steps[0].begin),
        "gaps": [
            {
                "after_step": gap.step,
                "kind": gap.kind,
                "milliseconds": gap.microseconds / 1000,
                "meanwhile": {name: time / 1000 for name, time in gap.meanwhile.items()},
            }
            for gap in gaps
        ],
    }


# --- reading the trace ----------------------------------------------------------------------------


def executions(events: Iterable[dict[str, Any]]) -> list[Span]:
    """When the train step executed on the device, in order.

    A TPU's trace has a line for whole programs, "XLA Modules". Elsewhere the operations of one
    execution share a run_id, and it lasts from the first one's begin to the last one's end.
    """
    events = list(events)
    threads = {
        (event["pid"], event["tid"])
        for event in events
        if event.get("name") == "thread_name" and event["args"]["name"] == "XLA Modules"
    }
    runs: dict[Any, Span] = {}
    for event in (event for event in events if event.get("ph") == "X"):
        span = _span(event)
        arguments = event.get("args", {})
        if (event["pid"], event["tid"]) in threads and span.name.startswith(f"{PROGRAM}("):
            run = (event["pid"], span.begin)
        elif not threads and arguments.get("hlo_module") == PROGRAM and "run_id" in arguments:
            run = arguments["run_id"]
        else:
            continue
        before = runs.get(run, span)
        runs[run] = Span(min(before.begin, span.begin), max(before.end, span.end))
    return sorted(runs.values())


def find_gaps(
    steps: Sequence[Span],
    frames: Sequence[Span],
    *,
    first_step: int,
    log_every: int,
    checkpoint_every: int,
) -> list[Gap]:
    """The gaps between consecutive executions, the first of which is step `first_step`.

    Overlapping executions, as on several devices, have a gap of 0 between them.
    """
    gaps = []
    end = steps[0].end
    for number, following in enumerate(steps[1:], start=first_step):
        begin = end
        meanwhile: dict[str, float] = collections.defaultdict(float)
        for frame in frames:
            overlap = min(frame.end, following.begin) - max(frame.begin, begin)
            if overlap > 0:
                meanwhile[frame.name] += overlap
        kind = _kind(number, log_every, checkpoint_every)
        longest = dict(sorted(meanwhile.items(), key=lambda item: -item[1]))
        gaps.append(Gap(number, kind, max(0.0, following.begin - begin), longest))
        end = max(end, following.end)
    return gaps


def _kind(step: int, log_every: int, checkpoint_every: int) -> str:
    """What the loop does between the steps `step` and `step` + 1 of the device."""
    if step % checkpoint_every == 0:
        return "checkpoint"
    # A step's metrics are read while the next one runs, so that a wait would follow that one.
    return "log" if (step - 1) % log_every == 0 else "plain"


def _span(event: dict[str, Any]) -> Span:
    return Span(event["ts"], event["ts"] + event.get("dur", 0), event["name"])


def _dispatches(events: Iterable[dict[str, Any]]) -> list[Span]:
    """The calls of the train step; one call may stand there twice, inside of itself."""
    calls: list[Span] = []
    for event in events:
        if event.get("ph") == "X" and event["name"] == DISPATCH:
            calls.append(_span(event))
    calls.sort(key=lambda call: (call.begin, -call.end))
    return [call for i, call in enumerate(calls) if i == 0 or call.begin > calls[i - 1].end]


def _of_dispatches(steps: Sequence[Span], dispatches: Sequence[Span]) -> list[Span]:
    """The executions without the one that was in flight when the trace began.

    It shows as one too many, or by beginning, as all after it would, before its turn's dispatch.
    """
    steps = list(steps)
    while len(steps) > len(dispatches) or any(
        step.begin < dispatch.begin for step, dispatch in zip(steps, dispatches, strict=False)
    ):
        del steps[0]
    return steps


def _outermost(events: Iterable[dict[str, Any]], dispatches: Sequence[Span]) -> list[Span]:
    """The functions of the dispatching thread that dispatch no step, without their callees."""
    thread = {(e["pid"], e["tid"]) for e in events if e.get("name") == DISPATCH}
    spans = [_span(e) for e in events if e.get("ph") == "X" and (e["pid"], e["tid"]) in thread]
    begins = [dispatch.begin for dispatch in dispatches]
    frames, end = [], float("-inf")
    for span in sorted(spans, key=lambda span: (span.begin, -span.end)):
        inside = bisect.bisect_left(begins, span.end) - bisect.bisect_left(begins, span.begin)
        if span.begin < end or (inside and span.name != DISPATCH):
            continue
        frames.append(span._replace(name=span.name.removeprefix("$")))
        end = span.end
    return frames


# --- telling --------------------------------------------------------------------------------------


def _by_kind(gaps: Sequence[Gap]) -> dict[str, dict[str, float]]:
    kinds: dict[str, list[float]] = {}
    for gap in gaps:
        kinds.setdefault(gap.kind, []).append(gap.microseconds / 1000)
    return {
        kind: {"number": len(values), **spread(values)} for kind, values in sorted(kinds.items())
    }


def _report(result: dict[str, Any]) -> None:
    console = Console(highlight=False)
    console.print(
        f"{result['steps']} steps of {show_spread(result['step_milliseconds'], '.1f')} "
        f"milliseconds; the device idles between them for {result['idle_share']:.2%} of the time",
        markup=False,
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("gaps")
    table.add_column("number", justify="right")
    table.add_column("milliseconds, median (min to max)", justify="right")
    labels = {
        "plain": "of plain steps",
        "log": "with a log line",
        "checkpoint": "with a checkpoint",
    }
    for kind, values in result["gap_milliseconds"].items():
        table.add_row(labels[kind], str(values["number"]), show_spread(values, ".2f"))
    console.print(table)
    longest = sorted(result["gaps"], key=lambda gap: -gap["milliseconds"])[:SHOWN_GAPS]
    console.print(f"the {len(longest)} longest, and what the loop did meanwhile:")
    for gap in longest:
        doing = ", ".join(
            f"{n} {t:.2f}" for n, t in list(gap["meanwhile"].items())[:2] if t > 0.005
        )
        console.print(
            f"  after step {gap['after_step']:>4}  {gap['milliseconds']:8.2f} ms  {doing}",
            markup=False,
            soft_wrap=True,
        )

import io
import json
import math
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llm_jax.console import Progress, clock_time, short_number
from llm_jax.errors import UserError
from llm_jax.metrics import (
    EventFile,
    JsonLines,
    MetricsConfig,
    RunLog,
    read_metrics_file,
    read_samples_file,
)
from llm_jax.types import Mean


def mean(total, count):
    return Mean(np.float32(total), np.float32(count))


def read_events(folder):
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def scalars_of(events, tag):
    return [(event.step, event.value) for event in events.Scalars(tag)]


def texts_of(events, tag):
    return [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(tag)]


# --- metrics.jsonl --------------------------------------------------------------------------------


def test_a_line_is_one_flat_object_of_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, step=0)
    lines.write(1, {"loss": np.float32(2.5), "tokens": 4096, "grad_norm": math.nan})
    lines.write(2, {"loss": math.inf})

    def refuse(name):
        raise AssertionError(f"{name} is not strict JSON")

    records = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert records == [
        {"step": 1, "loss": 2.5, "tokens": 4096, "grad_norm": None},
        {"step": 2, "loss": None},
    ]
    assert list(records[0]) == ["step", "loss", "tokens", "grad_norm"]
    read = read_metrics_file(path)
    assert read[0]["loss"] == 2.5 and math.isnan(read[0]["grad_norm"]) and "mfu" not in read[0]


def test_resuming_drops_later_lines_and_an_unfinished_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    before = JsonLines(path, step=0)
    for step in (1, 2, 3, 4):
        before.write(step, {"loss": float(step)})
    before.close()
    with open(path, "a") as file:
        file.write('{"step": 5, "lo')
    assert [record["step"] for record in read_metrics_file(path)] == [1, 2, 3, 4]

    after = JsonLines(path, step=2)
    after.write(3, {"loss": 30.0})
    assert [(r["step"], r["loss"]) for r in read_metrics_file(path)] == [(1, 1), (2, 2), (3, 30)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resuming_does_not_repeat_what_the_file_says_about_the_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    before = JsonLines(path, step=0)
    before.write(2, {"loss": 1.0})
    before.write(2, {"eval/short/loss": 2.0})
    before.close()
    after = JsonLines(path, step=2)
    after.write(2, {"eval/short/loss": 2.0})
    after.write(2, {"gate/open": 1.0})
    after.write(3, {"loss": 0.9})
    keys = [(record["step"], list(record)[1]) for record in read_metrics_file(path)]
    assert keys == [(2, "loss"), (2, "eval/short/loss"), (2, "gate/open"), (3, "loss")]


@pytest.mark.parametrize("line", ["{loss}", '{"loss": 1.0}', "3"])
def test_a_malformed_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 is no metrics record"):
        read_metrics_file(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_metrics_file(tmp_path / "metrics.jsonl")


# --- TensorBoard ----------------------------------------------------------------------------------


def test_event_file_reads_back(tmp_path):
    events = EventFile(tmp_path, step=0)
    for step in (1, 2):
        events.scalars(step, {"loss": 1 / step, "eval/validation/loss": 3.0})
    events.text(2, "sample", "Once upon a time, ünïcode")
    events.close()
    read = read_events(tmp_path)
    assert scalars_of(read, "loss") == [(1, 1.0), (2, 0.5)]
    assert scalars_of(read, "eval/validation/loss") == [(1, 3.0), (2, 3.0)]
    assert texts_of(read, "sample") == [(2, "Once upon a time, ünïcode")]
    assert read.SummaryMetadata("sample").plugin_data.plugin_name == "text"
    assert [path.name.startswith("events.out.tfevents.") for path in tmp_path.iterdir()] == [True]


def test_tensorboard_forgets_what_a_resumed_run_does_again(tmp_path):
    first = EventFile(tmp_path, step=0)
    for step in (1, 2, 3, 4):
        first.scalars(step, {"loss": float(step)})
    first.close()
    second = EventFile(tmp_path, step=2)
    second.scalars(3, {"loss": 30.0})
    second.close()
    assert scalars_of(read_events(tmp_path), "loss") == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_tensorflow_is_not_imported_even_where_it_is_installed(tmp_path):
    (tmp_path / "tensorflow.py").write_text("raise RuntimeError('tensorflow was imported')")
    code = (
        "import sys; from pathlib import Path; from llm_jax.metrics import EventFile;"
        f"events = EventFile(Path({str(tmp_path)!r}), 0); events.scalars(1, {{'loss': 1.0}});"
        "events.text(1, 'sample', 'text'); events.close();"
        "print(sorted(name for name in sys.modules if name in ('tensorflow', 'torch')))"
    )
    path = [str(tmp_path), *filter(None, sys.path)]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(path), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


# --- the run's log --------------------------------------------------------------------------------


def test_a_recorded_loss_is_the_mean_since_the_last_one(tmp_path):
    with RunLog(tmp_path, MetricsConfig(), {"seed": 3}) as log:
        log.resume(0)
        log.start_phase(0, 32, 4)
        log.accumulate({"loss": mean(10.0, 4), "auxiliary": mean(0.0, 0)})
        log.accumulate({"loss": mean(2.0, 8), "auxiliary": mean(0.0, 0)})
        first = log.write_step(2, {"grad_norm": np.float32(0.5), "tokens": 64})
        log.accumulate({"loss": mean(3.0, 3), "auxiliary": mean(1.0, 2)})
        log.write_step(4, {"tokens": 128})
    assert first == {"loss": 1.0, "grad_norm": 0.5, "tokens": 64}
    assert read_metrics_file(tmp_path / "metrics.jsonl") == [
        {"step": 2, "loss": 1.0, "grad_norm": 0.5, "tokens": 64},
        {"step": 4, "loss": 1.0, "auxiliary": 0.5, "tokens": 128},
    ]
    events = read_events(tmp_path)
    assert scalars_of(events, "loss") == [(2, 1.0), (4, 1.0)]
    assert '"seed": 3' in texts_of(events, "config")[0][1]


def test_sums_outlive_an_interruption(tmp_path):
    config = MetricsConfig(tensorboard=False)
    with RunLog(tmp_path, config, {}) as log:
        log.resume(0)
        log.accumulate({"loss": mean(10.0, 4)})
        sums = json.loads(json.dumps(log.sums()))
    with RunLog(tmp_path, config, {}) as log:
        log.resume(1, sums)
        log.accumulate({"loss": mean(2.0, 8)})
        assert log.write_step(2, {}) == {"loss": 1.0}
        assert log.sums() == {}


def test_text_is_recorded_and_evaluations_are_shown(tmp_path, capsys):
    with RunLog(tmp_path, MetricsConfig(), {}) as log:
        log.resume(0)
        values = {"loss": 3.25, "loss_stderr": 0.125, "tokens": 64, "loss_by_position/64": 3.0}
        log.write(5, {f"eval/short/{key}": value for key, value in values.items()})
        log.write(5, {"gate/open": 0.0})
        log.sample(5, "# not a heading")
        log.message("[bold] is no markup")
    assert capsys.readouterr().out.splitlines() == [
        "step 5  short: loss 3.25 ± 0.12, tokens 64",
        "[bold] is no markup",
    ]
    assert texts_of(read_events(tmp_path), "sample") == [(5, "```\n# not a heading\n```")]
    assert read_samples_file(tmp_path / "samples.jsonl") == [(5, "# not a heading")]
    assert len(read_metrics_file(tmp_path / "metrics.jsonl")) == 2


def test_a_resumed_run_samples_each_step_once(tmp_path):
    with RunLog(tmp_path, MetricsConfig(tensorboard=False), {}) as log:
        log.resume(0)
        log.sample(2, "two\nlines, ünïcode")
        log.sample(4, "four")
        log.sample(6, "lost")
    with RunLog(tmp_path, MetricsConfig(tensorboard=False), {}) as log:
        log.resume(4)
        log.sample(4, "four again")
        log.sample(6, "six")
    read = read_samples_file(tmp_path / "samples.jsonl")
    assert read == [(2, "two\nlines, ünïcode"), (4, "four"), (6, "six")]
    assert read_samples_file(tmp_path / "elsewhere.jsonl") == []


def test_only_the_first_process_writes(tmp_path, capsys):
    with mock.patch.object(jax, "process_index", return_value=1):
        log = RunLog(tmp_path / "run", MetricsConfig(), {})
    log.resume(0)
    log.start_phase(0, 32, 4)
    log.accumulate({"loss": mean(10.0, 4)})
    assert log.write_step(1, {"tokens": 4}) == {"loss": 2.5, "tokens": 4}
    log.write(1, {"eval/short/loss": 1.0})
    log.sample(1, "text")
    log.message("hello")
    log.close()
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_the_interval_is_positive():
    with pytest.raises(UserError, match=r"config\.metrics\.every=0"):
        MetricsConfig(every=0)


# --- the console ----------------------------------------------------------------------------------

STATE = {
    "phase": 2,
    "length": 131072,
    "loss": 2.34567,
    "tokens_per_second": 12345.0,
    "seconds_left": 3723.0,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_every_update_is_a_line():
    stream = io.StringIO()
    progress = Progress(stream)
    progress.update(120, 3000, **STATE)
    progress.message("a message")
    unknown = {"loss": None, "tokens_per_second": None, "seconds_left": None}
    progress.update(130, 3000, **{**STATE, **unknown})
    progress.close()
    assert stream.getvalue().splitlines() == [
        "step 120/3000  phase 2 (length 131072)  loss 2.3457  12.3k tokens/s  1:02:03 left",
        "a message",
        "step 130/3000  phase 2 (length 131072)",
    ]


def test_on_a_terminal_one_line_of_80_columns_says_it_all(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    progress = Progress(stream)
    progress.update(120, 3000, **STATE)
    progress.message("a [bold] message")
    progress.close()
    screen = stream.getvalue()
    assert "120/3000 " in screen and "a [bold] message\n" in screen
    assert "phase 2 (length 131072)  loss 2.3457  12.3k tokens/s  1:02:03 left" in screen


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    Progress(stream).update(1, 10, **STATE)
    assert stream.getvalue().startswith("step 1/10  ") and "\x1b" not in stream.getvalue()


def test_a_character_that_the_encoding_lacks_does_not_end_the_run():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Progress(stream).message("± 0.1 日本")
    assert stream.buffer.getvalue() == b"? 0.1 ??\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.5"), (87.24, "87.2"), (999.4, "999"), (999.6, "1k"), (1234, "1.23k"),
     (99_960, "100k"), (123_456, "123k"), (1.5e6, "1.5M"), (2e12, "2000G")],
)  # fmt: skip
def test_short_numbers(value, text):
    assert short_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00")]
)
def test_clock_times(seconds, text):
    assert clock_time(seconds) == text

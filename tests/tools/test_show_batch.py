"""tools.show batch: the batch is the one that training takes, and rows are shown as they are."""

import dataclasses
from unittest import mock

import jax
import numpy as np
import pytest

from llm_jax.data.offline import OfflineSource
from llm_jax.data.phases import GateConfig, PhaseConfig
from llm_jax.errors import UserError
from llm_jax.types import Batch, DistillationBatch, PreferenceBatch, RolloutBatch
from tools.show import batch as show_batch
from tools.show.__main__ import main as show

PACKED = Batch(
    tokens=np.array([[104, 105, 256, 120, 121, 0], [97, 98, 99, 0, 0, 0]]),
    targets=np.array([[105, 257, 120, 121, 257, 0], [98, 99, 257, 0, 0, 0]]),
    loss_weights=np.array([[0, 1, 0, 1, 0.5, 0], [1, 1, 1, 0, 0, 0]], np.float32),
    segment_ids=np.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 0, 0, 0]]),
    positions=np.array([[0, 1, 0, 1, 2, 0], [0, 1, 2, 0, 0, 0]]),
)


@pytest.fixture
def tool(capsys, monkeypatch, tmp_path):
    """Runs the command without a terminal, on a config that is given; status, stdout, stderr."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    (tmp_path / "config.py").write_text("CONFIG = None\ndef get_config(_=None):\n    return {}\n")

    def call(config, *arguments):
        with mock.patch("llm_jax.main.parse", lambda argv: (config, "")):
            status = show(["show", "batch", f"--config={tmp_path / 'config.py'}", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_it_is_the_batch_that_the_run_trains_on(tiny_config, run_on, tmp_path):
    phases = (PhaseConfig(length=32, batch=8, steps=2),) * 2
    seen, original = {}, OfflineSource.next

    def noting(self, params, step):
        seen[step] = jax.device_get(original(self, params, step))
        return original(self, params, step)

    with mock.patch.object(OfflineSource, "next", noting):
        assert run_on(1, tiny_config(phases=phases), tmp_path / "run") == 0
    for step, index in ((1, 0), (3, 1)):
        _, phase, batch = show_batch.make_batch(tiny_config(phases=phases), step)
        assert phase.index == index
        jax.tree.map(np.testing.assert_array_equal, batch, seen[step])
    assert not np.array_equal(seen[2].tokens, seen[3].tokens)


def shown(batch, tool, monkeypatch, *arguments):
    """What the command prints of a batch of bytes, without the lines above its rows."""
    from llm_jax.data.tokenizer_base import ByteTokenizer

    phase = mock.Mock(index=0, length=6)
    trainer = mock.Mock(phases=[phase], tokenizer=ByteTokenizer())
    monkeypatch.setattr(show_batch, "make_batch", lambda config, step: (trainer, phase, batch))
    status, out, _ = tool({}, *arguments)
    assert status == 0
    return out.partition("\n\n")


def test_rows_are_segments_with_counts_and_trained_tokens_in_brackets(tool, monkeypatch):
    head, _, rows = shown(PACKED, tool, monkeypatch)
    assert head == (
        "batch of step 0, in phase 1 of 1: 2 rows of length 6\n"
        "together: 12 places, 3 segments, 4 padding (33.3%), 6 targets counted (50.0%) with "
        "weights 0.5 to 1"
    )
    assert rows == (
        "row 0: 6 places, 2 segments, 1 padding (16.7%), 3 targets counted (50.0%) with weights "
        "0.5 to 1\n"
        "  segment 1, positions 0 to 1, 1 of 2 targets counted:\nhi⟦<|eos|>⟧\n"
        "  segment 2, positions 0 to 2, 2 of 3 targets counted:\n<|bos|>x⟦y<|eos|>⟧\n\n"
        "row 1: 6 places, 1 segment, 3 padding (50.0%), 3 targets counted (50.0%)\n"
        "  segment 1, positions 0 to 2, 3 of 3 targets counted:\na⟦bc<|eos|>⟧\n"
    )


def test_segments_have_colours_of_their_own_on_a_terminal(tool, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, _, rows = shown(PACKED, tool, monkeypatch, "--rows=1")
    assert "\x1b[2;36mhi\x1b[0m\x1b[1;36m<|eos|>\x1b[0m" in rows
    assert "\x1b[2;35mx\x1b[0m\x1b[35my\x1b[0m" in rows and "row 1" not in rows


def test_a_row_place_by_place(tool, monkeypatch):
    _, _, rows = shown(PACKED, tool, monkeypatch, "--row=0")
    lines = [line.split() for line in rows.splitlines()]
    assert lines[1] == ["place", "segment", "position", "token", "target", "weight"]
    assert lines[2] == ["0", "1", "0", "104", "'h'", "105", "'i'", "0"]
    assert lines[6] == ["4", "2", "2", "121", "'y'", "257", "'<|eos|>'", "0.5"]
    assert len(lines) == 7


def test_responses_stand_beside_each_other_and_their_last_token_has_no_target(tool, monkeypatch):
    one = dataclasses.replace(PACKED, segment_ids=np.minimum(PACKED.segment_ids, 1))
    pair = PreferenceBatch(
        jax.tree.map(lambda x: x[None], one), np.array([[1.0, 0.0]]), np.zeros(1), None
    )
    _, _, rows = shown(pair, tool, monkeypatch)
    assert "row 0, response 0, score 1: 6 places" in rows and "hi⟦<|eos|>⟧x⟦y⟧\n" in rows
    assert "row 0, response 1, score 0: 6 places" in rows and "\na⟦bc⟧\n" in rows


def test_rollouts_and_teachers_add_columns(tool, monkeypatch):
    values = np.arange(12, dtype=np.float32).reshape(2, 6)
    rollouts = RolloutBatch(PACKED, old_logprobs=-values, advantages=values / 8)
    _, _, rows = shown(rollouts, tool, monkeypatch, "--row=1")
    assert "log p when sampled  advantage" in rows and "-7.000              0.875" in rows
    taught = DistillationBatch(PACKED, np.full((2, 6, 2), 65), np.zeros((2, 6, 3)))
    _, _, rows = shown(taught, tool, monkeypatch, "--row=1")
    assert rows.splitlines()[1].endswith("teacher's choice") and rows.count("65 'A'") == 3


def test_a_later_phase_behind_a_gate_is_told_as_planned(tiny_config, tool):
    phases = (
        PhaseConfig(length=32, batch=8, steps=2, gate=GateConfig(needle_accuracy=None)),
        PhaseConfig(length=32, batch=8, steps=2),
    )
    assert "as planned" in tool(tiny_config(phases=phases), "--step=2")[1]
    assert "as planned" not in tool(tiny_config(phases=phases), "--step=1")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step=6"], "the run has the steps 0 to 5"),
        (["--step=-1"], "must not be negative"),
        (["--row=8"], "the rows 0 to 7"),
        (["--config="], "--config is required"),
    ],
)
def test_bad_input_is_one_line(tiny_config, tool, arguments, message):
    status, out, error = tool(tiny_config(), *arguments)
    assert (status, out) == (2, "") and message in error.splitlines()[-1]


def test_a_recipe_is_no_stage():
    with pytest.raises(UserError, match="name the config of one stage"):
        show_batch.make_batch({"trainer": "recipe"}, 0)


def test_overrides_reach_the_config_and_other_commands_take_none(capsys):
    config = "--config=configs/pretrain.py:size=tiny"
    assert show(["show", "batch", config, "--config.no.such=1"]) == 2
    assert "no key 'no.such'" in capsys.readouterr().err
    assert show(["show", "loss", "--config.seed=1"]) == 2
    assert "config.seed" in capsys.readouterr().err

"""tools.calibration: the bins of the last evaluation, and a picture of them."""

import json

import numpy as np
import pytest

from llm_jax.errors import UserError
from tools import calibration
from tools.cli import run_tool


@pytest.fixture
def workdir(tmp_path):
    """A run that was evaluated twice."""
    folder = tmp_path / "reward"
    folder.mkdir()
    key = "eval/validation/calibration"
    records = [
        {"step": 1, f"{key}/0.5": 0.1, f"{key}_pairs/0.5": 3.0, f"{key}_error": 0.4},
        {"step": 2, f"{key}/0.9": 0.96, f"{key}_pairs/0.9": 50.0, f"{key}/0.5": 0.6,
         f"{key}_pairs/0.5": 10.0, f"{key}_error": 0.03},
        {"step": 3, "loss": 0.5},
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_the_last_evaluation_is_read(workdir):
    centres, right, pairs, error = calibration.read_calibration(workdir)
    np.testing.assert_allclose(centres, [0.55, 0.95])
    np.testing.assert_allclose(right, [0.6, 0.96])
    np.testing.assert_allclose(pairs, [10, 50])
    assert error == 0.03


def test_it_is_drawn(workdir, tmp_path, capsys):
    argv = ["calibration", f"--workdir={workdir}", f"--output={tmp_path / 'a.png'}"]
    assert run_tool(calibration.main, calibration.define_flags(), "", argv) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"{tmp_path / 'a.png'}\n"


def test_a_run_without_calibration_is_refused(workdir):
    (workdir / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(UserError, match="no run of a reward model"):
        calibration.read_calibration(workdir)

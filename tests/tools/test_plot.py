import json
import shutil

import matplotlib
import pytest

from tools.cli import run_tool
from tools.plot import define_flags, main


@pytest.fixture
def workdir(tmp_path):
    """A run of two phases whose evaluations know their step but not their tokens."""
    folder = tmp_path / "pretrain"
    folder.mkdir()
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, 9):
            phase = 1 + (step > 4)
            record = {"step": step, "loss": 9.0 - step, "tokens": 64 * step}
            file.write(json.dumps({**record, "phase": phase, "length": 16 * 64**phase}) + "\n")
            if step % 4 == 0:
                file.write(json.dumps({"step": step, "eval/validation/loss": 9.5 - step}) + "\n")
    return folder


def draw(*arguments):
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        return run_tool(main, define_flags(), "", ["plot", *arguments])


@pytest.mark.parametrize("x", ["step", "tokens"])
def test_a_picture_names_its_curves_and_phases(workdir, tmp_path, x):
    output = tmp_path / "loss.svg"
    assert draw(f"--workdir={workdir}", f"--output={output}", f"--x={x}") == 0
    picture = output.read_text()
    for text in ("training", "validation", "length 1K", "length 64K", f">{x}<", ">loss<"):
        assert text in picture, text


def test_several_runs_of_one_name_are_told_apart(workdir, tmp_path):
    output = tmp_path / "loss.svg"
    other = tmp_path / "second" / workdir.name
    shutil.copytree(workdir, other)
    assert draw(f"--workdir={workdir},{other}", f"--output={output}") == 0
    assert f"{workdir}, training" in output.read_text()
    assert f"{other}, validation" in output.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output=a.png"], "--workdir=RUN and --output=F.png are both needed"),
        (["--workdir=nowhere", "--output=a.png"], "does not exist"),
        (["--workdir=RUN", "--output=a.png", "--keys=los"], "Did you mean 'loss'"),
        (["--workdir=RUN", "--output=a.pgn"], "Did you mean 'png'"),
        (["--workdir=RUN", "--output=missing/a.png"], "cannot be written"),
    ],
)
def test_bad_input_is_one_line(workdir, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert draw(*(a.replace("RUN", str(workdir)) for a in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1

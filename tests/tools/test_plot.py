import json
import shutil

import matplotlib
import numpy as np
import pytest

from tools import plot
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
    picture = output.read_text()
    # One legend above all: a line for each run, and one for each kind of line.
    for text in (f">{workdir}<", f">{other}<", ">training<", ">validation<"):
        assert picture.count(text) == 1, text


@pytest.fixture
def figures(monkeypatch):
    """The figures that the tool draws, in order; they are not written."""
    drawn = []
    monkeypatch.setattr(plot, "save_figure", lambda figure, output: drawn.append(figure))
    return drawn


@pytest.fixture
def seeds(workdir, tmp_path):
    """`seeds(name, losses, **config)`: a run of each of the losses, with seeds of their own."""

    def make(name, losses, **config):
        folders = []
        for seed, loss in enumerate(losses):
            folder = shutil.copytree(workdir, tmp_path / f"{name}_{seed}")
            (folder / "config.json").write_text(json.dumps({"seed": seed, **config}))
            records = [{"step": step, "loss": loss + step, "reward": loss} for step in (1, 2)]
            records += [{"step": 3, "loss": loss}] if seed else []  # the first ends sooner
            (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
            folders.append(folder)
        return folders

    return make


def labels(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()] if figure.legends else []


def test_runs_that_differ_in_their_seeds_become_their_mean_in_a_band(seeds, figures):
    folders = [*seeds("grpo", (1.0, 2.0, 6.0)), *seeds("ppo", (4.0,), trainer="ppo")]
    runs = f"--workdir={','.join(map(str, folders))}"
    assert draw(runs, "--keys=loss,reward", "--output=a.png", "--mean") == 0
    assert labels(figures[0]) == ["grpo_{0,1,2}", "ppo_0"]
    mean, single = figures[0].axes[0].lines
    np.testing.assert_array_equal(mean.get_xydata(), [[1, 4], [2, 5]])  # steps that all have
    np.testing.assert_array_equal(single.get_xydata(), [[1, 5], [2, 6]])
    (band,) = figures[0].axes[0].collections
    corners = band.get_paths()[0].vertices
    assert (corners.min(axis=0).tolist(), corners.max(axis=0).tolist()) == ([1, 2], [2, 8])

    assert draw(runs, "--output=a.png") == 0
    assert labels(figures[1]) == ["grpo_0", "grpo_1", "grpo_2", "ppo_0"]
    assert len(figures[1].axes[0].lines) == 4 and not figures[1].axes[0].collections


def test_one_thing_looks_the_same_in_all_panels(workdir, figures):
    with open(workdir / "metrics.jsonl", "a") as file:
        needle = {"step": 8, "eval/needle/loss": 1.0, "eval/needle/accuracy": 1.0}
        file.write(json.dumps(needle) + "\n")
    assert draw(f"--workdir={workdir}", "--keys=loss,accuracy", "--output=a.png") == 0
    (figure,) = figures
    assert labels(figure) == ["training", "needle", "validation"]
    training, needle, validation = figure.axes[0].lines
    (again,) = figure.axes[1].lines
    assert again.get_color() == needle.get_color()
    assert len({line.get_color() for line in (training, needle, validation)}) == 3
    assert (training.get_marker(), again.get_marker()) == ("None", needle.get_marker())
    assert needle.get_marker() != validation.get_marker()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output=a.png"], "either --workdir=RUN or --needle=F.json"),
        (["--workdir=nowhere", "--output=a.png"], "does not exist"),
        (["--workdir=RUN", "--output=a.png", "--keys=los"], "Did you mean 'loss'"),
        (["--workdir=RUN", "--output=a.pgn"], "Did you mean 'png'"),
        (["--workdir=RUN", "--output=a.png", "--mean"], "is no run: it has no config.json"),
        (["--workdir=RUN", "--output=missing/a.png"], "cannot be written"),
    ],
)
def test_bad_input_is_one_line(workdir, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert draw(*(a.replace("RUN", str(workdir)) for a in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1

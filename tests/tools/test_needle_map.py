"""The heat map: what its cells are of, and that it is drawn."""

import json

import pytest

from tools import plot
from tools.cli import run_tool
from tools.needle_map import accuracies

ROWS = [
    {"id": f"{n}", "depth": depth, "length": length, "correct": n % 3 == 0}
    for n, (depth, length) in enumerate([(0.0, 64), (0.5, 64), (1.0, 64), (0.0, 128)] * 3)
]

RECORD = {"run": "runs/a", "step": 3, "config": "c", "tokenizer": "t", "seconds": 1.0}


@pytest.fixture
def tool(tmp_path, capsys):
    def call(record, *arguments):
        (tmp_path / "record.json").write_text(json.dumps(record))
        argv = ["plot", f"--needle={tmp_path}/record.json", *arguments]
        status = run_tool(plot.main, plot.define_flags(), "", argv)
        return status, capsys.readouterr().err

    return call


def test_cells_are_shares_by_depth_and_length():
    expected = {(0.0, 64): 1 / 3, (0.0, 128): 1 / 3, (0.5, 64): 1 / 3, (1.0, 64): 1 / 3}
    assert accuracies({"examples": ROWS}) == pytest.approx(expected)
    assert accuracies({"examples": [{"id": "a", "nats": 1.0}]}) == accuracies({"error": "x"}) == {}


def test_a_picture_is_drawn(tool, tmp_path):
    tasks = {"needle": {"examples": ROWS}, "text": {"examples": []}, "key_value": {"error": "x"}}
    record = {**RECORD, "tasks": tasks}
    assert tool(record, f"--output={tmp_path}/map.png") == (0, "")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_a_record_without_a_grid_is_refused(tool, tmp_path):
    for record, message in [
        ({**RECORD, "tasks": {}}, "has no task over depth and length"),
        ({"tasks": {}}, "is no record of tools.evaluate"),
        ([], "holds no JSON object"),
    ]:
        status, error = tool(record, f"--output={tmp_path}/map.png")
        assert status == 2 and message in error
    assert tool({}, "--workdir=x", "--output=y.png")[0] == 2

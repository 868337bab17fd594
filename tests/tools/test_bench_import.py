"""The bound on the host memory of imports, measured."""

import json

import pytest

from tools.bench.__main__ import main


@pytest.mark.slow
def test_importing_takes_less_than_the_bound(tmp_path):
    output = tmp_path / "memory.json"
    arguments = ["--megabytes=1000", "--files=3", f"--output={output}"]
    assert main(["tools.bench", "import_memory", *arguments]) == 0
    results = json.loads(output.read_text())["results"]
    assert [(r["task"], r["dtype"]) for r in results] == [
        ("convert", "bfloat16"), ("load", "bfloat16"), ("convert", "float32"), ("load", "float32"),
    ]  # fmt: skip
    for result in results:
        assert result["peak_bytes"] < 1.3 * result["unit_bytes"]


@pytest.mark.parametrize("flag", ["--megabytes=10", "--files=0", "--config.seed=1"])
def test_what_cannot_be_measured_is_refused(capsys, flag):
    assert main(["tools.bench", "import_memory", flag]) == 2
    assert "error: " in capsys.readouterr().err

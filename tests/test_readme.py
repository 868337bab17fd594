"""What the README shows works as it stands there."""

import json
import re
from pathlib import Path

from llm_jax import config as config_module
from llm_jax.metrics import read_metrics_file
from llm_jax.trainers import TRAINERS

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_new_objective_trains_and_is_the_cross_entropy_at_gamma_0(
    tiny_config, run_on, tmp_path
):
    (code,) = re.findall(r"<!-- objective -->\n```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(code, names)
    try:
        plain = tiny_config()
        focal = config_module.defaults(names["FocalConfig"], **{**plain, "trainer": "focal"})
        losses = {}
        for label, gamma, config in (("plain", None, plain), ("0", 0.0, focal), ("2", 2.0, focal)):
            if gamma is not None:
                config.gamma = gamma
            assert run_on(1, config, tmp_path / label) == 0
            records = read_metrics_file(tmp_path / label / "metrics.jsonl")
            losses[label] = [record["loss"] for record in records if "loss" in record]
    finally:
        del TRAINERS["focal"]
    assert abs(losses["0"][0] - losses["plain"][0]) < 1e-4
    assert losses["2"][0] < losses["0"][0] and losses["2"][-1] < losses["2"][0]
    assert json.loads((tmp_path / "2" / "result.json").read_text())["stage"] == "focal"

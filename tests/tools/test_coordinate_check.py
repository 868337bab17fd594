import dataclasses

import pytest

from llm_jax.models import ModelConfig
from llm_jax.optim import OptimizerConfig
from tools import coordinate_check
from tools.cli import run_tool
from tools.coordinate_check import define_flags, main, measure, slopes

MODEL = ModelConfig(vocab_size=64, embed_dim=32, num_layers=1, num_heads=4, mlp_dim=64)
LAYERS = ["embedding", "layer_0/attention", "layer_0/mlp", "final_norm", "logits"]


def slopes_of(base, optimizer="adamw"):
    widths = (32, 128)
    model = dataclasses.replace(MODEL, mup_base_width=base)
    optimizer = OptimizerConfig(name=optimizer, learning_rate=2e-2)
    changes = measure(model, optimizer, widths, steps=4, rows=4, length=16)
    assert list(changes) == LAYERS and changes["logits"].shape == (2, 4)
    return slopes(widths, changes)


def test_changes_grow_with_the_width_unless_there_is_mup():
    without, with_mup = slopes_of(None), slopes_of(32)
    for layer in ("layer_0/attention", "layer_0/mlp", "logits"):
        assert without[layer] > 0.4, layer
    for layer in LAYERS:
        assert abs(with_mup[layer]) < 0.2, layer


@pytest.mark.slow
def test_muon_has_a_rule_of_its_own():
    for layer, slope in slopes_of(32, "muon").items():
        assert abs(slope) < 0.2, layer


def run(*arguments):
    return run_tool(main, define_flags(), "", ["coordinate_check", *arguments])


def test_the_tool_prints_slopes_and_draws_them(tmp_path, monkeypatch, capsys):
    def measured(model, optimizer, widths, steps, rows, length):
        power = 0.5 if model.mup_base_width else 1.0
        assert (widths, steps, rows, length) == ([64, 128], 2, 8, 64)
        change = [[w**power * s for s in (1, 2)] for w in widths]
        return {"logits": coordinate_check.np.array(change)}

    monkeypatch.setattr(coordinate_check, "measure", measured)
    output = tmp_path / "check.svg"
    flags = ["--config=configs/pretrain.py:size=tiny", "--widths=128,64", "--steps=2"]
    assert run(*flags, f"--output={output}") == 0
    said = capsys.readouterr().out
    assert "logits               +1.00" in said and "logits               +0.50" in said
    assert output.stat().st_size > 1000


@pytest.mark.parametrize("flags, message", [
    ([], "--config is required"),
    (["--config=configs/sft.py"], "is no pre-training config"),
    (["--config=configs/pretrain.py", "--widths=64"], "must be two different numbers or more"),
    (["--config=configs/pretrain.py", "--widths=64,wide"], "must be two different numbers or more"),
    (["--config=configs/pretrain.py:size=tiny", "--widths=48,64"], "at width 48 model.num_heads"),
])  # fmt: skip
def test_bad_input_is_one_line(capsys, flags, message):
    assert run(*flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1

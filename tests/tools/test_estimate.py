"""python -m tools.estimate, without the compiler: which command, and what is refused in a line."""

import json
from unittest import mock

import pytest

from llm_jax.scaling import compiled
from llm_jax.scaling.compiled import Memory, Program, TooLarge
from llm_jax.scaling.program import Collective
from tools.estimate import searching
from tools.estimate.__main__ import main

GB = 10**9


def program(peak=8 * GB):
    return Program(
        name="train, 8 rows of 64",
        memory=Memory(GB, 2 * GB, 10**7, GB, 0, peak, 0),
        flops=4e13,
        model_flops=3e13,
        traffic=8.19e11,
        collectives=(Collective("all-gather", ("fsdp",), 12, 5e9),),
        kernels={"splash": 4.0},
        seconds=1.0,
    )


@pytest.fixture
def run(capsys):
    def run(*arguments, step=None):
        config = "--config=configs/pretrain.py:size=tiny"
        from llm_jax.scaling.presets import find_cluster

        described = (find_cluster("v5e-4"), [None] * 4)
        with (
            mock.patch.object(compiled, "prepare"),
            mock.patch.object(compiled, "describe", return_value=described),
            mock.patch.object(compiled, "compile_train_step", return_value=step or program()),
            mock.patch.object(compiled, "compile_decode_step", return_value=program(GB)),
        ):
            status = main(["estimate", config, *arguments])
        return status, capsys.readouterr()

    return run


def test_what_a_person_reads(run, tmp_path):
    status, shown = run(
        "--topology=v5e:2x2", "--config.mesh.data=1", "--config.mesh.fsdp=4",
        "--phase=2", f"--json={tmp_path / 'out.json'}",
    )  # fmt: skip
    assert status == 0, shown.err
    assert "v5e:2x2: 4 devices of 16.91 GB (fsdp 4)" in shown.out
    assert "8.00 GB at the peak, fits" in shown.out
    assert "parameters 1.00, optimiser 2.00, gradients 1.00, inputs 0.01" in shown.out
    assert "40.00 TFLOP, 30.00 of them the model's: 203.05 ms" in shown.out
    assert "819.0 GB: 1.00 s" in shown.out
    assert "bound by memory; MFU 15%" in shown.out
    written = json.loads((tmp_path / "out.json").read_text())
    assert [p["fits"] for p in written["programs"]] == [True, True]
    assert written["programs"][0]["memory"]["peak"] == 8 * GB


def test_what_is_too_large(run):
    _, shown = run("--topology=v5e:2x2", "--decode_rows=0", step=program(17 * GB))
    assert "17.00 GB at the peak, does not fit" in shown.out
    too_large = TooLarge("train, 8 rows of 64", 2e10, 1.0)
    _, shown = run("--topology=v5e:2x2", "--decode_rows=0", step=too_large)
    assert "does not fit, needs 20.00 GB at least" in shown.out


@pytest.mark.parametrize("arguments, message", [
    ((), "--topology is required"),
    (("--topology=v5e:2x2", "--phase=3"), "the config has phases 1 to 2"),
    (("--topology=v5e:2x2", "--config.mesh.fsdp=3"), "config.mesh"),
    (("--topolgy=v5e:2x2",), "topolgy"),
])  # fmt: skip
def test_bad_input_is_one_line(run, arguments, message):
    status, shown = run(*arguments)
    assert status == 2
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1


def test_the_search_climbs_the_ladder_no_further_than_it_must(run):
    """A row takes 1 GB under the cheapest policy and half as much under each after it."""
    tried = []

    def compile_step(config, phase, devices):
        del devices
        tried.append((phase.batch, config.model.remat))
        rank = searching.LADDER.index(config.model.remat)
        return program(int(phase.batch * GB / 2**rank * 4))

    with mock.patch.object(searching, "compile_train_step", compile_step):
        status, shown = run("--topology=v5e:2x2", "--search", "--phase=1")
    assert status == 0, shown.err
    # 16.9 GB: 4 rows at 1, 1/2, 1/4, ... of 4 GB a row.
    assert tried[:3] == [(4, "none"), (8, "none"), (8, "save_products")]
    assert len(tried) == len(set(tried))
    assert "largest batch: 128 rows with remat offload" in shown.out
    assert "of up to the config's 16 rows: 16 rows with remat save_qkv_attention" in shown.out

"""tools.inspect: norms, partitions and records of runs, whole ones and others."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.config import resolved
from llm_jax.data.phases import PhaseConfig
from llm_jax.models import ModelConfig
from llm_jax.models.heads import REWARD
from llm_jax.models.lora import LoraConfig
from llm_jax.models.quantize import quantize
from llm_jax.stored import Stored
from llm_jax.types import join
from llm_jax.weights import abstract, init_trained, init_weights
from tools.convert.__main__ import main as convert
from tools.inspect.__main__ import run as inspect
from tools.inspect.parameters import boxes, measure


@pytest.fixture(scope="module")
def finished(tiny_config, run_on, tmp_path_factory):
    """A run that training made, of two steps."""
    workdir = tmp_path_factory.mktemp("inspect") / "run"
    phases = (PhaseConfig(length=32, batch=8, steps=2, rope_theta=20_000.0),)
    assert run_on(1, tiny_config(phases=phases), workdir) == 0
    return workdir


@pytest.fixture
def tool(capsys):
    """Runs the tool; returns exit status, lines of stdout, stderr."""

    def call(*arguments):
        status = inspect(["inspect", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err

    return call


def row(lines, name):
    """The cells of a line by its first one."""
    return next(line for line in lines if line.split()[:1] == [name]).split()


def test_norms_are_those_of_the_arrays(save_run, tmp_path, tool, random_params):
    run = save_run(tmp_path / "run", [3, 5])
    status, lines, error = tool(f"{run}@3", "--depth=9")
    assert (status, error) == (0, "")
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(random_params(3))
    }
    embedding = row(lines, "embedding")
    shown = "embedding float32 320 x 16 vocab, embed tensor, fsdp+context"
    assert " ".join(embedding[:9]) == shown
    values = leaves["embedding"].astype(np.float64)
    norms = [values.size, np.sqrt(np.sum(values**2)), np.sqrt(np.mean(values**2))]
    assert [float(x.replace(",", "")) for x in embedding[9:12]] == pytest.approx(norms, rel=1e-3)
    assert float(embedding[12]) == pytest.approx(np.abs(values).max(), rel=1e-3)
    assert embedding[13] == "-"
    everything = np.concatenate([leaf.ravel() for leaf in leaves.values()]).astype(np.float64)
    total = row(lines, "all")
    assert total[1] == f"{everything.size:,}"
    assert float(total[2]) == pytest.approx(np.sqrt(np.sum(everything**2)), rel=1e-3)
    attention = [leaf.ravel() for name, leaf in leaves.items() if "/attention/" in name]
    group = row(lines, "attention")
    assert group[1] == f"{sum(map(len, attention)):,}"
    squares = np.sum(np.concatenate(attention).astype(np.float64) ** 2)
    assert float(group[2]) == pytest.approx(np.sqrt(squares), rel=1e-3)


def test_what_is_not_finite_is_counted_and_left_out():
    x = jnp.array([3.0, jnp.nan, -4.0, jnp.inf])
    found = measure({"a": x, "b": jnp.ones((2, 3), jnp.bfloat16)})
    assert (found["a"].l2, found["a"].largest, found["a"].infinite) == (5.0, 4.0, 2)
    assert found["a"].rms == pytest.approx(np.sqrt(25 / 2))
    both = found["a"] + found["b"]
    assert (both.count, both.largest, both.infinite) == (10, 4.0, 2)
    assert both.l2 == pytest.approx(np.sqrt(31))


def test_depth_folds_groups(save_run, tmp_path, tool):
    run = save_run(tmp_path / "run", [3])
    _, lines, _ = tool(run, "--depth=1")
    names = [line.split()[0] for line in lines[lines.index("parameters on one chip") + 2 :]]
    assert names == ["embedding", "final_norm/scale", "layer_0", "all"]


def test_a_mesh_shows_the_part_of_a_chip(save_run, tmp_path, tool):
    run = save_run(tmp_path / "run", [3])
    _, lines, _ = tool(run, "--mesh=fsdp=4,tensor=2", "--depth=1")
    assert "parameters on 8 chips (fsdp 4, tensor 2)" in lines
    assert " ".join(row(lines, "embedding")[9:12]) == "160 x 4"
    status, _, error = tool(run, "--mesh=fsdp=3")
    assert status == 2 and "do not divide" in error and error.count("\n") == 1
    assert "--mesh: 'fdsp=3' is not understood" in tool(run, "--mesh=fdsp=3")[2]


@pytest.mark.parametrize("kind", [None, "int8", "nf4"])
def test_boxes_have_the_shapes_of_what_is_read(kind):
    model = ModelConfig(vocab_size=64, embed_dim=16, num_layers=2, num_heads=2, mlp_dim=16,
                        scan_layers=True, lora=LoraConfig(rank=2))  # fmt: skip
    rng = jax.random.key(0)

    def weights():
        base = init_weights(model, (), rng)
        base = quantize(base, kind) if kind else base
        return join(init_trained(model, (REWARD,), rng, base=base), base)

    meta = {"model": resolved(model), "heads": [REWARD], "base": {"quantized": kind}}
    found = boxes(Stored("here", 1, meta))
    mesh = jax.make_mesh((1,) * 6, ("stage", "data", "fsdp", "expert", "context", "tensor"))
    wanted = abstract(mesh, jax.eval_shape(weights))
    assert jax.tree.map(lambda x: x.shape, abstract(mesh, found)) == jax.tree.map(
        lambda x: x.shape, wanted
    )


def test_quantised_kernels_count_as_what_they_stand_for():
    kernel = jax.random.normal(jax.random.key(0), (32, 8))
    held = quantize({"mlp": {"down": {"kernel": kernel}}}, "int8")
    found = measure(held)["mlp"]["down"]["kernel"]
    assert found.count == 256 and found.l2 == pytest.approx(
        float(jnp.linalg.norm(kernel)), rel=1e-2
    )


def test_the_record_of_a_finished_run(finished, tool):
    status, lines, error = tool(finished, "--verify", "--depth=1")
    assert (status, error) == (0, "")
    assert lines[1] == f"  2  {size(finished, 2)} MB  complete, every array was read"
    text = "\n".join(lines)
    assert f"{finished}@2" in text and "pretrain, finished after 2 steps, 512 tokens" in text
    assert "1 of 1: length 32, batch 8, 2 steps, RoPE base 20000" in text
    assert "length 32" in text and "bytes, 264 tokens" in text
    result = json.loads((finished / "result.json").read_text())
    (stage,) = [line.split() for line in lines if line.startswith("  pretrain")]
    hashes = [result["hashes"][name] for name in ("config", "data", "tokenizer")]
    assert stage == ["pretrain", str(finished), "2", *hashes]


def size(run, step):
    folder = run / "checkpoints" / str(step)
    total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return f"{total / 1e6:,.1f}"


def test_the_lineage_names_stages_that_are_gone(save_run, tmp_path, tool):
    before = {"stage": "pretrain", "run": "/gone/base", "step": 7, "config": "abc123"}
    run = save_run(tmp_path / "run", [3], stage="sft", lineage=[before], template={"name": "plain"})
    _, lines, _ = tool(run, "--depth=1")
    assert next(line for line in lines if "/gone/base" in line).split() == [
        *["pretrain", "/gone/base", "(not", "there)", "7", "abc123", "-", "-"]
    ]
    assert row(lines, "template") == ["template", "plain"]


def test_damage_is_found_and_told(finished, tmp_path, tool):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "result.json").unlink()
    checkpoints = run / "checkpoints"
    for step in ("1", "3"):
        shutil.copytree(checkpoints / "2", checkpoints / step)
    shutil.rmtree(checkpoints / "1" / "train")
    data = max((checkpoints / "3").rglob("ocdbt.process_0/d/*"), key=lambda p: p.stat().st_size)
    data.write_bytes(data.read_bytes()[:100])
    for name in ("4.damaged", "5.orbax-checkpoint-tmp-0", "other"):
        (checkpoints / name).mkdir()
    status, lines, error = tool(f"{run}@2", "--verify", "--depth=1")
    assert (status, error) == (0, "")
    states = {line.split()[0]: line for line in lines[1 : lines.index("")]}
    assert "weights alone, which no run resumes, every array was read" in states["1"]
    assert "complete, every array was read" in states["2"]
    assert "damaged: " in states["3"] and "cannot be read" in states["3"]
    assert "set aside" in states["4.damaged"] and "no checkpoint" in states["other"]
    assert "unfinished" in states["5.orbax-checkpoint-tmp-0"]
    assert "not finished: no result.json" in "\n".join(lines)
    (run / "result.json").write_text("{")
    assert "not finished: result.json cannot be read" in "\n".join(tool(f"{run}@2")[1])
    shutil.rmtree(checkpoints / "3" / "meta")
    status, lines, error = tool(run)
    assert status == 2 and lines[4].endswith("damaged: meta missing")
    assert error.count("\n") == 1 and "checkpoints/3/meta cannot be read" in error


def test_a_half_run_says_what_is_there_and_what_is_missing(finished, tmp_path, tool):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(finished / "config.json", run)
    status, lines, error = tool(run)
    assert (status, lines) == (2, [])
    assert error == (
        f"error: {run} holds config.json, and no checkpoint that can be loaded; missing: "
        "a checkpoint, tokenizer, metrics.jsonl, result.json. Start its command again.\n"
    )
    (run / "checkpoints" / "2.orbax-checkpoint-tmp-0").mkdir(parents=True)
    assert "loaded, 1 of them unfinished or damaged;" in tool(run)[2]


def test_a_published_folder(finished, tmp_path, tool):
    folder = tmp_path / "published"
    assert convert(["convert", "export", f"--workdir={finished}", f"--hf={folder}"]) == 0
    status, lines, error = tool(folder, "--depth=1")
    assert (status, error) == (0, "")
    assert "a published llama model" in "\n".join(lines)
    own = [row(tool(finished, "--depth=1")[1], name) for name in ("embedding", "all")]
    assert own == [row(lines, name) for name in ("embedding", "all")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a run"),
        (["no/run"], "no/run is no run directory"),
        (["RUN@9"], "has no checkpoint '9'; it has 2"),
        (["RUN", "--depth=0"], "--depth=0 must be"),
        (["RUN", "more"], "unexpected argument 'more'"),
    ],
)
def test_bad_input_is_one_line(finished, tool, arguments, message):
    status, _, error = tool(*(a.replace("RUN", str(finished)) for a in arguments))
    assert status == 2 and message in error and error.count("\n") == 1


def test_a_reader_that_goes_away_is_no_error(finished):
    command = f"{sys.executable} -m tools.inspect {finished} | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")

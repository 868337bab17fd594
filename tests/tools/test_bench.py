"""The benches' mechanics. No test looks at how fast anything is."""

import gzip
import json
import statistics

import jax
import numpy as np
import pytest

from llm_jax import config as config_module
from llm_jax import sharding
from llm_jax.errors import UserError
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.models.size import flops_per_token
from llm_jax.objectives import lm
from llm_jax.optim import OptimizerConfig
from llm_jax.step import StepConfig
from llm_jax.trainers.pretrain import PretrainConfig
from tools.bench import loop, run_worker, step_gaps
from tools.bench.__main__ import main
from tools.bench.bare_step import BareStep, matmul_flops, random_batches
from tools.bench.protocol import Worker, WorkerError
from tools.bench.summary import show_flops, show_spread, spread
from tools.bench.train import Setting, torch_arguments

MODEL = ModelConfig(vocab_size=64, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16)
SMALL = [
    f"--config.model.{name}={getattr(MODEL, name)}"
    for name in ("embed_dim", "num_layers", "num_heads", "mlp_dim")
]


@pytest.fixture
def bench(capsys):
    """Runs `python -m tools.bench ...`; returns exit status, stdout, stderr."""

    def call(*arguments):
        status = main(["tools.bench", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


# --- the bare step --------------------------------------------------------------------------------


def test_bare_step_trains_as_the_objective_says():
    """Its first loss is the objective's at the initial parameters; it falls on one batch."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:2])
    model = LanguageModel(MODEL)
    objective = lm.make_objective(model, lm.LossConfig())
    config = PretrainConfig(
        optimizer=OptimizerConfig(learning_rate=1e-2), step=StepConfig(micro_batch_tokens=8)
    )
    with jax.set_mesh(mesh):
        bare = BareStep(config, mesh, model.init, objective, batch=8, length=8)
        (batch,) = random_batches(64, 8, 8, mesh, count=1)
        seconds = bare.compile(batch)
        bare.start([batch])
        assert len(bare.run(1)) == 1
        first = bare.loss
        assert len(bare.run(20)) == 20
        init_rng, _ = jax.random.split(jax.random.key(config.seed))
        params = jax.jit(lambda rng: sharding.unbox(model.init(rng)))(init_rng)
        expected, _ = jax.jit(objective)(params, batch, jax.random.key(0))
    assert bare.micro_batches == 4
    assert all(value > 0 for value in seconds.values())
    np.testing.assert_allclose(first, expected.value(), rtol=1e-5)
    assert bare.loss < first - 0.5


def test_random_batches_differ_and_predict_the_next_token():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    first, second = random_batches(50, 3, 7, mesh, count=2)
    assert first.tokens.shape == (3, 7)
    np.testing.assert_array_equal(first.tokens[:, 1:], first.targets[:, :-1])
    assert not np.array_equal(first.tokens, second.tokens)
    assert first.loss_weights.sum() == 21
    assert first.tokens.max() < 50


def test_matmul_flops_of_every_size_and_dtype():
    found = matmul_flops((16, 32))
    assert {dtype: set(sizes) for dtype, sizes in found.items()} == {
        "float32": {"16", "32"},
        "bfloat16": {"16", "32"},
    }
    assert all(speed > 0 for sizes in found.values() for speed in sizes.values())


# --- train ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_takes_two_settings_in_turn(bench, tmp_path):
    output = tmp_path / "result.json"
    status, out, err = bench(
        "train",
        "--config=tools/bench/default_config.py:size=tiny,vocabulary=64,batch=4,length=8",
        *SMALL,
        "--a=env.XLA_FLAGS=--xla_backend_optimization_level=0",  # it compiles faster
        "--b=model.dtype=bfloat16,step.micro_batch_tokens=8",
        "--rounds=2",
        "--steps=3",
        f"--output={output}",
    )
    assert (status, err) == (0, "")
    result = json.loads(output.read_text())
    a, b = result["sides"]
    assert (a["name"], a["model"]["dtype"], a["micro_batches"]) == ("A", "float32", 1)
    assert (b["name"], b["model"]["dtype"], b["micro_batches"]) == ("B", "bfloat16", 4)
    for side in (a, b):
        assert [len(turn) for turn in side["turns"]] == [3, 3]
        speeds = [4 * 8 / statistics.median(turn) for turn in side["turns"]]
        assert side["tokens_per_second"] == pytest.approx(spread(speeds))
        assert side["flops_per_token"] == flops_per_token(MODEL, 8)
        peak = result["matrix_product_peak"][side["model"]["dtype"]]["flops_per_second"]
        needed = side["tokens_per_second"]["median"] * side["flops_per_token"]
        assert side["mfu"] == pytest.approx(needed / peak)
        assert side["peak_memory_bytes"] > 0
        assert abs(side["loss"] - np.log(64)) < 1
        for which in ("cold", "warm"):
            assert all(seconds > 0 for seconds in side["compile_seconds"][which].values())
    (ratio,) = result["ratios"]
    rounds = [
        statistics.median(of_a) / statistics.median(of_b)
        for of_a, of_b in zip(a["turns"], b["turns"], strict=True)
    ]
    assert (ratio["of"], ratio["to"]) == ("B", "A")
    assert ratio["rounds"] == pytest.approx(rounds)
    assert ratio["min"] <= ratio["median"] <= ratio["max"]
    assert "tokens/s of B / A" in out
    assert max(map(len, out.splitlines())) <= 100


def test_a_setting_is_overrides_and_environment():
    setting = Setting.parse(
        "model.dtype=bfloat16,phases[0].batch=(1,2),env.XLA_FLAGS=--x=1 --y=2,3"
    )
    assert setting.overrides == ["--config.model.dtype=bfloat16", "--config.phases[0].batch=(1,2)"]
    assert setting.environment == {"XLA_FLAGS": "--x=1 --y=2,3"}
    assert Setting.parse("").overrides == []


def facts(**changes):
    """What a JAX side tells about a Llama, with changes of its model or of itself."""
    own = {"batch": 4, "length": 8, "head_dim": 8, "optimizer": "adamw"}
    model = {k: v for k, v in changes.items() if k not in own}
    own |= {k: v for k, v in changes.items() if k in own}
    return {**own, "model": {**config_module.resolved(MODEL), **model}}


def test_torch_gets_the_same_shape():
    arguments = dict(a.removeprefix("--").partition("=")[::2] for a in torch_arguments(facts()))
    assert arguments == {
        "vocab_size": "64",
        "embed_dim": "16",
        "num_layers": "1",
        "num_heads": "2",
        "num_kv_heads": "2",
        "mlp_dim": "16",
        "dtype": "float32",
        "batch": "4",
        "length": "8",
    }
    grouped = torch_arguments(facts(num_kv_heads=1, tie_embeddings=False, dtype="bfloat16"))
    assert {"--num_kv_heads=1", "--untied", "--dtype=bfloat16"} <= set(grouped)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mlp": "gelu"}, "model.mlp is 'swiglu'"),
        ({"window": 4}, "model.window"),
        ({"head_dim": 16}, "head_dim"),
        ({"optimizer": "lion"}, "not by lion"),
    ],
)
def test_torch_refuses_what_is_no_llama(change, says):
    with pytest.raises(UserError, match=says):
        torch_arguments(facts(**change))


# --- loop -----------------------------------------------------------------------------------------


@pytest.fixture
def tiny_run(corpus):
    """Arguments of a worker's function: a run of a tiny model on 100 KB of text."""
    overrides = [
        *SMALL,
        f"--config.data.source={corpus}",
        "--config.tokenizer.path=bytes",
        "--config.phases[1].length=16",
        "--config.mesh.data=8",
    ]
    return {"config": "configs/pretrain.py:size=tiny", "overrides": overrides, "phase": 2}


def test_loop_and_bare_step_take_turns_of_a_checkpoint_interval(tiny_run, tmp_path):
    tiny_run["overrides"].append("--config.checkpoint.every=4")
    notes = []
    answer = run_worker.overhead(notes.append, **tiny_run, rounds=2, workdir=str(tmp_path / "run"))
    assert len(answer["loop_seconds"]) == len(answer["bare_seconds"]) == 2
    assert min(answer["loop_seconds"] + answer["bare_seconds"]) > 0
    assert (answer["steps"], answer["batch"], answer["length"]) == (4, 8, 16)
    assert answer["tokens"] == 4 * 8 * 16
    assert notes[-1] == "round 2 of 2"
    # Turns end at steps 10 and 14: the checkpoints 8 and 12 are theirs, and there is none after.
    saved = {int(path.name) for path in (tmp_path / "run" / "checkpoints").glob("[0-9]*")}
    assert saved == {8, 12}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert lines and not any(key.startswith("eval/") for line in lines for key in line)


def test_overhead_is_what_the_loop_adds(bench, monkeypatch, tmp_path):
    class Answers:
        def __init__(self, module):
            assert module == "tools.bench.run_worker"

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def ask(self, call, **_):
            assert call == "overhead"
            return {
                "loop_seconds": [2.04, 1.02, 1.5],
                "bare_seconds": [2.0, 1.0, 1.0],
                "steps": 10,
                "tokens": 1000,
                "log_every": 5,
                "batch": 10,
                "length": 10,
                "platform": "cpu",
                "jax": "0",
            }

    monkeypatch.setattr(loop, "Worker", Answers)
    status, out, _ = bench("loop", f"--output={tmp_path / 'loop.json'}")
    assert status == 0
    assert "the loop adds 2.00% (2.00% to 50.00%)" in out
    overhead = json.loads((tmp_path / "loop.json").read_text())["overhead"]
    assert overhead["rounds"] == pytest.approx([0.02, 0.02, 0.5])


# --- trace ----------------------------------------------------------------------------------------


def operation(run, begin, end, module="jit_train_step", thread=1):
    arguments = {"hlo_module": module, "run_id": run}
    return event(thread, "fusion", begin, end, args=arguments)


def event(thread, name, begin, end, **more):
    return {
        "ph": "X",
        "pid": 1,
        "tid": thread,
        "name": name,
        "ts": begin,
        "dur": end - begin,
        **more,
    }


def dispatch(begin):
    """A call of the step as a trace shows it, within its Python frame and twice."""
    return [
        event(9, "$api.py:1 call", begin - 1, begin + 3),
        event(9, step_gaps.DISPATCH, begin, begin + 2),
        event(9, step_gaps.DISPATCH, begin + 1, begin + 2),
    ]


# Step 5 is in flight when the trace begins at 0; 6 to 8 follow, with a checkpoint after step 6.
EVENTS = [
    operation(50, 12, 20),
    *dispatch(10),
    operation(61, 25, 30),
    operation(61, 28, 90, thread=2),
    operation(77, 100, 130, module="jit_other"),
    event(9, "$train.py:7 save", 80, 140),
    event(9, "$checkpoint.py:1 save", 85, 139),
    *dispatch(145),
    operation(62, 150, 250),
    event(9, "$train.py:1 _read", 200, 210),
    *dispatch(220),
    operation(63, 252, 260),
]


def test_executions_last_from_first_to_last_operation():
    assert step_gaps.executions(EVENTS) == [
        (12, 20, ""),
        (25, 90, ""),
        (150, 250, ""),
        (252, 260, ""),
    ]


def test_executions_of_a_trace_with_whole_programs():
    line = {"ph": "M", "pid": 1, "tid": 5, "name": "thread_name", "args": {"name": "XLA Modules"}}
    programs = [
        event(5, "jit_train_step(123)", 30, 40),
        event(5, "jit_other(4)", 21, 22),
        event(5, "jit_train_step(123)", 10, 20),
    ]
    found = step_gaps.executions([line, *programs, operation(1, 11, 12)])
    assert found == [(10, 20, ""), (30, 40, "")]


@pytest.fixture
def traced(tmp_path):
    """A run directory that holds EVENTS as its trace."""
    config = {"profile": {"start": 5}, "metrics": {"every": 2}, "checkpoint": {"every": 6}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    folder = tmp_path / "profile/plugins/profile/now"
    folder.mkdir(parents=True)
    with gzip.open(folder / "host.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": EVENTS}, file)
    return tmp_path


def test_gaps_name_what_the_loop_did(traced):
    result = step_gaps.analyse(traced)
    assert result["steps"] == 3
    assert result["idle_share"] == pytest.approx(62 / 235)
    first, second = result["gaps"]
    assert (first["after_step"], first["kind"], second["kind"]) == (6, "checkpoint", "log")
    assert first["milliseconds"] == pytest.approx(0.060)
    # From 90 to 140, the whole of it and no callee besides; the dispatch from 145 to 147.
    assert first["meanwhile"] == pytest.approx(
        {"train.py:7 save": 0.050, step_gaps.DISPATCH: 0.002}
    )
    assert (second["milliseconds"], second["meanwhile"]) == (pytest.approx(0.002), {})
    assert result["step_milliseconds"] == pytest.approx(
        {"median": 0.0825, "min": 0.065, "max": 0.1}
    )


def test_trace_of_a_run(tiny_run, tmp_path):
    run_worker.trace(lambda text: None, **tiny_run, steps=8, workdir=str(tmp_path / "run"))
    result = step_gaps.analyse(tmp_path / "run")
    assert 6 <= result["steps"] <= 8
    assert result["gaps"][0]["after_step"] == 7
    assert {gap["after_step"] for gap in result["gaps"] if gap["kind"] == "checkpoint"} == {8, 12}
    assert 0 <= result["idle_share"] < 1
    assert result["step_milliseconds"]["min"] > 0


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "no command 'trian'. Did you mean 'train'?"),
        (["train", "--rounds=0"], "--rounds and --steps must be at least 1"),
        (["train", "--a=model.dtype"], "setting 'model.dtype' is not understood"),
        (["train", "--torch_args=--compile"], "--torch_args needs --torch"),
        (["train", "--output=nowhere/x.json"], "--output=nowhere/x.json can't be written"),
        (["train", "--a=model.dtypo=bfloat16"], "Did you mean config.model.dtype?"),
        (["train", "--phase=2"], "--phase=2: the config has phases 1 to 1"),
        (["loop", "--rounds=0"], "--rounds=0 must be at least 1"),
        (["loop", "--config=configs/nothing.py"], "'configs/nothing.py' does not exist"),
        (["trace", "--steps=2"], "--steps=2 must be at least 4"),
        (["trace", "--workdir=tests"], "--workdir=tests is no run"),
    ],
)
def test_bad_input_gets_one_line_and_status_2(bench, arguments, says):
    status, out, err = bench(*arguments)
    assert (status, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


def test_a_run_without_a_trace_says_how_to_make_one(bench, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    status, _, err = bench("trace", f"--workdir={tmp_path}")
    assert status == 2
    assert "--config.profile.steps=20" in err


def test_every_command_explains_itself(bench):
    status, out, _ = bench("--help")
    assert status == 0
    for command in ("train", "loop", "trace"):
        assert f"tools.bench {command}" in out
        status, text, _ = bench(command, "--help")
        assert status == 0
        assert "--output" in text


def test_a_worker_that_dies_leaves_its_last_words():
    with (
        Worker("tools.bench.run_worker") as worker,
        pytest.raises(WorkerError, match="ended with status 1: KeyError: 'nothing'"),
    ):
        worker.ask("nothing")


def test_an_interpreter_that_is_none_is_refused():
    with pytest.raises(WorkerError, match="no/python does not start"):
        Worker("tools.bench.torch_worker", python="no/python")


def test_numbers_in_words():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert show_spread(spread([3.0, 1.0, 2.0]), ".1f", 10) == "20.0 (10.0 to 30.0)"
    assert show_flops(999.6e9) == "1 TFLOP"
    assert show_flops(1234.0) == "1.23 kFLOP"

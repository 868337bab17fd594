"""The command line: what it answers at once, and one line for every bad input."""

import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from llm_jax.checkpoint import latest_step
from llm_jax.data.offline import OfflineSource
from llm_jax.main import default_workdir, main, parse

ROOT = Path(__file__).parents[1]
CONFIG = "configs/pretrain.py:size=tiny"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def small(corpus):
    """Flags that cut the tiny run short. Its meshes have all 8 devices."""
    return [
        "main",
        f"--config={CONFIG}",
        f"--config.data.source={corpus}",
        "--config.tokenizer.path=bytes",
        "--config.model.embed_dim=32",
        "--config.model.num_layers=1",
        "--config.model.mlp_dim=64",
        "--config.model.max_length=64",
        "--config.phases[0].length=16",
        "--config.phases[0].batch=8",
        "--config.phases[0].steps=4",
        "--config.phases[1].length=16",
        "--config.phases[1].steps=2",
        "--config.optimizer.learning_rate=0.005",
        "--config.optimizer.warmup_steps=1",
        "--config.evaluation.rows=8",
        "--config.checkpoint.every=2",
        "--config.metrics.tensorboard=False",
        "--config.sample.max_new_tokens=0",
    ]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def finished(finished_run, small):
    """The folder of a finished run of `small`."""
    if not finished_run.exists():
        assert main([*small, f"--workdir={finished_run}"]) == 0
    return finished_run


@pytest.fixture
def refused(capsys):
    """`refused(argv)`: the one line that bad input ends with."""

    def start(argv):
        capsys.readouterr()
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.endswith("\n") and error.count("\n") == 1
        return error.removeprefix("error: ").rstrip("\n")

    return start


def contents(folder):
    """Every file of a folder with its time of change and bytes."""
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- flags ----------------------------------------------------------------------------------------


def test_help_answers_without_jax():
    code = (
        "import sys; from llm_jax.main import main; status = main(['main', '--help']);"
        "print([m for m in ('jax', 'flax', 'orbax', 'grain') if m in sys.modules], status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    assert lines[-1] == "[] 0"
    for flag in ("--config", "--workdir", "--[no]debug"):
        assert flag in done.stdout


def test_a_mistyped_key_is_answered_without_jax_arrays():
    code = (
        "import sys; from llm_jax.main import main;"
        "main(['main', '--config=configs/pretain.py']); print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n"
    assert done.stderr.startswith("error: config file 'configs/pretain.py' does not exist.")


def test_a_sweep_file_is_no_config():
    command = [sys.executable, "-m", "llm_jax.main", "--config=configs/sweeps/lr.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: configs/sweeps/lr.py has no get_config: name a config, or, for a sweep file, run "
        "tools.sweep.\n"
    )


@pytest.mark.parametrize("module", ["llm_jax", "llm_jax.run"])
def test_importing_brings_neither_tensorflow_nor_torch(module):
    code = f"import sys, {module}; print([m for m in ('tensorflow', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def test_the_run_directory_is_named_after_the_config():
    assert default_workdir("configs/pretrain.py") == "runs/pretrain"
    assert default_workdir("configs/pretrain.py:size=tiny") == "runs/pretrain-size=tiny"
    assert default_workdir("elsewhere/my.py:data=a/b") == "runs/my-data=a_b"
    assert parse(["main", f"--config={CONFIG}"])[1] == "runs/pretrain-size=tiny"
    assert parse(["main", "--config", CONFIG, "--workdir=x"])[1] == "x"


def test_overrides_reach_leaves_of_every_kind(small):
    config, _ = parse([
        *small,
        "--config.phases[1].rope_theta=5e5",
        "--config.phases[1].rope_scaling=linear",
        "--config.seed=3",
        "--config.init_from=runs/before@4",
        "--config.model.num_kv_heads=1",
        "--config.model.scan_layers",
        "--config.data.packing=best_fit",
    ])  # fmt: skip
    assert (config.phases[0].length, config.phases[1].length) == (16, 16)
    assert (config.phases[1].rope_theta, config.phases[1].rope_scaling) == (5e5, "linear")
    assert (config.seed, config.init_from) == (3, "runs/before@4")
    assert (config.model.num_kv_heads, config.model.scan_layers) == (1, True)
    assert config.data.packing == "best_fit"


# --- bad flags and configs ------------------------------------------------------------------------


@pytest.mark.parametrize("argv, message", [
    ([], "--config is required, for example --config=configs/pretrain.py."),
    (["--config=configs/pretain.py"], "Did you mean 'configs/pretrain.py'?"),
    (["--config=configs"], "config file 'configs' does not exist."),
    (["--config=configs/pretrain.py:tiny"], "config argument 'tiny' is not understood"),
    (["--config=configs/pretrain.py:size=tny"], "size='tny' is unknown. Did you mean 'tiny'?"),
    ([f"--config={CONFIG}", "--worfdir=x"], "worfdir"),
    ([f"--config={CONFIG}", "runs/x"], "unexpected argument 'runs/x'"),
    ([f"--config={CONFIG}", "--config.optimizer.learning_rat=1"],
     "no key 'optimizer.learning_rat'. Did you mean config.optimizer.learning_rate?"),
    ([f"--config={CONFIG}", "--config.learning_rate=1"],
     "Did you mean config.optimizer.learning_rate?"),
    ([f"--config={CONFIG}", "--config.phases[2].length=1"], "no key 'phases[2].length'"),
    ([f"--config={CONFIG}", "--config.model.embed_dim=wide"], "wide"),
    ([f"--config={CONFIG}", "--config.model.embed_dim=1.5"], "1.5"),
    ([f"--config={CONFIG}", "--config.model.embed_dim=0"], "model.embed_dim=0 must be positive."),
    ([f"--config={CONFIG}", "--config.model.dtype=float16"],
     "config.model.dtype='float16' is not one of float32, bfloat16."),
    ([f"--config={CONFIG}", "--config.trainer=pretran"], "Did you mean 'pretrain'?"),
    ([f"--config={CONFIG}", "--config.checkpoint.every=0"], "config.checkpoint.every=0"),
    ([f"--config={CONFIG}", "--config.evaluation.every=0"], "config.evaluation.every=0"),
    ([f"--config={CONFIG}", "--config.optimizer.name=adam"], "config.optimizer.name='adam'"),
    ([f"--config={CONFIG}", "--config.mesh.data=3"], "does not fit 8 devices"),
    ([f"--config={CONFIG}", "--config.mesh.data=16"], "does not fit 8 devices"),
    ([f"--config={CONFIG}", "--config.mesh.fsdp=-1"], "at most one may be -1"),
    ([f"--config={CONFIG}", "--config.mesh.fsdp=0"], "sizes are positive"),
])  # fmt: skip
def test_a_bad_flag_is_one_line(refused, tmp_path, argv, message):
    workdir = tmp_path / "run"
    assert message in refused(["main", *argv, f"--workdir={workdir}"])
    assert not workdir.exists()


def test_debug_shows_where_an_error_comes_from():
    with pytest.raises(Exception, match="does not exist"):
        main(["main", "--config=configs/none.py", "--debug"])


# --- what does not fit together -------------------------------------------------------------------


@pytest.mark.parametrize("flags, message", [
    (["--config.phases[0].batch=12"],
     "a batch of 12 sequences is not divided by the mesh's 8 batch shards"),
    (["--config.phases[1].length=65"],
     "length 65 is past the positions of model.max_length=64"),
    (["--config.phases[0].tokens=100"], "config.phases[0] needs exactly one of steps and tokens."),
    (["--config.phases[0].steps=0"], "config.phases[0] has 0 steps"),
    (["--config.phases[0].rewarm_steps=5"], "config.phases[0].rewarm_steps=5"),
    (["--config.optimizer.warmup_steps=7"], "config.optimizer.warmup_steps=7 is longer"),
    (["--config.model.vocab_size=100"],
     "the tokenizer has 264 tokens and config.model.vocab_size is 100"),
    (["--config.tokenizer.path=none.json"], "tokenizer.path='none.json' does not exist"),
    (["--config.data.validation_fraction=1.5"], "validation_fraction=1.5"),
    (["--config.data.packing=tight"], "config.data.packing='tight' is not one of"),
    (["--config.init_from=configs"], "configs is no run directory"),
    (["--config.init_from=/nowhere@3"], "/nowhere is no run directory"),
])  # fmt: skip
def test_what_does_not_fit_is_one_line_and_leaves_no_run(refused, small, tmp_path, flags, message):
    workdir = tmp_path / "run"
    assert message in refused([*small, *flags, f"--workdir={workdir}"])
    assert not workdir.exists()


def test_a_dimension_that_the_mesh_does_not_divide_is_named(refused, small, tmp_path):
    flags = ["--config.mesh.data=4", "--config.mesh.tensor=2", "--config.model.mlp_dim=63"]
    line = refused([*small, *flags, f"--workdir={tmp_path / 'run'}"])
    assert "mlp" in line and "has 63 along 'mlp'" in line


# --- the corpus -----------------------------------------------------------------------------------


def test_a_corpus_that_does_not_exist(refused, small, corpus, tmp_path):
    wrong = corpus.with_name("corpsu.txt")
    line = refused([*small, f"--config.data.source={wrong}", f"--workdir={tmp_path / 'run'}"])
    assert line.endswith("does not exist. Did you mean 'corpus.txt'?")


@pytest.mark.parametrize("content", ["", " \n\n\t\n"])
def test_an_empty_corpus(refused, small, tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_text(content)
    line = refused([*small, f"--config.data.source={path}", f"--workdir={tmp_path / 'run'}"])
    assert f"source={str(path)!r} holds no document" in line
    assert not (tmp_path / "run").exists()


def test_a_corpus_that_cannot_be_read(refused, small, tmp_path):
    damaged = tmp_path / "damaged.jsonl.gz"
    damaged.write_bytes(gzip.compress(b'{"text": "abc"}\n' * 1000)[:-20])
    line = refused([*small, f"--config.data.source={damaged}", f"--workdir={tmp_path / 'run'}"])
    assert str(damaged) in line

    locked = tmp_path / "locked.txt"
    locked.write_text("words " * 1000)
    error = PermissionError(errno.EACCES, "Permission denied", str(locked))
    real = open

    def refuse(path, *args, **kwargs):
        if str(path) == str(locked):
            raise error
        return real(path, *args, **kwargs)

    with mock.patch("builtins.open", refuse), mock.patch("io.open", refuse):
        line = refused([*small, f"--config.data.source={locked}", f"--workdir={tmp_path / 'run'}"])
    assert str(locked) in line and "Permission denied" in line
    assert not (tmp_path / "run").exists()


def test_a_malformed_line_is_named_or_skipped_and_counted(refused, small, tmp_path, capsys):
    path = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": f"document {i} " * 40}) for i in range(40)]
    lines[6:6] = ["{not json", json.dumps({"body": "no text"})]
    path.write_text("\n".join(lines))
    argv = [*small, f"--config.data.source={path}", f"--workdir={tmp_path / 'run'}"]
    line = refused(argv)
    assert f"{path}:7: " in line and "data.malformed=skip" in line
    assert not (tmp_path / "run").exists()

    assert main([*argv, "--config.data.malformed=skip"]) == 0
    assert "2 malformed" in capsys.readouterr().out


# --- the run directory ----------------------------------------------------------------------------


def test_a_finished_run_is_left_alone(finished, small, capsys):
    before = contents(finished)
    assert main([*small, f"--workdir={finished}"]) == 0
    assert "is finished already: nothing to do" in capsys.readouterr().out
    assert contents(finished) == before


def test_a_run_of_another_config_is_left_alone(refused, finished, small):
    before = contents(finished)
    line = refused([*small, "--config.optimizer.learning_rate=0.25", f"--workdir={finished}"])
    assert "was made with another config: optimizer.learning_rate was 0.005 and is 0.25 now" in line
    line = refused(
        [*small, "--config.seed=1", "--config.model.mlp_dim=32", f"--workdir={finished}"]
    )
    assert "seed was 0 and is 1 now (it is one of 2 such keys)" in line
    assert contents(finished) == before


def test_what_decides_no_update_may_change(finished, small):
    flags = ["--config.mesh.fsdp=2", "--config.metrics.every=3", "--config.checkpoint.every=7"]
    assert main([*small, *flags, f"--workdir={finished}"]) == 0


def test_a_workdir_that_is_a_file(refused, small, tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    assert "is a file: name a folder." in refused([*small, f"--workdir={path}"])
    assert path.read_text() == "mine"


def test_a_workdir_with_other_files(refused, small, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    assert "holds files but no run" in refused([*small, f"--workdir={tmp_path}"])
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_workdir_under_a_file(refused, small, tmp_path):
    (tmp_path / "file").write_text("mine")
    line = refused([*small, f"--workdir={tmp_path / 'file' / 'run'}"])
    assert "cannot be written" in line and str(tmp_path / "file") in line


# --- init_from ------------------------------------------------------------------------------------


@pytest.mark.parametrize("step, message", [
    ("5", "has no checkpoint '5'; it has"),
    ("last", "has no checkpoint 'last'; it has"),
])  # fmt: skip
def test_an_init_from_without_such_a_step(refused, finished, small, tmp_path, step, message):
    argv = [*small, f"--config.init_from={finished}@{step}", f"--workdir={tmp_path / 'run'}"]
    assert message in refused(argv)
    assert not (tmp_path / "run").exists()


def test_an_init_from_with_damaged_parameters(refused, finished, small, tmp_path):
    before = tmp_path / "before"
    shutil.copytree(finished, before)
    for path in (before / "checkpoints" / "6" / "params").rglob("d/*"):
        os.truncate(path, path.stat().st_size // 2)
    argv = [*small, f"--config.init_from={before}", f"--workdir={tmp_path / 'run'}"]
    assert "cannot be read" in refused(argv)
    assert latest_step(tmp_path / "run") is None


# --- damaged checkpoints --------------------------------------------------------------------------


def test_when_every_checkpoint_is_damaged_one_line_says_so(refused, finished, small, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "result.json").unlink()
    for path in (workdir / "checkpoints").glob("*/train/**/d/*"):
        os.truncate(path, path.stat().st_size // 2)
    assert "can be read" in refused([*small, f"--workdir={workdir}"])


def test_when_every_meta_is_damaged_one_line_says_so(refused, finished, small, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "result.json").unlink()
    for path in (workdir / "checkpoints").glob("*/meta/metadata"):
        os.truncate(path, 0)
    before = contents(workdir)
    assert "cannot be read" in refused([*small, f"--workdir={workdir}"])
    assert contents(workdir) == before


# --- a full disk ----------------------------------------------------------------------------------


def test_a_disk_that_is_full_from_the_start(refused, small, tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "run" / "config.json"))
    with mock.patch("llm_jax.run.write_json", side_effect=full):
        line = refused([*small, f"--workdir={tmp_path / 'run'}"])
    assert line.startswith("the disk is full") and "config.json" in line


@pytest.mark.parametrize("file_name", ["metrics", "result"])
def test_a_disk_that_fills_up_while_recording(refused, small, tmp_path, file_name):
    full = OSError(errno.ENOSPC, "No space left on device")
    target = {"metrics": "llm_jax.metrics.JsonLines.write", "result": "llm_jax.run._write_result"}
    with mock.patch(target[file_name], side_effect=full):
        assert refused([*small, f"--workdir={tmp_path}"]).startswith("the disk is full")
    assert main([*small, f"--workdir={tmp_path}"]) == 0


def test_a_small_file_system(refused, small, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only the superuser can mount a small file system")
    try:
        workdir = disk / "run"
        argv = [*small, "--config.checkpoint.keep_latest=100", f"--workdir={workdir}"]
        assert refused(argv).startswith("the disk is full")
        assert json.loads((workdir / "config.json").read_text())["seed"] == 0
        written = latest_step(workdir)
        assert written is not None  # the first checkpoint fitted and is whole

        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        assert main(argv) == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint(small, tmp_path, capsys, number):
    real = OfflineSource.next

    def next_batch(source, params, step):
        if step == 2:
            os.kill(os.getpid(), number)
        return real(source, params, step)

    with mock.patch.object(OfflineSource, "next", next_batch):
        assert main([*small, f"--workdir={tmp_path}"]) == 128 + number
    assert "stopped at 3 steps" in capsys.readouterr().out
    assert latest_step(tmp_path) == 3
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_before_the_first_step_shows_no_traceback(small, tmp_path, capsys):
    with mock.patch("llm_jax.run.run", side_effect=KeyboardInterrupt):
        assert main([*small, f"--workdir={tmp_path}"]) == 130
    assert capsys.readouterr().err.count("\n") == 1

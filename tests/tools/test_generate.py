import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from llm_jax.data.examples import Message
from llm_jax.data.templates import TEMPLATES
from llm_jax.data.tokenizer_base import ByteTokenizer
from llm_jax.data.tokenizer_json import train_bpe
from llm_jax.errors import UserError
from llm_jax.generation.generate import document_prompt, document_stop_ids, generate_texts
from llm_jax.generation.proxy import Part, weighted
from llm_jax.generation.sampler import SamplerConfig
from llm_jax.mesh import MeshConfig
from llm_jax.models.heads import REWARD
from llm_jax.runs import load_run
from tools.cli import run_tool
from tools.generate import define_flags, main
from tools.sampling import load_speaker

TEMPLATE = TEMPLATES["chatml"]


@pytest.fixture(scope="module")
def workdir(save_run, tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "tiny", (3, 5), length=32)


@pytest.fixture(scope="module")
def chat_run(save_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "chat"
    return save_run(folder, (5,), stage="sft", template=TEMPLATE.describe())


@pytest.fixture
def expect(tiny_model, random_params):
    """`expect(prompt, step, ...)`: what the tool is to print of one sample."""

    def make(prompt, step=5, count=1, sampler=None, seed=0, writer=None, **settings):
        tokenizer = ByteTokenizer()
        settings = {"stop_ids": document_stop_ids(tokenizer), "echo": True, **settings}
        if isinstance(prompt, str):
            prompt = document_prompt(tokenizer, prompt)
        texts = generate_texts(
            *(writer or (tiny_model, random_params(step))), tokenizer, [prompt] * count,
            max_new_tokens=12, sampler=sampler or SamplerConfig(), rng=jax.random.key(seed),
            **settings,
        )  # fmt: skip
        return "".join(f"{text}\n" for text in texts)

    return make


@pytest.fixture
def copy(workdir, tmp_path):
    """A run that a test may damage."""
    return shutil.copytree(workdir, tmp_path / "copy")


@pytest.fixture
def tool(capsys):
    """Runs the tool; returns exit status, stdout, stderr."""

    def call(*arguments):
        status = run_tool(main, define_flags(), "", ["generate", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.mark.parametrize(("suffix", "step"), [("", 5), ("@3", 3)])
def test_a_run_is_loaded_at_its_newest_checkpoint_or_the_one_named(
    workdir, suffix, step, tiny_model, random_params
):
    run = load_run(f"{workdir}{suffix}")
    assert (run.path, run.step, run.model.config) == (workdir, step, tiny_model.config)
    assert run.meta["length"] == 32
    assert run.tokenizer.fingerprint == ByteTokenizer().fingerprint
    jax.tree.map(np.testing.assert_array_equal, run.params, random_params(step))
    assert all(
        leaf.sharding.device_set == set(jax.devices()) for leaf in jax.tree.leaves(run.params)
    )


def test_a_run_is_loaded_onto_the_mesh_that_is_asked_for(workdir):
    run = load_run(str(workdir), MeshConfig(data=1, fsdp=-1))
    table = run.params["embedding"]
    assert table.sharding.shard_shape(table.shape) == (320, 2)


@pytest.mark.parametrize("count", [1, 2])
def test_the_tool_prints_prompt_and_continuation_alone(workdir, tool, expect, count):
    status, out, err = tool(
        f"--workdir={workdir}", "--prompt=def ", "--max_new_tokens=12", "--seed=4",
        "--temperature=0.8", "--top_k=40", "--top_p=0.9", "--min_p=0.02",
        "--repetition_penalty=1.3", f"--num_samples={count}",
    )  # fmt: skip
    sampler = SamplerConfig(0.8, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.3)
    assert status == 0
    assert out == expect("def ", count=count, sampler=sampler, seed=4)
    assert out.startswith("def ") and len(out) > 6
    assert err.splitlines()[0] == f"{workdir}@5"


def test_the_defaults_are_the_samplers(workdir, tool, expect):
    _, out, _ = tool(f"--workdir={workdir}@3", "--max_new_tokens=12")
    assert out == expect("", step=3)


@pytest.mark.parametrize("count", [1, 2])
def test_every_stop_ends_the_text(workdir, tool, expect, count):
    arguments = (f"--workdir={workdir}", "--prompt=x", "--max_new_tokens=12", "--seed=1")
    arguments = (*arguments, f"--num_samples={count}")
    first = expect("x", seed=1)
    stops = ["never", first[4:6]]
    _, out, _ = tool(*arguments, *(f"--stop={stop}" for stop in stops))
    assert out == expect("x", seed=1, count=count, stop_strings=stops)
    assert out.startswith(f"{first[:4]}\n")


@pytest.mark.parametrize("count", [1, 2])
def test_chat_renders_a_user_turn_and_prints_the_answer_alone(chat_run, tool, expect, count):
    tokenizer = ByteTokenizer()
    arguments = (f"--workdir={chat_run}", "--prompt=hi", "--max_new_tokens=12")
    arguments = (*arguments, f"--num_samples={count}")
    prompt = TEMPLATE.render_prompt([Message("user", "hi")], (), tokenizer)
    stop_ids = TEMPLATE.stop_ids(tokenizer)
    status, out, _ = tool(*arguments, "--chat")
    assert status == 0
    assert out == expect(prompt, count=count, stop_ids=stop_ids, echo=False)
    _, out, _ = tool(*arguments)
    assert out == expect("hi", count=count)


def test_an_expert_and_an_anti_expert_steer_the_base(
    workdir, tool, expect, tiny_model, random_params
):
    arguments = (f"--workdir={workdir}@3", "--prompt=def ", "--max_new_tokens=12")
    status, out, err = tool(*arguments, f"--expert={workdir}@5", f"--anti_expert={workdir}@3")
    assert (status, out) == (0, expect("def ", step=5))
    assert err == f"{workdir}@3 +1 * {workdir}@5 -1 * {workdir}@3\n"

    base, expert = (Part(tiny_model, random_params(step)) for step in (3, 5))
    for flag, weight in (("expert", 0.5), ("anti_expert", -0.5)):
        _, out, err = tool(*arguments, f"--{flag}={workdir}@5", "--strength=0.5")
        assert out == expect("def ", writer=weighted([(1, base), (weight, expert)]))
        assert err == f"{workdir}@3 {weight:+g} * {workdir}@5\n"


def test_an_experts_words_are_answered_by_its_template(chat_run, workdir, tool, expect):
    steered = (f"--workdir={workdir}", f"--expert={chat_run}", f"--anti_expert={workdir}")
    prompt = TEMPLATE.render_prompt([Message("user", "hi")], (), ByteTokenizer())
    _, out, _ = tool(*steered, "--prompt=hi", "--max_new_tokens=12", "--chat")
    assert out == expect(prompt, stop_ids=TEMPLATE.stop_ids(ByteTokenizer()), echo=False)


def test_the_template_of_the_base_goes_before_that_of_the_expert(save_run, chat_run, tmp_path):
    other = save_run(tmp_path / "other", (5,), template=TEMPLATES["zephyr"].describe())
    for base, expert in ((chat_run, other), (other, chat_run)):
        values = define_flags()
        values(["generate", f"--workdir={base}", f"--expert={expert}"])
        assert load_speaker(values).chat_template == load_run(str(base)).stored.template


def test_runs_of_other_tokenizers_or_without_words_cannot_steer(workdir, save_run, tmp_path, tool):
    other = shutil.copytree(workdir, tmp_path / "other")
    shutil.rmtree(other / "tokenizer")
    train_bpe(["some text to be cut"], 280).save(other / "tokenizer")
    scorer = save_run(tmp_path / "reward", (5,), head=True, heads=[REWARD])
    for run, message in [
        (other, f"{other} has another tokenizer than {workdir}, whose logits are those of other"),
        (scorer, f"{scorer} is a reward model: it scores texts"),
    ]:
        for flag in ("expert", "anti_expert"):
            status, out, err = tool(f"--workdir={workdir}", f"--{flag}={run}")
            assert (status, out) == (2, "")
            assert err.startswith(f"error: {message}") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--workdir is required"),
        (["--workdir=no/such/run"], "no/such/run is no run directory"),
        (["--workdir=RUN@4"], "has no checkpoint '4'; it has 3, 5"),
        (["--workdir=RUN", f"--prompt={'x' * 60}"], "prompt 0 of 61 tokens and max_new_tokens=128"),
        (["--workdir=RUN", "--max_new_tokens=0"], "max_new_tokens=0"),
        (["--workdir=RUN", "--temperature=-1"], "temperature=-1.0"),
        (["--workdir=RUN", "--top_p=2"], "top_p=2.0"),
        (["--workdir=RUN", "--min_p=2"], "min_p=2.0"),
        (["--workdir=RUN", "--repetition_penalty=0"], "repetition_penalty=0.0"),
        (["--workdir=RUN", "--max_new_tokens=9", "--stop="], "a stop string is empty"),
        (["--workdir=RUN", "--chat", "--prompt= "], "--chat needs a --prompt"),
        (["--workdir=RUN", "--chat", "--prompt=a"], "is a pre-trained run, without a chat templat"),
        (["--workdir=RUN", "--num_samples=0"], "--num_samples=0"),
        (["--workdir=RUN", "--prompt=\udcff"], "--prompt is not UTF-8"),
        (["--workdir=RUN", "--temprature=1"], "Did you mean: temperature"),
        (["--workdir=RUN", "--top_k=many"], "top_k=many"),
        (["--workdir=RUN", "prompt"], "unexpected argument 'prompt'"),
        (["--workdir=RUN", "--expert=no/such/run"], "no/such/run is no run directory"),
        (["--workdir=RUN", "--strength=2"], "--strength=2 has nothing to weigh: give --expert"),
        (["--workdir=RUN", "--expert=RUN", "--strength=nan"], "--strength=nan must be a finite"),
    ],
)
def test_bad_input_gets_one_line(workdir, tool, arguments, message):
    status, out, err = tool(*(a.replace("RUN", str(workdir)) for a in arguments))
    last = err.splitlines()[-1]
    assert status == 2 and out == ""
    assert last.startswith("error: ") and message in last
    assert err.count("error") == 1 and "Traceback" not in err


def test_a_run_without_a_checkpoint_gets_one_line(copy, tool):
    shutil.rmtree(copy / "checkpoints")
    status, out, err = tool(f"--workdir={copy}")
    assert (status, out) == (2, "")
    assert err == f"error: {copy} holds no checkpoint yet: run its stage first.\n"


@pytest.mark.parametrize("damage", ["checkpoints/5/params", "checkpoints/5/meta", "tokenizer"])
def test_a_damaged_run_gets_one_line(copy, tool, damage):
    shutil.rmtree(copy / damage)
    status, out, err = tool(f"--workdir={copy}")
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and str(copy / damage) in err and err.count("\n") == 1


def test_debug_shows_the_traceback(workdir, tool):
    with pytest.raises(UserError, match="no run directory"):
        tool("--workdir=no/such/run", "--debug")


def test_help_does_not_wait_for_jax():
    code = """
import runpy, sys
sys.argv = ["generate", "--help"]
try:
    runpy.run_module("tools.generate", run_name="__main__")
finally:
    assert "jax" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "python -m tools.generate --workdir=RUN" in done.stdout
    assert "--max_new_tokens: tokens to add at most (default: 128)" in done.stdout


def test_a_reader_that_goes_away_is_no_error(workdir):
    command = [sys.executable, "-m", "tools.generate", f"--workdir={workdir}", "--max_new_tokens=9"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    err = process.stderr.read()
    assert (process.wait(), len(err.splitlines())) == (0, 1), err


def test_the_command_line_ends_with_the_status():
    command = [sys.executable, "-m", "tools.generate", "--top_k=0", "--workdir=RUN"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: sampler.top_k=0")


def test_what_training_writes_can_be_continued(run_on, tiny_config, tmp_path, tool, capsys):
    folder = tmp_path / "run"
    run_on(1, tiny_config(), folder)
    capsys.readouterr()
    status, out, err = tool(f"--workdir={folder}", "--prompt=kalo ", "--max_new_tokens=8")
    assert status == 0 and out.startswith("kalo ")
    assert err == f"{folder}@{json.loads((folder / 'result.json').read_text())['step']}\n"

import json
import subprocess
import sys

import pytest

from llm_jax.data.tokenizer_json import train_bpe
from llm_jax.errors import UserError
from tools.show.__main__ import main as show

TURNS = [
    {"role": "user", "content": "Größe?"},
    {"role": "assistant", "content": "Groß.\nSehr."},
]
CHAT = "<|bos|><|user|>Größe?<|end_of_turn|><|assistant|>⟦Groß.\nSehr.<|end_of_turn|>⟧\n"
COLOURED = (
    "\x1b[1m<|bos|><|user|>\x1b[0mGröße?\x1b[1m<|end_of_turn|><|assistant|>\x1b[0m"
    "\x1b[32mGroß.\x1b[0m\n\x1b[32mSehr.\x1b[0m\x1b[1;32m<|end_of_turn|>\x1b[0m\n"
)


@pytest.fixture
def chats(tmp_path):
    """A file of four conversations."""
    file = tmp_path / "chats.jsonl"
    rows = [TURNS, *([{"role": "user", "content": str(n)}, TURNS[1]] for n in range(3))]
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return file


@pytest.fixture
def tool(capsys, monkeypatch):
    """Runs the tool without a terminal; returns exit status, stdout, stderr."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def call(*arguments):
        status = show(["show", "template", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_trained_tokens_stand_in_brackets(chats, tool):
    status, out, err = tool(f"--data={chats}", "--rows=1")
    assert (status, err) == (0, "")
    assert out == (
        f"example 1, {chats}:1: 25 tokens, 13 trained (52.0%)\n{CHAT}\n"
        "together: 25 tokens, 13 trained (52.0%)\n"
    )


@pytest.mark.parametrize(("arguments", "shown"), [([], 3), (["--rows=2"], 2), (["--rows=9"], 4)])
def test_as_many_rows_are_shown_as_asked_for(chats, tool, arguments, shown):
    _, out, _ = tool(f"--data={chats}", *arguments)
    assert out.count("\nexample ") + 1 == shown
    assert f"together: {25 + 18 * (shown - 1)} tokens, {13 * shown} trained" in out


def test_trained_tokens_are_coloured_on_a_terminal(chats, tool, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert COLOURED in tool(f"--data={chats}")[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert f"\n{CHAT}\n" in tool(f"--data={chats}")[1]


def test_long_lines_stay_whole(tmp_path, tool, monkeypatch):
    file = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "word " * 100}, TURNS[1]]
    file.write_text(json.dumps({"messages": turns}))
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert ("word " * 100).strip() in tool(f"--data={file}")[1]


@pytest.mark.parametrize("colour", ["0", "1"])
def test_no_example_commands_the_terminal(tmp_path, tool, monkeypatch, colour):
    file = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "a\x1b[31m\x9bb\rc [red]"}, TURNS[1]]
    file.write_text(json.dumps({"messages": turns}))
    monkeypatch.setenv("NO_COLOR" if colour == "0" else "FORCE_COLOR", "1")
    _, out, _ = tool(f"--data={file}")
    assert "a␛[31m\ufffdb␍c [red]" in out


def test_a_comparison_is_its_prompt_and_its_answers_with_scores(tmp_path, tool):
    file = tmp_path / "pairs.jsonl"
    row = {
        "prompt": [*TURNS, {"role": "user", "content": "Hi"}],
        "chosen": [{"role": "assistant", "content": "Hello!"}],
        "rejected": [{"role": "assistant", "content": "Go."}],
    }
    file.write_text(json.dumps(row))
    _, out, _ = tool(f"--data={file}")
    prompt = CHAT.replace("⟦", "").replace("⟧\n", "")
    assert out == (
        f"example 1, {file}:1: 41 tokens, 11 trained (26.8%)\n"
        f"prompt:\n{prompt}<|user|>Hi<|end_of_turn|><|assistant|>\n"
        "answer 1, score 1:\n⟦Hello!<|end_of_turn|>⟧\n"
        "answer 2, score 0:\n⟦Go.<|end_of_turn|>⟧\n\n"
        "together: 41 tokens, 11 trained (26.8%)\n"
    )


def test_the_template_may_be_a_file(chats, tmp_path, tool):
    source = "{% for m in messages %}{{ m.content }}<|eos|>{% endfor %}"
    (tmp_path / "my.jinja").write_text(source)
    _, out, _ = tool(f"--data={chats}", "--rows=1", f"--template={tmp_path / 'my.jinja'}")
    assert "\nGröße?<|eos|>⟦Groß.\nSehr.<|eos|>⟧\n" in out


def test_the_format_may_be_given(chats, tool):
    assert tool(f"--data={chats}", "--format=messages")[0] == 0


def test_the_tokenizer_may_be_a_runs(chats, tmp_path, tool):
    train_bpe(["Größe? Groß. Sehr."] * 9, 400).save(tmp_path / "run" / "tokenizer")
    status, out, _ = tool(f"--data={chats}", "--rows=1", f"--tokenizer={tmp_path / 'run'}")
    assert status == 0 and f"\n{CHAT}\n" in out
    assert int(out.split(": ")[1].split()[0]) < 25


@pytest.mark.parametrize("step", ["", "@7"])
def test_the_template_of_a_run_is_taken_with_its_tokenizer(chats, tmp_path, tool, save_run, step):
    run = save_run(tmp_path / "run", [7], template={"name": "plain"})
    status, out, _ = tool(f"--data={chats}", "--rows=1", f"--workdir={run}{step}")
    assert status == 0 and "<|assistant|>" not in out
    _, out, _ = tool(f"--data={chats}", "--rows=1", f"--workdir={run}{step}", "--template=chatml")
    assert "<|assistant|>" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data is required"),
        (["--data=FILE", "--rows=0"], "--rows=0 must be"),
        (["--data=FILE", "--workdir=a", "--tokenizer=b"], "give one of them"),
        (["--data=FILE", "--workdir=no/run"], "no/run is no run directory"),
        (["--data=FILE", "--template=chatlm"], "Did you mean 'chatml'"),
        (["--data=FILE", "--format=mesages"], "Did you mean 'messages'"),
        (["--data=no.jsonl"], "does not exist"),
        (["--dta=FILE"], "Did you mean: data"),
    ],
)
def test_bad_input_gets_one_line(chats, tool, arguments, message):
    status, out, err = tool(*(a.replace("FILE", str(chats)) for a in arguments))
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_debug_shows_the_traceback(tool):
    with pytest.raises(UserError, match="--data is required"):
        tool("--debug")


def test_the_command_line_ends_with_the_status(chats):
    command = [sys.executable, "-m", "tools.show", "template", f"--data={chats}", "--rows=0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --rows=0 must be at least 1.\n"


def test_nothing_waits_for_jax(chats):
    code = f"""
import runpy, sys
sys.argv = ["show", "template", "--data={chats}"]
try:
    runpy.run_module("tools.show", run_name="__main__")
finally:
    assert "jax" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

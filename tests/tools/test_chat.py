import io
import json
import subprocess
import sys

import jax
import pytest

from llm_jax.data.examples import Message, check_messages
from llm_jax.data.templates import TEMPLATES
from llm_jax.data.tokenizer_base import ByteTokenizer
from llm_jax.generation.generate import generate_texts
from llm_jax.generation.sampler import SamplerConfig
from tools.chat import Chat, Partner, define_flags, main
from tools.cli import run_tool
from tools.sampling import load_speaker

TEMPLATE = TEMPLATES["chatml"]
TOKENIZER = ByteTokenizer()
GREEDY = SamplerConfig(temperature=0)


@pytest.fixture(scope="module")
def workdir(save_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "chat"
    return save_run(folder, (5,), stage="sft", template=TEMPLATE.describe())


@pytest.fixture
def tool(capsys, monkeypatch):
    """Runs the tool on typed lines; returns exit status, stdout, stderr."""

    def call(typed, *arguments):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        status = run_tool(main, define_flags(), "", ["chat", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


class Echo:
    """A partner that answers with what it was asked, and remembers what it was shown."""

    def __init__(self):
        self.shown = []

    def answer(self, messages, number):
        self.shown.append([message.content for message in messages])
        text = messages[-1].content
        yield f"{number}:"
        if text == "interrupt":
            raise KeyboardInterrupt
        yield text


class Silent:
    def answer(self, messages, number):
        yield " "


def talk(*lines, partner=None, system=""):
    chat = Chat(partner or Echo(), system)
    chat.talk(iter(lines))
    return chat


def said(chat):
    return [f"{message.role[0]} {message.content}" for message in chat.messages]


def test_a_partner_sees_the_whole_conversation(capsys):
    chat = talk("a", "", "b", partner=(echo := Echo()), system="be kind")
    assert echo.shown == [["be kind", "a"], ["be kind", "a", "1:a", "b"]]
    assert said(chat) == ["s be kind", "u a", "a 1:a", "u b", "a 2:b"]
    assert capsys.readouterr().out == "1:a\n2:b\n"


def test_new_forgets_all_but_the_system_turn():
    assert said(talk("a", "/new", "b", system="be kind")) == ["s be kind", "u b", "a 2:b"]


def test_undo_takes_one_exchange_back(capsys):
    assert said(talk("a", "b", "/undo", "c")) == ["u a", "a 1:a", "u c", "a 3:c"]
    assert said(talk("a", "/undo", "/undo", system="be kind")) == ["s be kind"]
    assert capsys.readouterr().err == "nothing has been said yet.\n"


def test_quit_ends_and_help_lists_what_there_is(capsys):
    assert said(talk("/help", "/quit", "a")) == []
    out, err = capsys.readouterr()
    assert out == "" and all(command in err for command in ("/new", "/undo", "/save FILE", "/quit"))


def test_a_mistyped_command_is_no_message(capsys):
    assert said(talk("/nwe")) == []
    assert capsys.readouterr().err == "/nwe is no command. Did you mean '/new'?\n"


def test_save_adds_a_line_that_a_trainer_reads(tmp_path, capsys):
    file = tmp_path / "my chat.jsonl"
    talk("/save", f"/save {file}", "ä", f"/save {file}", "/new", "b", f"/save {file}",
         f"/save {tmp_path}", system="be kind")  # fmt: skip
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert lines == [
        {
            "messages": [
                {"role": "system", "content": "be kind"},
                {"role": "user", "content": text},
                {"role": "assistant", "content": f"{number}:{text}"},
            ]
        }
        for number, text in [(1, "ä"), (2, "b")]
    ]
    for line in lines:
        check_messages(tuple(Message(**message) for message in line["messages"]))
    notes = capsys.readouterr().err.splitlines()
    assert notes[0].startswith("/save needs a file")
    assert notes[1] == "nothing has been said yet."
    assert notes[2] == f"{tmp_path} cannot be written: Is a directory."


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(capsys):
    assert said(talk("interrupt", "b")) == ["u interrupt", "a 1:", "u b", "a 2:b"]
    out, err = capsys.readouterr()
    assert (out, err) == ("1:\n2:b\n", "(stopped)\n")


def test_a_message_without_an_answer_is_forgotten(capsys):
    assert said(talk("a", partner=Silent(), system="be kind")) == ["s be kind"]
    assert "there is no answer" in capsys.readouterr().err


@pytest.fixture
def partner(workdir):
    values = define_flags()
    values(["chat", f"--workdir={workdir}"])
    return Partner(load_speaker(values), TEMPLATE, GREEDY, max_new_tokens=10, seed=0)


def spoken(*contents, system=None):
    roles = ("user", "assistant") * len(contents)
    messages = [Message(*pair) for pair in zip(roles, contents, strict=False)]
    return [Message("system", system), *messages] if system else messages


def test_the_oldest_turns_go_where_not_all_fit(partner, capsys):
    """Every turn costs its bytes and two tokens; bos and the answer's header one each."""

    def prompt_of(*messages):
        return TEMPLATE.render_prompt(messages, (), TOKENIZER)

    system, *rest = spoken("a" * 8, "b" * 8, "c" * 8, "d" * 8, "e" * 11, system="s")
    fits = [system, *rest[:2], Message("user", "x" * 27)]
    assert len(prompt_of(*fits)) == 54 == 64 - 10
    assert partner._prompt(fits) == (prompt_of(*fits), 0)

    longer = [*fits[:-1], Message("user", "x" * 28)]
    assert partner._prompt(longer) == (prompt_of(system, longer[-1]), 2)

    assert len(prompt_of(system, *rest)) > 54
    assert partner._prompt([system, *rest]) == (prompt_of(system, *rest[2:]), 2)
    assert partner._prompt(rest) == (prompt_of(*rest[2:]), 2)

    "".join(partner.answer(longer, 1))
    assert capsys.readouterr().err.startswith("(the oldest 2 turns no longer fit")


def test_a_message_that_is_too_long_alone_is_refused_and_forgotten(partner, capsys):
    chat = talk("x" * 60, "a", partner=partner)
    assert [message.content for message in chat.messages[:-1]] == ["a"]
    out, err = capsys.readouterr()
    assert "error: the message takes 64 tokens and the model has room for 54 beside an" in err
    assert out == f"{chat.messages[-1].content}\n"


def test_lines_from_a_pipe_are_answered_in_turn(workdir, tool, tiny_model, random_params):
    status, out, err = tool(
        "hi\nho\n", f"--workdir={workdir}", "--system=s", "--max_new_tokens=9", "--seed=3",
        "--temperature=0.7", "--top_k=50", "--top_p=0.95", "--min_p=0.01",
        "--repetition_penalty=1.2",
    )  # fmt: skip
    sampler = SamplerConfig(0.7, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.2)
    messages, expected = [Message("system", "s")], ""
    for number, text in enumerate(("hi", "ho"), start=1):
        messages.append(Message("user", text))
        # `stream` draws as row 0 of a batch.
        rng = jax.random.fold_in(jax.random.key(3), number)
        (answer,) = generate_texts(
            tiny_model, random_params(5), TOKENIZER,
            [TEMPLATE.render_prompt(messages, (), TOKENIZER)], max_new_tokens=9, sampler=sampler,
            rng=rng, stop_ids=TEMPLATE.stop_ids(TOKENIZER),
        )  # fmt: skip
        messages.append(Message("assistant", answer))
        expected += f"{answer}\n"
    assert (status, out) == (0, expected)
    assert err == f"{workdir}@5; /help lists the commands\n"


def test_answers_are_half_of_the_model_at_most_by_default(workdir, tool):
    status, out, err = tool("hi\n", f"--workdir={workdir}", "--temperature=0")
    assert status == 0 and len(out) > 1 and "error" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--workdir is required"),
        (["--workdir=no/such/run"], "no/such/run is no run directory"),
        (["--workdir=RUN", "--max_new_tokens=0"], "--max_new_tokens=0 must lie between 1 and 63"),
        (["--workdir=RUN", "--max_new_tokens=64"], "--max_new_tokens=64 must lie between 1 and 63"),
        (["--workdir=RUN", "--system=\udcff"], "--system is not UTF-8"),
        (["--workdir=RUN", "--min_p=-1"], "min_p=-1.0"),
    ],
)
def test_bad_input_gets_one_line(workdir, tool, arguments, message):
    status, out, err = tool("hi\n", *(a.replace("RUN", str(workdir)) for a in arguments))
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_a_pretrained_run_cannot_chat(save_run, tmp_path, tool):
    status, out, err = tool("hi\n", f"--workdir={save_run(tmp_path / 'base', (1,))}")
    assert (status, out) == (2, "")
    assert err == (
        f"error: {tmp_path / 'base'} is a pre-trained run, without a chat template: fine-tune it "
        "with configs/sft.py, or continue a text with tools.generate.\n"
    )


def test_a_pretrained_run_with_an_expert_chats_by_the_experts_template(
    save_run, workdir, tmp_path, tool, tiny_model, random_params
):
    base = save_run(tmp_path / "base", (1,))
    status, out, err = tool(
        "hi\n", f"--workdir={base}", f"--expert={workdir}", f"--anti_expert={base}",
        "--max_new_tokens=9", "--temperature=0",
    )  # fmt: skip
    (answer,) = generate_texts(
        tiny_model, random_params(5), TOKENIZER,
        [TEMPLATE.render_prompt(spoken("hi"), (), TOKENIZER)], max_new_tokens=9, sampler=GREEDY,
        rng=jax.random.key(0), stop_ids=TEMPLATE.stop_ids(TOKENIZER),
    )  # fmt: skip
    assert (status, out) == (0, f"{answer}\n")
    assert err == f"{base}@1 +1 * {workdir}@5 -1 * {base}@1; /help lists the commands\n"


def test_help_does_not_wait_for_jax():
    code = """
import runpy, sys
sys.argv = ["chat", "--help"]
try:
    runpy.run_module("tools.chat", run_name="__main__")
finally:
    assert "jax" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "python -m tools.chat --workdir=RUN" in done.stdout


def test_a_process_reads_a_pipe_with_stray_bytes(workdir):
    command = [sys.executable, "-m", "tools.chat", f"--workdir={workdir}", "--temperature=0"]
    done = subprocess.run(command, input=b"hi \xff\n/quit\nnever\n", capture_output=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout.endswith(b"\n") and len(done.stdout) > 1

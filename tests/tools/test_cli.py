"""What all tools' command lines share: flags, other arguments, and one line for bad input."""

import pytest
from absl import flags

from tools.cli import run_tool


@pytest.fixture
def values():
    values = flags.FlagValues()
    flags.DEFINE_string("output", "none", "", flag_values=values)
    return values


@pytest.mark.parametrize(
    "arguments", [["a", "b", "--output=F"], ["--output=F", "a", "b"], ["a", "--output", "F", "b"]]
)
def test_flags_may_stand_before_and_after_the_other_arguments(values, arguments):
    seen = []
    tool = lambda values, arguments: seen.append((values.output, arguments))  # noqa: E731
    assert run_tool(tool, values, "", ["tool", *arguments], takes_arguments=True) == 0
    assert seen == [("F", ["a", "b"])]


def test_a_tool_without_other_arguments_refuses_them(values, capsys):
    assert run_tool(lambda values: pytest.fail("it ran"), values, "", ["tool", "a"]) == 2
    assert capsys.readouterr().err == (
        "error: unexpected argument 'a': flags look like --name=value.\n"
    )


def test_an_unknown_flag_is_one_line(values, capsys):
    tool = lambda values, arguments: pytest.fail("it ran")  # noqa: E731
    assert run_tool(tool, values, "", ["tool", "a", "--outptu=F"], takes_arguments=True) == 2
    assert capsys.readouterr().err.count("\n") == 1

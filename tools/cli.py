"""What every tool's command line has in common: --help, --debug, one line for bad input, and none
for a reader of the output that has gone."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from absl import flags

from llm_jax.errors import UserError, did_you_mean


def run_tool(
    main: Callable[..., int | None],
    values: flags.FlagValues,
    usage: str,
    argv: Sequence[str] | None = None,
    takes_arguments: bool = False,
) -> int:
    """Parses the command line into `values`, calls `main(values)` and returns the exit status.

    A tool imports jax inside `main`, so that --help and a mistyped flag need not wait for it.

    Args:
      main: raises UserError for bad input; its exit status, None = 0.
      values: the tool's flags, not parsed yet; --debug is added here.
      usage: the tool's docstring, printed by --help above the flags.
      argv: the program's name and its arguments; None = those of the process.
      takes_arguments: whether `main` takes, after `values`, a list of the arguments that are no
        flags, such as names of runs.

    Returns:
      That of `main`, or 2 for bad input, which is told in one line on stderr; --debug raises it
      instead.
    """
    argv = list(sys.argv if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character that the terminal's encoding lacks must not lose the rest of the output.
        sys.stdout.reconfigure(errors="replace")
    flags.DEFINE_boolean("debug", False, "show the traceback of an error", flag_values=values)
    given = {argument.lstrip("-") for argument in argv[1:] if argument.startswith("-")}
    if given & {"help", "h"}:
        print(f"{usage}\n{_describe(values)}")
        return 0
    try:
        arguments = _parse(values, argv, takes_arguments)
        with _quiet_pipe():
            return main(values, *([arguments] if takes_arguments else [])) or 0
        return 0  # nobody reads on
    except UserError as error:
        if given & {"debug", "debug=true"}:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments that are no overrides of a config (--config.a.b=1), and those that are."""
    overrides = [a for a in arguments if a.lstrip("-").startswith(("config.", "config["))]
    return [a for a in arguments if a not in overrides], overrides


def require(values: flags.FlagValues, *names: str) -> None:
    """
    Raises:
      UserError: one of the flags is not given.
    """
    for name in names:
        if values[name].value in (None, "", []):
            raise UserError(f"--{name} is required.")


def check_output(output: Path) -> None:
    """
    Raises:
      UserError: it is a folder, or in none that there is.
    """
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"--output={output} is no file in a folder that there is: name one.")


def to_stderr(line: str) -> None:
    """Tells the person at the terminal, past what a tool prints as its result."""
    print(line, file=sys.stderr, flush=True)


def run_command(
    commands: Mapping[str, str],
    usage: str,
    argv: Sequence[str] | None = None,
    takes_overrides: bool = False,
) -> int:
    """Runs the subcommand that the first argument names, as `run_tool` does.

    Args:
      commands: name → module with `define_flags` and `main`.
      usage: the docstring of the tool, printed by --help.
      argv: see `run_tool`.
      takes_overrides: whether `main` takes arguments such as --config.a.b=1, as `overrides`.

    Returns:
      The exit status.
    """
    arguments = list(sys.argv if argv is None else argv)[1:]
    if not arguments or arguments[0].lstrip("-") in ("help", "h"):
        print(usage)
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in commands:
        print(f"error: no command {name!r}.{did_you_mean(name, commands)}", file=sys.stderr)
        return 2
    command = importlib.import_module(commands[name])
    main = command.main
    if takes_overrides:
        rest, overrides = split_overrides(rest)
        main = functools.partial(main, overrides=overrides)
    return run_tool(main, command.define_flags(), command.__doc__ or "", [name, *rest])


def _describe(values: flags.FlagValues) -> str:
    lines = []
    for name in sorted(values):
        flag = values[name]
        default = "" if flag.default in (None, "") else f" (default: {flag.default})"
        lines.append(f"  --{name}: {flag.help}{default}")
    return "\n".join(lines)


def _parse(values: flags.FlagValues, argv: Sequence[str], takes_arguments: bool) -> list[str]:
    """Fills the flags; what is left over."""
    values.set_gnu_getopt(takes_arguments)  # flags may follow other arguments
    try:
        rest = values(list(argv))[1:]
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from error
    if rest and not takes_arguments:
        raise UserError(f"unexpected argument {rest[0]!r}: flags look like --name=value.")
    return rest


@contextlib.contextmanager
def _quiet_pipe() -> Iterator[None]:
    """Ends the block without a word when the reader of stdout has gone, as `| head` does."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes stdout once more when it ends: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""Trains what a config describes.

    python -m llm_jax.main --config=configs/STAGE.py[:ARG] [--workdir=RUN] [--config.a.b=v ...]

Any field of the config can be overridden by its path. A finished run is left alone, an interrupted
one resumes. Exit status: 0 finished, 2 bad input (one line says what and how to mend it), 130 or
143 stopped by Ctrl-C or SIGTERM with a checkpoint written.

Several processes, one a host, start with the same command and one run directory that all of them
see. TPU pods, Slurm and mpirun are recognised; elsewhere each process also gets
--coordinator=HOST:PORT --processes=N --process=I, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
JAX_PROCESS_ID.
"""

from __future__ import annotations

import difflib
import sys
import traceback
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from llm_jax import config as config_module
from llm_jax import distributed
from llm_jax.distributed import Place
from llm_jax.errors import UserError


def parse(argv: Sequence[str]) -> tuple[Any, str]:
    """The config with its overrides, and the run directory.

    Raises:
      UserError: a flag, config file, key or value that does not exist or does not fit.
    """
    name = _config_argument(argv)
    check_file(name)
    overrides = [a for a in argv[1:] if a.lstrip("-").startswith(("config.", "config["))]
    base = _read_flags([argv[0], f"--config={name}"])["config"].value
    _check_keys(overrides, config_module.flatten(config_module.resolved(base)))
    values = _read_flags(argv)
    return values["config"].value, values["workdir"].value or default_workdir(name)


def parse_place(argv: Sequence[str]) -> Place:
    """What the flags say of other processes.

    Raises:
      UserError: see `parse`.
    """
    values = _read_flags(argv)
    given: dict[str, Any] = {field.name: values[field.name].value for field in fields(Place)}
    return Place(**given)


def default_workdir(config_argument: str) -> str:
    """runs/pretrain for configs/pretrain.py, runs/pretrain-size=tiny with that argument."""
    path, _, argument = config_argument.partition(":")
    return str(Path("runs") / "-".join(filter(None, [Path(path).stem, argument.replace("/", "_")])))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    argv = sys.argv if argv is None else argv
    flags_given = {argument.lstrip("-") for argument in argv[1:]}
    if flags_given & {"help", "h"}:
        print(f"{__doc__}\n{_define_flags(argv).module_help(__name__)}")
        return 0
    try:
        config, workdir = parse(argv)
        distributed.start(parse_place(argv), config, workdir)
        from llm_jax import run  # imports jax, which --help and a mistyped flag need not wait for

        return run.run(config, workdir)
    except UserError as error:
        if flags_given & {"debug", "debug=true"}:
            raise
        print(f"error: {error}", file=sys.stderr)
        return distributed.leave(2)
    except KeyboardInterrupt:  # before the loop listens for it, or the second one
        print("stopped: the same command starts again from the last checkpoint.", file=sys.stderr)
        return distributed.leave(130)
    except Exception:
        if not distributed.is_joined():
            raise
        traceback.print_exc()
        return distributed.leave(1)


def _define_flags(argv: Sequence[str]) -> flags.FlagValues:
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        None,
        "config file with an optional argument, such as configs/pretrain.py:size=tiny",
        flag_values=values,
        sys_argv=list(argv),
    )
    flags.DEFINE_string("workdir", None, "run directory; runs/CONFIG if absent", flag_values=values)
    flags.DEFINE_boolean("debug", False, "show the traceback of an error", flag_values=values)
    _define_place_flags(values)
    return values


def _define_place_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of the first of several processes", flag_values=values
    )
    flags.DEFINE_integer("processes", None, "how many there are", flag_values=values)
    flags.DEFINE_integer("process", None, "which of them this is, from 0", flag_values=values)
    flags.DEFINE_integer(
        "peer_timeout",
        Place.peer_timeout,
        "seconds to wait at the start for the others",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "heartbeat_timeout",
        Place.heartbeat_timeout,
        "seconds of silence after which one is taken for dead and the others end",
        flag_values=values,
    )


def _read_flags(argv: Sequence[str]) -> flags.FlagValues:
    name = _config_argument(argv)
    values = _define_flags(argv)
    try:
        rest = values(list(argv))
    except AttributeError as error:
        if error.name != "get_config":
            raise
        raise UserError(
            f"{name} has no get_config: name a config, or, for a sweep file, run tools.sweep."
        ) from error
    except (flags.Error, TypeError, ValueError) as error:
        lines = str(error).strip().splitlines()
        # An error in a config file comes with its whole traceback in the text.
        raise UserError(lines[0] if len(lines) == 1 else f"{name}: {lines[-1]}") from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: overrides look like --config.a.b=v.")
    return values


def _config_argument(argv: Sequence[str]) -> str:
    for index, argument in enumerate(argv[1:], start=1):
        flag, equals, value = argument.partition("=")
        if flag.lstrip("-") == "config":
            return value if equals else (argv[index + 1] if index + 1 < len(argv) else "")
    raise UserError("--config is required, for example --config=configs/pretrain.py.")


def check_file(config_argument: str) -> None:
    path = Path(config_argument.partition(":")[0])
    if path.is_file():
        return
    known = [str(p) for p in sorted(Path("configs").rglob("*.py")) if p.name != "__init__.py"]
    close = difflib.get_close_matches(str(path), known, n=1, cutoff=0.6)
    hint = f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known)}."
    raise UserError(f"config file {str(path)!r} does not exist.{hint if known else ''}")


def _check_keys(overrides: Sequence[str], leaves: dict[str, Any]) -> None:
    """Refuses an override of a key that the config does not have, and suggests the closest."""
    for override in overrides:
        path = override.lstrip("-").partition("=")[0].removeprefix("config.")
        inner = any(leaf.startswith((f"{path}.", f"{path}[")) for leaf in leaves)
        if path in leaves or inner:
            continue
        last = path.rpartition(".")[2]
        close = difflib.get_close_matches(path, leaves, n=1, cutoff=0.75) or [
            leaf for leaf in leaves if leaf.rpartition(".")[2] == last
        ]
        parent = path.rpartition(".")[0]
        inside = f"{parent}." if parent else ""
        siblings = [leaf.removeprefix(inside) for leaf in leaves if leaf.startswith(inside)]
        names = siblings or list(leaves)
        known = sorted({name.partition(".")[0].partition("[")[0] for name in names})
        hint = f"Did you mean config.{close[0]}?" if close else f"Known: {', '.join(known)}."
        raise UserError(f"the config has no key {path!r}. {hint}")


if __name__ == "__main__":
    sys.exit(main())

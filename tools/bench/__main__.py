"""Measures how fast training is on this machine, and what importing takes.

    python -m tools.bench train   the bare train step: tokens/s, MFU, compile seconds, peak memory,
                                  of one setting, two in turn, or against transformers on torch
    python -m tools.bench loop    what the training loop adds to the bare step, in percent
    python -m tools.bench trace   the gaps between consecutive steps, from a profiler trace
    python -m tools.bench import_memory   the host memory of importing a published checkpoint

Every command explains its flags: python -m tools.bench train --help.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Sequence

from llm_jax.errors import did_you_mean
from tools.cli import run_tool

COMMANDS = {
    "train": "train",
    "loop": "loop",
    "trace": "step_gaps",
    "import_memory": "import_memory",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns its exit status."""
    arguments = list(sys.argv if argv is None else argv)[1:]
    if not arguments or arguments[0].lstrip("-") in ("help", "h"):
        print(__doc__)
        return 0 if arguments else 2
    name = arguments[0]
    if name not in COMMANDS:
        print(f"error: no command {name!r}.{did_you_mean(name, COMMANDS)}", file=sys.stderr)
        return 2
    command = importlib.import_module(f"tools.bench.{COMMANDS[name]}")
    overrides = [a for a in arguments[1:] if a.lstrip("-").startswith(("config.", "config["))]
    rest = [a for a in arguments[1:] if a not in overrides]
    return run_tool(
        functools.partial(command.main, overrides=overrides),
        command.define_flags(),
        command.__doc__ or "",
        [f"tools.bench {name}", *rest],
    )


if __name__ == "__main__":
    sys.exit(main())

"""Measures how fast training is on this machine, and what importing takes.

    python -m tools.bench train   the bare train step: tokens/s, MFU, compile seconds, peak memory,
                                  of one setting, two in turn, or against transformers on torch
    python -m tools.bench loop    what the training loop adds to the bare step, in percent
    python -m tools.bench trace   the gaps between consecutive steps, from a profiler trace
    python -m tools.bench memory  a train step's memory: on paper, compiled and run
    python -m tools.bench import_memory   the host memory of importing a published checkpoint

Every command explains its flags: python -m tools.bench train --help.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tools.cli import run_command

COMMANDS = {
    "train": "tools.bench.train",
    "loop": "tools.bench.loop",
    "trace": "tools.bench.step_gaps",
    "memory": "tools.bench.memory",
    "import_memory": "tools.bench.import_memory",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns its exit status."""
    return run_command(COMMANDS, __doc__ or "", argv, takes_overrides=True)


if __name__ == "__main__":
    sys.exit(main())

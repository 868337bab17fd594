"""What a config takes, told before it runs.

    python -m tools.estimate --config=... --topology=v5e:4x4    by the TPU's own compiler
    python -m tools.estimate paper --config=... --chips=v5e-16  by formulas: memory, time, money
    python -m tools.estimate plan --config=... --chips=v5e-16   a mesh, and why

The formulas and the planner are for pre-training; the compiler takes SFT, reward modelling, DPO,
PPO and GRPO, too. Every command explains its flags: python -m tools.estimate paper --help; that of
the first line is `compile`, which may be left out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tools.cli import run_command

COMMANDS = {
    "compile": "tools.estimate.compiling",
    "paper": "tools.estimate.paper",
    "plan": "tools.estimate.planning",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns its exit status."""
    argv = list(sys.argv if argv is None else argv)
    if argv[1:2] and argv[1].startswith("-") and argv[1].lstrip("-") not in ("help", "h"):
        argv.insert(1, "compile")
    return run_command(COMMANDS, __doc__ or "", argv, takes_overrides=True)


if __name__ == "__main__":
    sys.exit(main())

"""Looks at what a model is given, and at what it makes of it.

    python -m tools.show template --data=FILE           examples as a chat template writes them
    python -m tools.show batch --config=CONFIG          rows of the batch that a run trains on
    python -m tools.show loss --workdir=RUN --text=FILE --output=F.html     surprise, token by token
    python -m tools.show attention --workdir=RUN --text=FILE     entropy of attention, by layer

Every command explains its flags: python -m tools.show batch --help.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tools.cli import run_command

COMMANDS = {
    "template": "tools.show.template",
    "batch": "tools.show.batch",
    "loss": "tools.show.loss",
    "attention": "tools.show.attention",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns its exit status."""
    argv = list(sys.argv if argv is None else argv)
    return run_command(COMMANDS, __doc__ or "", argv, takes_overrides=argv[1:2] == ["batch"])


if __name__ == "__main__":
    sys.exit(main())

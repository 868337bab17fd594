"""Hugging Face folders into runs and back.

    python -m tools.convert import --hf=DIR --workdir=RUN    a run out of a published model
    python -m tools.convert export --workdir=RUN --hf=DIR    what transformers loads and vLLM serves
    python -m tools.convert plan --preset=llama3.1-70b --mesh=fsdp=64    what a chip would hold

Every command explains its flags: python -m tools.convert import --help.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tools.cli import run_command

COMMANDS = {
    "import": "tools.convert.importing",
    "export": "tools.convert.exporting",
    "plan": "tools.convert.planning",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns its exit status."""
    return run_command(COMMANDS, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(main())

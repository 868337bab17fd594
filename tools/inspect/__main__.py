"""Tells what a run is: its record, its lineage, its checkpoints, and the tree of its parameters.

    python -m tools.inspect RUN[@STEP] [--depth=2] [--mesh=fsdp=8,tensor=2] [--verify]
    python -m tools.inspect DIR        a Hugging Face folder

Every parameter comes with its shape, the logical names of its dimensions and the mesh axes that
these are split over, and with norms: L2, root mean square, largest absolute value, values that are
not finite. Groups sum up what is in them. With --mesh the part that a chip of such a mesh holds
stands beside; the chips need not be there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import flags

from llm_jax.errors import UserError
from tools.cli import run_tool


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string(
        "workdir", None, "what the argument names: a run, RUN@STEP, or a Hugging Face folder",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "depth", None, "levels of the tree to show; absent = all", flag_values=values
    )
    flags.DEFINE_string(
        "mesh", "", "chips along each axis, such as fsdp=64,tensor=4; absent = one chip",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_boolean(
        "verify", False, "read every array of every checkpoint", flag_values=values
    )
    return values


def main(values: flags.FlagValues) -> None:
    if not values.workdir:
        raise UserError("name a run: python -m tools.inspect RUN.")
    if values.depth is not None and values.depth < 1:
        raise UserError(f"--depth={values.depth} must be at least 1.")
    from llm_jax.interop.folder import is_published
    from llm_jax.mesh import parse_mesh
    from llm_jax.stored import find
    from tools.inspect import parameters, record

    mesh = parse_mesh(values.mesh, "--mesh")
    if not is_published(values.workdir):
        # Before the checkpoint itself is read, which may be damaged.
        print("\n".join(record.describe_checkpoints(values.workdir, values.verify)), flush=True)
    stored = find(values.workdir)
    print("\n".join(record.describe(stored)), flush=True)
    print("\n" + "\n".join(parameters.describe(stored, mesh, values.depth)))


def run(argv: Sequence[str] | None = None) -> int:
    """Runs the command line, whose first argument may be the run, and returns the exit status."""
    argv = list(sys.argv if argv is None else argv)
    if argv[1:2] and not argv[1].startswith("-"):
        argv[1] = f"--workdir={argv[1]}"
    return run_tool(main, define_flags(), __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(run())

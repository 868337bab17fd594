"""Folds the LoRA adapters of a run into its weights: a run without adapters, to start from.

python -m tools.merge --workdir=RUN[@STEP] --output=MERGED
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags

from llm_jax.errors import UserError, disk_errors
from llm_jax.mesh import MeshConfig, make_mesh
from tools.cli import run_tool


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string(
        "workdir", None, "run directory; RUN@STEP for an older checkpoint", flag_values=values
    )
    flags.DEFINE_string("output", None, "folder of the merged run, new", flag_values=values)
    return values


def main(values: flags.FlagValues) -> None:
    if not values.workdir or not values.output:
        raise UserError("--workdir=RUN and --output=MERGED are both needed.")
    import jax

    from llm_jax import checkpoint
    from llm_jax.data.tokenizers import load_tokenizer
    from llm_jax.json_files import write_json
    from llm_jax.runs import check_new
    from llm_jax.stored import at

    output = Path(values.output)
    check_new(output, "--output")
    run, step = checkpoint.locate(values.workdir)
    meta = checkpoint.read_meta(run, step)
    if meta["model"].get("lora") is None:
        raise UserError(f"{run} has no adapters: there is nothing to merge.")
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        weights, _ = at(run, step).read_merged(mesh)
    meta = {key: value for key, value in meta.items() if key not in ("base", "critic")}
    meta["model"] = meta["model"] | {"lora": None}
    with disk_errors(output, "Name another folder."):
        load_tokenizer(run / "tokenizer").save(output / "tokenizer")
        checkpoint.write_weights(output, step, weights, meta)
        write_json(output / "config.json", {"merged": values.workdir})
    print(output)


if __name__ == "__main__":
    sys.exit(run_tool(main, define_flags(), __doc__ or ""))

"""Writes a run as a Hugging Face folder, which transformers loads and vLLM serves.

    python -m tools.convert export --workdir=RUN[@STEP] --hf=DIR [--dtype=bfloat16]
    python -m tools.convert export --workdir=RUN --hf=DIR --adapters    PEFT adapters alone

Adapters are folded into the weights unless they are asked for alone. A reward model becomes a
classifier of one label.
"""

from __future__ import annotations

from absl import flags

from llm_jax.errors import UserError
from llm_jax.mesh import MeshConfig, make_mesh

DTYPES = ("float32", "bfloat16", "float16")
GIB = 1024**3


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string(
        "workdir", None, "run directory; RUN@STEP for an older checkpoint", flag_values=values
    )
    flags.DEFINE_string("hf", None, "the folder to write, new", flag_values=values)
    flags.DEFINE_enum(
        "dtype", None, DTYPES, "of all tensors; absent = as they were published, or float32",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_float(
        "max_file_gib", 5.0, "largest file of weights, in GiB", lower_bound=0.0, flag_values=values
    )
    flags.DEFINE_boolean("adapters", False, "write PEFT adapters alone", flag_values=values)
    return values


def main(values: flags.FlagValues) -> None:
    if not values.workdir or not values.hf:
        raise UserError("--workdir=RUN and --hf=DIR are both needed.")
    from llm_jax.interop.adapters import export_adapters
    from llm_jax.interop.exporter import export_run
    from llm_jax.stored import find

    stored = find(values.workdir)
    mesh = make_mesh(MeshConfig())
    if values.adapters:
        export_adapters(stored, mesh, values.hf, values.dtype or "float32")
    else:
        limit = max(1, round(values.max_file_gib * GIB))
        export_run(stored, mesh, values.hf, values.dtype, limit)
    print(values.hf)

"""Shows what every chip of a mesh would hold of a model: shapes, partitions, bytes; no weights, no
devices.

    python -m tools.convert plan --preset=llama3.1-8b --mesh=fsdp=8
    python -m tools.convert plan --hf=DIR --mesh=fsdp=64,tensor=4
"""

from __future__ import annotations

import dataclasses
import typing

from absl import flags

from llm_jax.errors import UserError, did_you_mean

if typing.TYPE_CHECKING:
    from llm_jax.models import ModelConfig


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string("preset", None, "a model by name, such as gpt2", flag_values=values)
    flags.DEFINE_string("hf", None, "or a folder with a config.json", flag_values=values)
    flags.DEFINE_string(
        "mesh", "fsdp=1", "chips along each axis, such as fsdp=64,tensor=4", flag_values=values
    )
    flags.DEFINE_boolean(
        "scan_layers", True, "layers stacked, as large models train", flag_values=values
    )
    return values


def main(values: flags.FlagValues) -> None:
    from llm_jax.interop.plan import plan
    from llm_jax.mesh import parse_mesh

    print(plan(_model(values), parse_mesh(values.mesh, "--mesh")).table())


def _model(values: flags.FlagValues) -> ModelConfig:
    if (values.preset is None) == (values.hf is None):
        raise UserError("name a model by --preset=NAME or by --hf=DIR.")
    if values.hf is not None:
        from llm_jax.interop.folder import open_folder

        model = open_folder(values.hf).model
    else:
        model = _preset(values.preset)
    whole = model.num_layers % len(model.windows) == 0
    return dataclasses.replace(model, scan_layers=values.scan_layers and whole)


def _preset(name: str) -> ModelConfig:
    from llm_jax.models.presets import PRESETS

    if name not in PRESETS:
        raise UserError(f"--preset={name} is unknown.{did_you_mean(name, PRESETS)}")
    if PRESETS[name].vocab_size is None:
        raise UserError(f"--preset={name} has no vocabulary of its own: name another.")
    return PRESETS[name]

"""Makes a run out of a Hugging Face folder: config.json, safetensors, tokenizer, chat template.

    python -m tools.convert import --hf=DIR --workdir=RUN
    python -m tools.convert import --hf=ADAPTERS --base=RUN[@STEP] --workdir=NEW    PEFT adapters

The run is there to start stages from (--config.init_from=RUN), to generate, chat and score with.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags

from llm_jax.errors import UserError


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string("hf", None, "the Hugging Face folder", flag_values=values)
    flags.DEFINE_string("workdir", None, "the run to make, a new folder", flag_values=values)
    flags.DEFINE_string(
        "base", None, "run that PEFT adapters belong to; RUN@STEP for an older checkpoint",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_boolean(
        "scan_layers", False, "stack the layers: large models compile faster so",
        flag_values=values,
    )  # fmt: skip
    return values


def main(values: flags.FlagValues) -> None:
    if not values.hf or not values.workdir:
        raise UserError("--hf=DIR and --workdir=RUN are both needed.")
    from llm_jax.interop import peft
    from llm_jax.interop.importer import import_folder

    if (Path(values.hf) / peft.CONFIG_FILE).exists():
        from llm_jax.interop.adapters import import_adapters

        if not values.base:
            raise UserError(
                f"{values.hf} holds PEFT adapters: name the run of their model by --base=RUN."
            )
        import_adapters(values.hf, values.base, values.workdir)
    elif values.base:
        raise UserError(f"--base is for PEFT adapters, and {values.hf} holds none.")
    else:
        import_folder(values.hf, values.workdir, _note, values.scan_layers)
    print(values.workdir)


def _note(line: str) -> None:
    print(line, file=sys.stderr)

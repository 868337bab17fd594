"""What `tools.bench train` measures by default: 10M parameters on 16 × 256 tokens.

    python -m tools.bench train --config=tools/bench/default_config.py:size=125m,length=1024,batch=8

Sizes are the presets of llm_jax/models/presets.py; those without a vocabulary get `vocabulary`.
"""

import dataclasses

from llm_jax.config import defaults, parse_argument
from llm_jax.data.phases import PhaseConfig
from llm_jax.errors import UserError, did_you_mean
from llm_jax.models.presets import PRESETS
from llm_jax.optim import OptimizerConfig
from llm_jax.trainers.pretrain import PretrainConfig


def get_config(argument=None):
    values = parse_argument(argument, size="small", vocabulary="8192", batch="16", length="256")
    size = values.pop("size")
    if size not in PRESETS:
        raise UserError(f"size={size!r} is unknown.{did_you_mean(size, PRESETS)}")
    try:
        numbers = {name: int(value) for name, value in values.items()}
    except ValueError as error:
        raise UserError(f"config argument {argument!r}: {error}.") from error
    model = PRESETS[size]
    return defaults(
        PretrainConfig,
        model=dataclasses.replace(model, vocab_size=model.vocab_size or numbers["vocabulary"]),
        phases=(PhaseConfig(length=numbers["length"], batch=numbers["batch"], steps=1),),
        optimizer=OptimizerConfig(warmup_steps=0),
    )

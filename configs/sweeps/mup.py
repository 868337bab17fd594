"""Width × learning rate, with muP or without: does the best learning rate stay where it is?

python -m tools.sweep --config=configs/sweeps/mup.py --workdir=runs/mup
"""

from llm_jax.config import parse_argument
from llm_jax.sweep import Sweep, param, product, zip

WIDTHS = (32, 64, 128)
HEAD_DIM = 32


def get_sweep(argument=None):
    values = parse_argument(argument, mup="on")
    width = zip(
        param("model.embed_dim", WIDTHS),
        param("model.num_heads", [width // HEAD_DIM for width in WIDTHS]),
        param("model.mlp_dim", [width * 11 // 4 for width in WIDTHS]),
    )
    shared = {
        "tokenizer.path": "bytes",
        "phases[0].steps": 250,
        "phases[1].steps": 20,
        "sample.max_new_tokens": 0,
    }
    if values["mup"] == "on":
        shared["model.mup_base_width"] = WIDTHS[0]
    return Sweep(
        config="configs/pretrain.py:size=tiny",
        overrides=shared,
        space=product(
            width, param("optimizer.learning_rate", [4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2])
        ),
    )

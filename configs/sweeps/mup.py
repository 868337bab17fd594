"""Width × learning rate, with muP or without: does the best learning rate stay where it is?

    python -m tools.sweep --config=configs/sweeps/mup.py --workdir=runs/mup
    python -m tools.sweep --config=configs/sweeps/mup.py:mup=off --workdir=runs/no_mup

Fifteen points of 270 steps on bytes: 9 and 4.5 minutes on two cores with other work to do.
Validation loss, nats a byte, of one seed (starred: the best of a width):

    learning rate     0.004    0.008    0.016    0.032    0.064
    width 32, base    2.431    2.443    2.368*   2.464    2.583
    muP, 64           2.474    2.389*   2.429    2.459    2.468
    muP, 128          2.374    2.250*   2.251    2.278    2.490
    without, 64       2.347    2.420    2.297*   2.456    2.748
    without, 128      2.070*   2.138    2.418    2.580    2.675

With muP the best rate of the base is within 0.001 nats of the best for a model four times as wide;
without, the best has gone down by a factor of four or more. At its own best rate the ordinary model
is ahead of muP here.
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

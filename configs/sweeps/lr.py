"""Learning rate × depth of the tiny model: nine points of 240 steps.

    python -m tools.sweep --config=configs/sweeps/lr.py --workdir=runs/lr
    python -m tools.sweep --config=configs/sweeps/lr.py --workdir=runs/lr --config.seed=1 ...

PLACEHOLDER
"""

from llm_jax.sweep import Sweep, param, product


def get_sweep(argument=None):
    del argument
    return Sweep(
        config="configs/pretrain.py:size=tiny",
        overrides={"phases[0].steps": 200, "phases[1].steps": 40, "sample.max_new_tokens": 0},
        space=product(
            param("optimizer.learning_rate", [2e-3, 8e-3, 3.2e-2]),
            param("model.num_layers", [1, 2, 4]),
        ),
    )

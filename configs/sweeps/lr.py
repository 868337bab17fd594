"""Learning rate × depth of the tiny model: nine points of 240 steps.

    python -m tools.sweep --config=configs/sweeps/lr.py --workdir=runs/lr
    python -m tools.sweep --config=configs/sweeps/lr.py --workdir=runs/lr --emit=slurm

On two cores with other work to do the points trained for 3 min 41 s together, with starts between
them. Validation loss, nats a token:

    learning rate   1 layer   2 layers   4 layers
    0.002           5.266     5.295      5.409
    0.008           4.775     4.877      5.115
    0.032           4.787     5.465      5.158

So few steps favour the shallow model, and it is the one that stands the highest rate.
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

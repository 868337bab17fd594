"""Checks muP: whether activations change by as much in wide models as in narrow ones.

    python -m tools.coordinate_check --config=configs/pretrain.py:size=tiny --output=F.png
        [--widths=64,128,256,512 --steps=4 --config.optimizer.name=muon ...]

The config's model is made at several widths (more heads of the same size, a wider MLP) and trained
for a few steps on one batch of random tokens, without muP and with it; the narrowest is the base.
After each step every layer's outputs are compared with those before the first. With muP their mean
absolute change is the same at all widths; without it, at one learning rate, it grows with them, so
that wide models want a lower one (arXiv:2203.03466, appendix D.1). Printed are slopes of log change
over log width: 0 where the width does not matter. With muP those of logits are down to -0.5 after
few steps, as what their random start adds to the change shrinks with the width.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from llm_jax.errors import UserError
from tools.cli import run_tool, split_overrides
from tools.plot import new_figure, save_figure, tidy

if TYPE_CHECKING:
    from llm_jax.models import LanguageModel
    from llm_jax.models.config import ModelConfig
    from llm_jax.optim import OptimizerConfig

# By layer float [widths, steps]: the mean absolute change of its outputs since the start.
Changes = Mapping[str, np.ndarray]


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "a pre-training config", flag_values=values)
    flags.DEFINE_string("output", None, "picture: .png, .svg or .pdf", flag_values=values)
    flags.DEFINE_list("widths", ["64", "128", "256", "512"], "values of model.embed_dim",
                      flag_values=values)  # fmt: skip
    flags.DEFINE_integer("steps", 4, "steps of training", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("rows", 8, "rows of the batch", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("length", 64, "tokens of a row", lower_bound=2, flag_values=values)
    return values


def main(values: flags.FlagValues, overrides: Sequence[str] = ()) -> None:
    if not values.config:
        raise UserError("--config is required, for example --config=configs/pretrain.py:size=tiny.")
    widths = _read_widths(values.widths)
    from llm_jax.trainers.foundation import asked_model
    from tools.bench.jax_worker import read_config

    config = read_config(values.config, list(overrides))
    found = {}
    for name, base in (("without muP", None), ("with muP", widths[0])):
        model = dataclasses.replace(asked_model(config), mup_base_width=base)
        changes = measure(model, config.optimizer, widths, values.steps, values.rows, values.length)
        found[name] = changes
        print(f"{name}: slopes of log change over log width after step {values.steps}")
        for layer, slope in slopes(widths, changes).items():
            print(f"  {layer:<20} {slope:+.2f}")
    if values.output:
        plot(widths, found, values.output)
        print(values.output)


def measure(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    widths: Sequence[int],
    steps: int,
    rows: int,
    length: int,
) -> Changes:
    """Trains the model at each width and says by how much its layers' outputs change.

    The learning rate is the optimiser's peak throughout.

    Raises:
      UserError: a width at which the model has no whole number of heads.
    """
    from llm_jax.mup import widened

    models = [widened(model, width) for width in widths]
    each = [_changes(wide, optimizer, steps, rows, length) for wide in models]
    return {layer: np.array([changes[layer] for changes in each]) for layer in each[0]}


def slopes(widths: Sequence[int], changes: Changes) -> dict[str, float]:
    """By layer the slope of log change over log width after the last step."""
    return {
        layer: float(np.polyfit(np.log(widths), np.log(change[:, -1]), 1)[0])
        for layer, change in changes.items()
    }


def plot(widths: Sequence[int], found: Mapping[str, Changes], output: str) -> None:
    """Writes the picture `output`: a row for each setting, a column for each step, in it a line for
    each layer over the widths.

    Raises:
      UserError: matplotlib is not installed, or a format that is not known.
    """
    import matplotlib

    steps = next(iter(next(iter(found.values())).values())).shape[1]
    figure = new_figure(2.6 * steps + 1.6, 2.6 * len(found) + 0.6)
    panels = figure.subplots(len(found), steps, squeeze=False, sharex=True, sharey=True)
    for row, (name, changes) in zip(panels, found.items(), strict=True):
        colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(changes)))
        for step, panel in enumerate(row):
            for color, (layer, change) in zip(colors, changes.items(), strict=True):
                panel.plot(widths, change[:, step], marker=".", color=color, label=layer)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(widths, [str(width) for width in widths])
            panel.minorticks_off()
            panel.set_title(f"{name}, step {step + 1}", fontsize=9)
            tidy(panel)
        row[0].set_ylabel("mean |change|")
    for panel in panels[-1]:
        panel.set_xlabel("width")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    save_figure(figure, output)


def _read_widths(texts: Sequence[str]) -> list[int]:
    if not all(text.isdigit() for text in texts) or len(set(texts)) < 2:
        raise UserError(f"--widths={','.join(texts)} must be two different numbers or more.")
    return sorted(int(text) for text in texts)


def _changes(
    config: ModelConfig, settings: OptimizerConfig, steps: int, rows: int, length: int
) -> dict[str, list[float]]:
    """By layer the mean absolute change after each step, of one width."""
    import jax
    import jax.numpy as jnp
    import optax

    from llm_jax.models import LanguageModel
    from llm_jax.objectives import lm
    from llm_jax.optim import make_optimizer
    from llm_jax.sharding import unbox
    from llm_jax.types import Batch

    config = dataclasses.replace(config, scan_layers=False, remat="none")
    model = LanguageModel(config)
    tokens = np.random.default_rng(0).integers(model.vocab_size, size=(rows, length + 1))
    tokens = tokens.astype(np.int32)
    ones = np.ones((rows, length), np.int32)
    places = np.broadcast_to(np.arange(length, dtype=np.int32), ones.shape)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), ones, places)
    objective = lm.make_objective(model, lm.LossConfig())
    params = unbox(jax.jit(model.init)(jax.random.key(0)))
    optimizer = make_optimizer(settings, params, config.width_multiplier)

    def loss(params: Any) -> jax.Array:
        return objective(params, batch, None)[0].value()  # type: ignore[arg-type]

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(
            jax.grad(loss)(params), state, params, learning_rate=jnp.float32(settings.learning_rate)
        )
        return optax.apply_updates(params, updates), state

    outputs = jax.jit(functools.partial(layer_outputs, model, tokens=batch.tokens))
    before, state = outputs(params), jax.jit(optimizer.init)(params)
    found: dict[str, list[float]] = {layer: [] for layer in before}
    for _ in range(steps):
        params, state = step(params, state)
        for layer, after in outputs(params).items():
            found[layer].append(float(jnp.mean(jnp.abs(after - before[layer]))))
    return found


def layer_outputs(model: LanguageModel, params: Any, tokens: np.ndarray) -> OrderedDict[str, Any]:
    """What each layer adds to the residual stream, the stream after the final norm, and the logits,
    in the order of the model: float32 [batch, time, ...]."""
    import jax
    import jax.numpy as jnp
    from flax.traverse_util import flatten_dict

    from llm_jax.models.layers import MLP
    from llm_jax.models.moe import MixtureOfExperts
    from llm_jax.models.transformer import Attention, Transformer

    def is_layer(module: Any, _: str) -> bool:
        return isinstance(module, (Attention, MLP, MixtureOfExperts)) or module.name == "final_norm"

    (hidden, *_), kept = Transformer(model.config, model.backend).apply(
        {"params": params}, tokens, None, None, None,
        capture_intermediates=is_layer, mutable=["intermediates"],
    )  # fmt: skip
    # An OrderedDict keeps its order on the way out of a jitted function.
    found = OrderedDict(embedding=jnp.take(params["embedding"], tokens, axis=0))
    for path, (output,) in flatten_dict(kept["intermediates"]).items():
        found["/".join(path[:-1])] = output[0] if isinstance(output, tuple) else output
    found["logits"] = model.logits(params, hidden)
    found.move_to_end("final_norm")
    found.move_to_end("logits")
    return jax.tree.map(lambda output: output.astype(jnp.float32), found)


if __name__ == "__main__":
    arguments, overrides = split_overrides(sys.argv)
    sys.exit(
        run_tool(functools.partial(main, overrides=overrides), define_flags(), __doc__, arguments)
    )

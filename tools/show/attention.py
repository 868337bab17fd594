"""Tells how widely the layers and heads of a run attend, on a text: the entropy of their weights.

    python -m tools.show attention --workdir=RUN[@STEP] --text=FILE [--output=F.png]

The entropy of a query's weights, in nats, is 0 where one key has them all, and the log of the
number of keys that the query sees where they share evenly; it is told as such, and as a share of
that logarithm. Means are over all queries that see two keys or more. A text that is longer than the
rows that the run was trained on is cut into windows that overlap by half.

A head near 1 averages all it sees; one near 0 looks at a single place, often the first or the last.
The picture (pip install 'llm_jax[plot]') shows every head, and entropy along the row.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from llm_jax.console import align
from tools.cli import require

if TYPE_CHECKING:
    from llm_jax.runs import LoadedRun
    from tools.show.windows import WindowedText


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string(
        "workdir", None, "run directory; RUN@STEP for an older checkpoint", flag_values=values
    )
    flags.DEFINE_string("text", None, "text file, read as one document", flag_values=values)
    flags.DEFINE_string("output", None, "also draw it: .png, .svg or .pdf", flag_values=values)
    return values


def main(values: flags.FlagValues) -> None:
    require(values, "workdir", "text")
    import jax

    from llm_jax.compilation import use_compilation_cache
    from llm_jax.runs import load_run
    from tools.show.windows import read_windows

    use_compilation_cache()
    run = load_run(values.workdir)
    text = read_windows(run, values.text)
    with jax.set_mesh(run.mesh):
        entropies = measure(run, text)
    print(f"{run.stored.name} on {values.text}: {text.describe()}\n")
    print("\n".join(_table(entropies, run.model.config)))
    if values.output:
        draw(entropies, values.output)
        print(f"\n{values.output}")


@dataclasses.dataclass(frozen=True)
class Entropies:
    """Means over the queries that see two keys or more.

    nats: float64 [layers, heads]. share: float64 [layers, heads], of the log of the keys that the
    query sees. by_place: float64 [layers, time], nats, over heads and rows. keys: int [layers,
    time], that a query at a place sees.
    """

    nats: np.ndarray
    share: np.ndarray
    by_place: np.ndarray
    keys: np.ndarray


def measure(run: LoadedRun, text: WindowedText) -> Entropies:
    """The entropies of a run's attention on a text."""
    import jax

    from tools.show.windows import batches

    compute = jax.jit(run.model.attention_entropy)
    parts = []
    for windows, batch in batches(text):
        found_LBNT = jax.device_get(
            compute(run.params, batch.tokens, batch.positions, batch.segment_ids)
        )
        parts.append((found_LBNT[:, : len(windows)], batch.segment_ids[: len(windows)] > 0))
    entropy_LBNT = np.concatenate([found for found, _ in parts], axis=1).astype(np.float64)
    real_BT = np.concatenate([real for _, real in parts])
    return summarise(entropy_LBNT, real_BT, run.model.config)


def summarise(entropy_LBNT: np.ndarray, real_BT: np.ndarray, config: Any) -> Entropies:
    """Means of entropies of rows of one segment each, in a model of this `ModelConfig`."""
    layers, time = len(entropy_LBNT), real_BT.shape[1]
    everywhere = np.arange(1, time + 1)
    windows = [config.layer_window(layer) or time for layer in range(layers)]
    keys_LT = np.stack([np.minimum(everywhere, window) for window in windows])
    counted_LBT = real_BT & (keys_LT >= 2)[:, None]
    logs_LT = np.log(np.maximum(keys_LT, 2))

    def mean(values_LBNT: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
        weights = np.broadcast_to(counted_LBT[:, :, None], values_LBNT.shape)
        total = np.sum(values_LBNT * weights, axis=axes)
        count = np.sum(weights, axis=axes)
        return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)

    return Entropies(
        nats=mean(entropy_LBNT, (1, 3)),
        share=mean(entropy_LBNT / logs_LT[:, None, None], (1, 3)),
        by_place=mean(entropy_LBNT, (1, 2)),
        keys=keys_LT,
    )


def _table(entropies: Entropies, config: Any) -> list[str]:
    """A line a layer: its means, and the share of every head from the lowest to the highest."""
    rows = [["layer", "sees", "nats", "share of log keys", "heads, from the lowest share"]]
    for layer, (nats, share) in enumerate(zip(entropies.nats, entropies.share, strict=True)):
        window = config.layer_window(layer)
        order = np.argsort(share)
        chosen = order if len(order) <= 8 else [*order[:4], *order[-4:]]
        heads = [f"{head}: {share[head]:.2f}" for head in chosen]
        if len(order) > 8:
            heads.insert(4, "...")
        rows.append([
            str(layer), "all" if window is None else f"{window} keys", f"{nats.mean():.3f}",
            f"{share.mean():.3f}", "  ".join(heads),
        ])  # fmt: skip
    return align(rows, right=(0, 2, 3))


def draw(entropies: Entropies, output: str) -> None:
    """Writes a picture: every head's share, and each layer's entropy along the row.

    Raises:
      UserError: see `tools.plot.save_figure`.
    """
    from tools.plot import GREY, new_figure, save_figure, tidy

    layers, heads = entropies.share.shape
    figure = new_figure(10, max(3.6, min(9, 1.6 + 0.32 * layers)))
    left, right = figure.subplots(1, 2)
    image = left.imshow(entropies.share, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    figure.colorbar(image, ax=left, label="entropy as a share of log keys")
    left.set(xlabel="head", ylabel="layer")
    for axis in (left.xaxis, left.yaxis):
        axis.get_major_locator().set_params(integer=True)
    if layers * heads <= 128 and heads <= 12:
        for (layer, head), share in np.ndenumerate(entropies.share):
            color = "black" if share > 0.6 else "white"
            left.text(head, layer, f"{share:.2f}", color=color, ha="center", va="center", size=8)
    colors = _colors(layers)
    places = np.arange(entropies.keys.shape[1])
    for keys in np.unique(entropies.keys, axis=0):
        right.plot(places, np.log(keys), color=GREY, linestyle="--", linewidth=1)
    for layer, values in enumerate(entropies.by_place):
        label = f"layer {layer}" if layer in (0, layers - 1) or layers <= 8 else None
        right.plot(places, values, color=colors[layer], linewidth=1.2, label=label)
    right.set(xlabel="place in the row", ylabel="entropy in nats (dashed: log of the keys)")
    right.legend(frameon=False, fontsize=8)
    tidy(right)
    save_figure(figure, output)


def _colors(layers: int) -> Any:
    """From the first layer's to the last one's."""
    from matplotlib import colormaps

    return colormaps["plasma"](np.linspace(0, 0.85, layers))

"""The modules of a published model that make the parts of our products: what adapters are for.

Legend: C contracted dimensions of a kernel, F those of its product or of a part of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from llm_jax.interop.pieces import Leaf, Piece
from llm_jax.models.kernels import LAYOUTS
from llm_jax.models.lora import ADAPTERS


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a layer's product, and the module that makes it.

    module: its name without the prefixes. path: of the projection in the parameter tree. name: of
    the part. layer: its place along the axis of stacked layers, None without such an axis.
    inputs [C...], outputs [F...]: which of the module's each place of the kernel has. inputs_first:
    whether the module's weight is [inputs, outputs].
    """

    module: str
    path: tuple[str, ...]
    name: str
    layer: int | None
    inputs: np.ndarray
    outputs: np.ndarray
    inputs_first: bool

    @property
    def full_name(self) -> str:
        """As `LoraConfig.targets` are searched in."""
        return "/".join((*self.path[:-1], self.name))

    def leaf(self, name: str) -> tuple[str, ...]:
        """Path of a leaf of its adapter."""
        return (*self.path, ADAPTERS, self.name, name)


def parts_of(leaves: Iterable[Leaf]) -> list[Part]:
    """Every part that may have an adapter, in every layer, of the leaves of a model."""
    return [
        part
        for leaf in leaves
        if leaf.path[-1] == "kernel" and leaf.path[-2] in LAYOUTS
        for piece in leaf.pieces
        for part in _cut(leaf, piece)
    ]


def _cut(leaf: Leaf, piece: Piece) -> Iterator[Part]:
    """The parts of a kernel that lie in one of its pieces."""
    layout = LAYOUTS[leaf.path[-2]]
    stacked = len(leaf.shape) - len(layout.axes)
    summed, kept = ([stacked + i for i in places] for places in (layout.contracted, layout.kept))
    inputs = _features(leaf, piece, summed)
    outputs = layout.split(jnp.asarray(_features(leaf, piece, kept)), layout.outputs)
    for name, features in outputs.items():
        if (features >= 0).all():
            yield Part(
                module=piece.tensor.removesuffix(".weight"),
                path=leaf.path[:-1],
                name=name,
                layer=piece.start[0] if stacked else None,
                inputs=inputs,
                outputs=np.asarray(features),
                inputs_first=bool(set(piece.factors[0]) & {piece.axes[i] for i in summed}),
            )


def _features(leaf: Leaf, piece: Piece, axes: Sequence[int]) -> np.ndarray:
    """Which input or output of the module each place along these axes of a kernel is: int
    [axes...], -1 where the piece has none."""
    names = tuple(piece.axes[axis] for axis in axes)
    start = tuple(piece.start[axis] for axis in axes)
    (side,) = (i for i, factors in enumerate(piece.factors) if set(factors) & set(names))
    vector = Piece(piece.tensor, (piece.factors[side],), names, piece.sizes, start)
    features = np.full([leaf.shape[axis] for axis in axes], -1)
    filled = vector.turned(features[tuple(slice(*places) for places in vector.box)])
    filled[...] = np.arange(filled.size).reshape(filled.shape)
    filled += piece.first_row if side == 0 else 0
    return features


def by_module(parts: Sequence[Part]) -> dict[str, list[Part]]:
    modules: dict[str, list[Part]] = {}
    for part in parts:
        modules.setdefault(part.module, []).append(part)
    return modules


def widths(made: Sequence[Part]) -> tuple[int, int]:
    """Inputs and outputs of the module that makes these parts."""
    return made[0].inputs.size, sum(part.outputs.size for part in made)


def targets(chosen: Collection[str], parts: Sequence[Part]) -> tuple[str, ...]:
    """Regular expressions that match these of all the parts' names and no others."""
    every_name = [part.full_name for part in parts]
    kinds_of = _by_layer(every_name)
    layers_of: dict[tuple[str, ...], list[str]] = {}
    for layer, kinds in _by_layer(name for name in every_name if name in chosen).items():
        layers_of.setdefault(kinds, []).append(layer)
    found = []
    for kinds, layers in layers_of.items():
        layers = sorted(layers, key=lambda name: (len(name), name))
        where = f"({'|'.join(layers)})/" if len(layers) > 1 else f"{layers[0]}/"
        if len(layers) == len(kinds_of):
            where = ""
        every = kinds_of[layers[0]]
        if kinds == every:
            found.append(where or ".*")
            continue
        for module in sorted({kind.partition("/")[0] for kind in kinds}):
            mine = [kind.partition("/")[2] for kind in kinds if kind.startswith(f"{module}/")]
            if len(mine) == sum(kind.startswith(f"{module}/") for kind in every):
                found.append(f"{where}{module}/")
            else:
                one_of = f"({'|'.join(mine)})" if len(mine) > 1 else mine[0]
                found.append(f"{where}{module}/{one_of}$")
    return tuple(found)


def _by_layer(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """From "layer_0/attention/query" to layer_0: attention/query, each once, in the same order."""
    found: dict[str, dict[str, None]] = {}
    for name in names:
        layer, module, part = name.rsplit("/", 2)
        found.setdefault(layer, {})[f"{module}/{part}"] = None
    return {layer: tuple(kinds) for layer, kinds in found.items()}


def target_modules(adapted: Collection[str], every: Collection[str], prefix: str) -> list[str]:
    """Names for adapter_config.json: ends where all layers are alike, otherwise whole names."""

    def end(module: str) -> str:
        """Of "layers.0.self_attn.q_proj" what follows the layer."""
        return module.split(".", 2)[2]

    partly = {end(module) for module in every if module not in adapted}
    return sorted({prefix + m if end(m) in partly else end(m) for m in adapted})

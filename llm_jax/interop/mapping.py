"""The leaves of a model's parameter tree, each with the published tensors that it is made of."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax

from llm_jax.errors import UserError
from llm_jax.interop.families import Family
from llm_jax.interop.names import HEADS
from llm_jax.interop.pieces import Leaf, Piece
from llm_jax.models.config import ModelConfig
from llm_jax.sharding import unbox
from llm_jax.weights import shapes


def leaves_of(
    model: ModelConfig, heads: tuple[str, ...], family: Family, prefix: str
) -> tuple[Leaf, ...]:
    """Every parameter of a model without adapters, and the tensors that it comes from.

    Args:
      heads: heads on the model, such as "reward_head"; with one the output projection is left out,
        as published classifiers have none.
      prefix: what stands before the names of all tensors but the heads'.

    Raises:
      UserError: the family has no name for a parameter.
    """
    found = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(unbox(shapes(model, heads))):
        path = tuple(key.key for key in keys)
        if heads and path == ("output",):
            continue
        pieces = tuple(_pieces(model, family, prefix, path))
        found.append(Leaf(path, leaf.shape, pieces))
    return tuple(found)


def _pieces(
    model: ModelConfig, family: Family, prefix: str, path: tuple[str, ...]
) -> Iterator[Piece]:
    """The pieces of one leaf, of all layers where they are stacked in it."""
    name, layers, is_stacked = _place(model, path)
    if name not in family.table:
        raise UserError(
            f"{family.model_type} models have no {name.removeprefix('layer/')}, which this model "
            "has: there is no such tensor to read or write."
        )
    entries = family.table[name]
    experts = model.moe.num_experts if model.moe and "{expert}" in entries[0] else 1
    for place, layer in enumerate(layers):
        lead = (place,) if is_stacked else ()
        for expert in range(experts):
            sizes = {**_sizes(model), "e": expert}
            where = {"layer": layer, "expert": expert}
            yield from _cut(entries, sizes, lead, functools.partial(_full_name, prefix, where))


def _full_name(prefix: str, where: Mapping[str, int], tensor: str) -> str:
    return tensor if tensor in HEADS else prefix + tensor.format(**where)


def _place(model: ModelConfig, path: tuple[str, ...]) -> tuple[str, Sequence[int], bool]:
    """A leaf's name in the tables, its layers, and whether they are stacked in it."""
    if path[0] == "layers":
        place = int(path[1].removeprefix("block_"))
        layers = range(place, model.num_layers, len(model.windows))
        return "/".join(("layer", *path[2:])), layers, True
    match = re.fullmatch(r"layer_(\d+)", path[0])
    if match:
        return "/".join(("layer", *path[1:])), (int(match[1]),), False
    return "/".join(path), (0,), False


def _cut(
    entries: Sequence[str],
    sizes: Mapping[str, int],
    lead: tuple[int, ...],
    full_name: Callable[[str], str],
) -> Iterator[Piece]:
    """The pieces that a table's entries describe, for one layer and one expert.

    Args:
      lead: the place along the axis of stacked layers, if there is one.
    """
    tensors = [entry.split(": ")[0] for entry in entries]
    row = 0
    for tensor, entry in zip(tensors, entries, strict=True):
        factors, axes = (side.split() for side in entry.split(": ")[1].split(" -> "))
        names = [axis.partition("@")[0] for axis in axes]
        starts = [_number(axis.partition("@")[2], sizes) for axis in axes]
        piece = Piece(
            tensor=full_name(tensor),
            factors=tuple(tuple(dimension) for dimension in factors),
            axes=(*("1",) * len(lead), *names),
            sizes={letter: sizes[letter] for dimension in factors for letter in dimension},
            start=(*lead, *starts),
        )
        if tensors.count(tensor) > 1:
            size = piece.source_shape[0]
            piece = dataclasses.replace(piece, rows=(row, row + size))
            row += size
        yield piece


def _number(expression: str, sizes: Mapping[str, int]) -> int:
    """Of "" (0), a number, a letter, or a sum of them."""
    terms = filter(None, expression.split("+"))
    return sum(int(term) if term.isdigit() else sizes[term] for term in terms)


def _sizes(model: ModelConfig) -> dict[str, int]:
    """The letters of the legend in `names`."""
    assert model.vocab_size is not None
    return {
        "V": model.vocab_size,
        "P": model.max_length,
        "D": model.embed_dim,
        "K": model.kv_heads,
        "G": model.group,
        "F": model.group + 2,
        "N": model.num_heads,
        "H": model.resolved_head_dim,
        "M": model.mlp_dim,
        "U": 2,
        "E": model.moe.num_experts if model.moe else 0,
        "L": 1,
    }

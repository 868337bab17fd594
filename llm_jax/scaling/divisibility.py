"""Whether a mesh divides a model and its batches, told before anything is compiled."""

from __future__ import annotations

import dataclasses
import math

from llm_jax.errors import UserError
from llm_jax.mesh import MeshConfig
from llm_jax.models.config import ModelConfig
from llm_jax.sharding import RULES


@dataclasses.dataclass(frozen=True)
class Division:
    """axes: mesh axes that together split a dimension. what, size: the dimension. pieces: that
    every one of the shards is made of, where there is more than one shard."""

    axes: tuple[str, ...]
    what: str
    size: int
    pieces: int = 1

    def ways(self, mesh: MeshConfig) -> int:
        return math.prod(getattr(mesh, axis) for axis in self.axes)

    def allows(self, ways: int) -> bool:
        return ways == 1 or self.size % (self.pieces * ways) == 0

    def neighbours(self, ways: int) -> list[int]:
        """The sizes next below and above `ways` that would do."""
        known = [n for n in range(1, self.size + 1) if self.allows(n)]
        return [n for n in known if n < ways][-1:] + [n for n in known if n > ways][:1]


def divisions(model: ModelConfig, length: int, batch: int) -> tuple[Division, ...]:
    """What the mesh axes must divide, as the sharding rules lay out parameters and batches.

    A row is cut into an early and a late piece for each context shard, so that all of them have as
    much of causal attention to do.
    """
    assert model.vocab_size is not None
    groups, what = 1, "layers that are not stacked (model.scan_layers)"
    if model.scan_layers:
        groups, what = model.num_layers // len(model.windows), "model.num_layers"
        if len(model.windows) > 1:
            what += " over the length of model.attention_pattern"
    experts = 1 if model.moe is None else model.moe.num_experts
    return (
        Division(("tensor",), "model.num_kv_heads", model.kv_heads),
        Division(("tensor",), "model.mlp_dim", model.mlp_dim),
        Division(("tensor",), "model.vocab_size", model.vocab_size),
        Division(("stage",), what, groups),
        Division(("expert",), "model.moe.num_experts", experts),
        Division(("context",), "the length", length, pieces=2),
        Division(("fsdp", "context"), "model.embed_dim", model.embed_dim),
        Division(RULES["activation_rows"], "the batch", batch),
    )


def batch_shards(mesh: MeshConfig) -> int:
    """How many ways a mesh without -1 splits the batch outside the layers."""
    return math.prod(getattr(mesh, axis) for axis in RULES["activation_rows"])


def divides(model: ModelConfig, mesh: MeshConfig, length: int, batch: int) -> bool:
    """Whether `check_mesh` lets the mesh pass."""
    return all(d.allows(d.ways(mesh)) for d in divisions(model, length, batch))


def check_mesh(model: ModelConfig, mesh: MeshConfig, length: int, batch: int) -> None:
    """Refuses a mesh that does not divide a model or its batches.

    Args:
      mesh: without -1.
      length: tokens a row. batch: rows of the global batch.

    Raises:
      UserError: with the axes, the dimension that they do not divide, and the sizes next to theirs
        that would.
    """
    for division in divisions(model, length, batch):
        ways = division.ways(mesh)
        if not division.allows(ways):
            axes = " x ".join(division.axes)
            twice = f" {division.pieces} times over" if division.pieces > 1 else ""
            would = " or ".join(map(str, division.neighbours(ways)))
            raise UserError(
                f"config.mesh: {axes}={ways} does not divide {division.what}={division.size}"
                f"{twice}; {would} would."
            )

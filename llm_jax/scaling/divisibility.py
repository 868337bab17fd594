"""Whether a mesh divides a model and its batches, told before anything is compiled."""

from __future__ import annotations

import dataclasses

from llm_jax.errors import UserError
from llm_jax.mesh import MeshConfig
from llm_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Division:
    """axes: mesh axes that together split a dimension. what, size: the dimension."""

    axes: tuple[str, ...]
    what: str
    size: int

    def ways(self, mesh: MeshConfig) -> int:
        ways = 1
        for axis in self.axes:
            ways *= getattr(mesh, axis)
        return ways


def divisions(model: ModelConfig, length: int, batch: int) -> list[Division]:
    """What each mesh axis must divide.

    A row is cut into two halves for each context shard, an early and a late one, so that all have
    as much of causal attention to do.
    """
    assert model.vocab_size is not None
    found = [
        Division(("tensor",), "model.num_kv_heads (or num_heads)", model.kv_heads),
        Division(("tensor",), "model.mlp_dim", model.mlp_dim),
        Division(("tensor",), "model.vocab_size", model.vocab_size),
        Division(("fsdp",), "model.embed_dim", model.embed_dim),
        Division(("stage",), _layers_name(model), _stacked_layers(model)),
        Division(("expert",), "model.moe.num_experts", model.moe.num_experts if model.moe else 1),
        Division(("stage", "data", "fsdp", "expert"), "the batch", batch),
    ]
    return found


def check_mesh(model: ModelConfig, mesh: MeshConfig, length: int, batch: int) -> None:
    """Refuses a mesh that does not divide a model or a batch.

    Args:
      mesh: without -1.
      length: tokens a row. batch: rows of the global batch.

    Raises:
      UserError: with the axis, the dimension that it does not divide, and the sizes next to it that
        would.
    """
    for division in divisions(model, length, batch):
        ways = division.ways(mesh)
        if division.size % ways:
            axes = " x ".join(f"config.mesh.{axis}" for axis in division.axes)
            raise UserError(
                f"{axes}={ways} does not divide {division.what}={division.size}: "
                f"{_neighbours(division.size, ways)} would."
            )
    if mesh.context > 1 and length % (2 * mesh.context):
        raise UserError(
            f"config.mesh.context={mesh.context} does not divide the length of {length}, which must "
            f"be a multiple of 2 x context: {_neighbours(length // 2, mesh.context)} would."
            if length % 2 == 0
            else f"config.mesh.context={mesh.context}: the length of {length} is odd, and must be a "
            "multiple of 2 x context: make it even."
        )


def divides(model: ModelConfig, mesh: MeshConfig, length: int, batch: int) -> bool:
    """Whether `check_mesh` would let it pass."""
    return all(d.size % d.ways(mesh) == 0 for d in divisions(model, length, batch)) and (
        mesh.context == 1 or length % (2 * mesh.context) == 0
    )


def divisors(size: int) -> list[int]:
    return [n for n in range(1, size + 1) if size % n == 0]


def _stacked_layers(model: ModelConfig) -> int:
    """Repetitions of the attention pattern, which a pipeline shares out; layers that are not
    stacked cannot be."""
    return model.num_layers // len(model.windows) if model.scan_layers else 1


def _layers_name(model: ModelConfig) -> str:
    if not model.scan_layers:
        return "the one group of layers without model.scan_layers"
    if len(model.windows) > 1:
        return "model.num_layers / length of model.attention_pattern"
    return "model.num_layers"


def _neighbours(size: int, ways: int) -> str:
    """The divisors of `size` next below and above `ways`."""
    known = divisors(size)
    below = [n for n in known if n < ways][-1:]
    above = [n for n in known if n > ways][:1]
    return " or ".join(str(n) for n in below + above)

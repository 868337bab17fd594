"""Pipeline parallelism: groups of layers one after another on the devices of mesh axis "stage".

The batch is cut into micro-batches. In every iteration each stage takes one of them through its own
layers, and all hand on what they have to the next stage: a roll of one buffer [S, b, T, D], which
XLA makes a collective-permute between neighbours. All of it is one program, whose backward pass is
what autodiff makes of it: the same pipeline from end to start. (GPipe, arXiv:1811.06965; as a
vectorised loop: GSPMD, arXiv:2105.04663, section 3.3.)

With `repeats` > 1 each stage holds that many groups of layers, and a micro-batch goes round the
stages as often: the interleaved schedule (arXiv:2104.04473, section 2.2). S micro-batches go round
until they are done, then the next S do, so what the last stage hands on is just what the first one
works on next. A round is a smaller part of the layers, and with it the time in which stages wait
to be reached. In return, neighbours exchange activations `repeats` times as often, and once a step
the weights, which parameters stacked layer by layer hold at other stages.

Sharded parameters (fsdp) are gathered once for each micro-batch, not once a step.

Legend: B rows of the batch, T time, D embed; S stages, M micro-batches, J = M / S of them for each
stage, b rows of a micro-batch; R repeats, L groups of layers that a stage takes a micro-batch
through in one iteration.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from llm_jax.errors import UserError
from llm_jax.sharding import RULES, constrain

if TYPE_CHECKING:
    from llm_jax.models.config import ModelConfig
    from llm_jax.models.transformer import Row

STREAM_AXES = (
    "activation_stages", None, "activation_batch", "activation_residual_time", "activation_embed"
)  # fmt: skip
STAGE_AXES = (STREAM_AXES[0], *STREAM_AXES[2:])

# (parameters of a group, x_BTD, row, dropout's rng or None, repeat or None) → (x_BTD, sums).
# With a repeat the parameters have a leading axis R, and the group takes those at the repeat.
Group = Callable[..., tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """How the batch goes through the stages of the mesh; the numbers come out the same."""

    # A multiple of the stages; None: as many as stages. More of them, and less of the time is
    # spent waiting; but each should hold enough rows to keep a device busy.
    micro_batches: int | None = None
    repeats: int = 1  # groups of layers that each stage holds

    def __post_init__(self) -> None:
        for name in ("micro_batches", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"model.pipeline.{name}={value} must be positive.")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Who works on what when."""

    stages: int
    micro_batches: int  # a multiple of the stages
    repeats: int

    @property
    def iterations(self) -> int:
        return self.micro_batches * self.repeats + self.stages - 1

    def work(self, iteration: Any, stage: Any) -> tuple[Any, Any, Any]:
        """(micro-batch, repeat, busy) of a stage in an iteration, all integers or int32 arrays.

        A stage that is not busy has nothing to do yet or any more; the others are in range still.
        """
        turn = iteration - stage
        busy = (turn >= 0) & (turn < self.micro_batches * self.repeats)
        turn = jnp.clip(turn, 0, self.micro_batches * self.repeats - 1)
        return self.entering(turn), turn // self.stages % self.repeats, busy

    def entering(self, iteration: Any) -> Any:
        """The micro-batch that the first stage works on, counted on past the last."""
        rounds = iteration // (self.stages * self.repeats)
        return rounds * self.stages + iteration % self.stages


def bubble_share(stages: int, micro_batches: int, repeats: int = 1) -> float:
    """The share of its time that a stage waits for the others, forward and backward alike:
    (S − 1) / (M · R + S − 1)."""
    return (stages - 1) / (micro_batches * repeats + stages - 1)


def stages() -> int:
    """Stages of the mesh that is set; 1 without."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["stage"]


def micro_batches_per_stage(config: ModelConfig, mesh: Mesh) -> int:
    """J, the micro-batches of the pipeline for each stage of the mesh; 1 without a pipeline.

    Raises:
      UserError: the model's layers do not fit the stages, nor the micro-batches their number.
    """
    return _per_stage(config, mesh.shape["stage"])


def pipeline(
    group: Group,
    params: Any,
    x_BTD: jax.Array,
    row: Row,
    config: ModelConfig,
    rng: jax.Array | None,
) -> tuple[jax.Array, Any]:
    """All groups of layers, in stages on the mesh that is set.

    A batch that does not make `config.pipeline.micro_batches` makes as many as it can; rows of
    padding fill one that the mesh does not divide.

    Args:
      params: of the groups, stacked, [groups, ...]; contiguous over the stages.
      row: its arrays have B rows, or 1 that stands for all.
      rng: of dropout. Every group draws afresh for every micro-batch, and so other numbers than
        without a pipeline or with another number of micro-batches.

    Returns:
      (x_BTD, the groups' sums, added up)
    """
    S, R, most = stages(), config.pipeline.repeats, _per_stage(config, stages())
    mesh, B = jax.sharding.get_abstract_mesh(), x_BTD.shape[0]
    shards = math.prod(mesh.shape[axis] for axis in RULES["activation_batch"])
    padding = -B % (S * shards)
    if padding and row.query_segment_ids is None:
        real_BT = jnp.ones(x_BTD.shape[:2], jnp.int32)
        row = dataclasses.replace(row, query_segment_ids=real_BT, key_segment_ids=real_BT)
    rows_of_shard = (B + padding) // (S * shards)
    J = max(n for n in range(1, most + 1) if rows_of_shard % n == 0)
    schedule = Schedule(S, S * J, R)

    def cut(x: jax.Array) -> jax.Array:
        """[B, ...] → [S, J, b, ...]; what a device holds of its rows is what it holds of these."""
        x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
        x = x.reshape(S, shards, J, -1, *x.shape[1:]).swapaxes(1, 2)
        return x.reshape(S, J, -1, *x.shape[4:])

    def joined(x: jax.Array) -> jax.Array:
        x = x.reshape(S, J, shards, -1, *x.shape[3:]).swapaxes(1, 2)
        return x.reshape(B + padding, *x.shape[4:])[:B]

    def rows(x: jax.Array) -> jax.Array:
        """[M, b, ...] at every stage, or [1, 1, ...]."""
        if x.shape[0] == 1 != B:
            return x[None]
        x = cut(x).reshape(S * J, -1, *x.shape[1:])
        return constrain(x, None, "activation_batch", *(None,) * (x.ndim - 2))

    row_M = jax.tree.map(rows, row)
    weights_SL = jax.tree.map(lambda x: _to_stages(x, S, R), params)
    L = jax.tree.leaves(weights_SL)[0].shape[1]

    def stage(weights_L: Any, x: jax.Array, stage: jax.Array, iteration: jax.Array) -> Any:
        micro_batch, repeat, busy = schedule.work(iteration, stage)
        own = jax.tree.map(lambda x: _own_rows(x, micro_batch), row_M)
        own_rng = None if rng is None else jax.random.fold_in(rng, micro_batch)
        first = (repeat * S + stage) * L

        def layers(x: jax.Array, operands: Any) -> tuple[jax.Array, Any]:
            weights, place = operands
            layer_rng = None if own_rng is None else jax.random.fold_in(own_rng, first + place)
            return group(weights, x, own, layer_rng, None if R == 1 else repeat)

        x, sums_L = jax.lax.scan(layers, x, (weights_L, jnp.arange(L)))
        return x, jax.tree.map(lambda s: jnp.where(busy, jnp.sum(s, axis=0), 0), sums_L)

    stage_S = jnp.arange(S)
    first_S = (stage_S == 0)[:, None, None, None]
    last_S = (stage_S == S - 1)[:, None, None, None]

    # Linear: the backward pass needs nothing of it, and so gets nothing but the iteration.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def hand_on(x_S: jax.Array, stream_SJ: jax.Array, iteration: Any) -> tuple[Any, Any]:
        """What the stages work on in an iteration, given what they made in the one before.

        Where the first stage begins with another micro-batch, the last one has just finished one.
        The stream has the former at its head and takes the latter in at its end; it is as long as
        the batch and lies on all stages, of which each holds only its part.
        """
        fresh = iteration // S % R == 0
        place = schedule.entering(iteration) % J
        head_S = jax.lax.dynamic_index_in_dim(stream_SJ, place, axis=1, keepdims=False)
        moved_S = jnp.where(last_S, x_S, jnp.roll(head_S, -1, axis=0))
        stream_SJ = jax.lax.dynamic_update_index_in_dim(
            stream_SJ, jnp.where(fresh, moved_S, head_S), place, axis=1
        )
        x_S = jnp.where(first_S & fresh, head_S, jnp.roll(x_S, 1, axis=0))
        return constrain(x_S, *STAGE_AXES), constrain(stream_SJ, *STREAM_AXES)

    def iterate(carry: Any, iteration: jax.Array) -> tuple[Any, Any]:
        x_S, stream_SJ = carry
        x_S, sums_S = jax.vmap(stage, (0, 0, 0, None), spmd_axis_name="stage")(
            weights_SL, x_S, stage_S, iteration
        )
        return hand_on(x_S, stream_SJ, iteration + 1), sums_S

    stream_SJ = constrain(cut(x_BTD), *STREAM_AXES)
    begin = hand_on(jnp.zeros_like(stream_SJ[:, 0]), stream_SJ, 0)
    (_, stream_SJ), sums_IS = jax.lax.scan(iterate, begin, jnp.arange(schedule.iterations))
    # The results stand S places behind where their micro-batches came from.
    return joined(jnp.roll(stream_SJ, -S, axis=1)), jax.tree.map(
        lambda s: jnp.sum(s, axis=(0, 1)), sums_IS
    )


def _per_stage(config: ModelConfig, stages: int) -> int:
    if stages == 1:
        return 1
    if not config.scan_layers:
        raise UserError(
            f"config.mesh.stage={stages} divides the layers that model.scan_layers stacks: set "
            "model.scan_layers=True, or config.mesh.stage=1."
        )
    groups, repeats = config.num_layers // len(config.windows), config.pipeline.repeats
    if groups % (stages * repeats):
        fitting = [n for n in range(1, groups + 1) if groups % (n * repeats) == 0]
        mend = "lower it"
        if fitting:
            mend = f"the nearest config.mesh.stage that does is {_nearest(fitting, stages)}"
        raise UserError(
            f"the model's {groups} groups of layers are not divided by config.mesh.stage={stages} "
            f"x model.pipeline.repeats={repeats}: {mend}."
        )
    asked = config.pipeline.micro_batches or stages
    if asked % stages:
        nearest = max(stages, round(asked / stages) * stages)
        raise UserError(
            f"model.pipeline.micro_batches={asked} is not a multiple of config.mesh.stage={stages}:"
            f" make it one, such as {nearest}."
        )
    return asked // stages


def _nearest(fitting: list[int], wanted: int) -> str:
    """The nearest value below and the nearest above, as far as there are any."""
    below, above = [n for n in fitting if n < wanted], [n for n in fitting if n > wanted]
    return " or ".join(str(n) for n in (*below[-1:], *above[:1]))


def _to_stages(x: jax.Array, stages: int, repeats: int) -> jax.Array:
    """[groups, ...] → [S, L, ...], or with repeats [S, L, R, ...]; other axes keep their layout."""
    if repeats == 1:
        x = x.reshape(stages, -1, *x.shape[1:])
    else:
        x = jnp.moveaxis(x.reshape(repeats, stages, -1, *x.shape[1:]), 0, 2)
    free = PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(x, PartitionSpec("stage", *[free] * (x.ndim - 1)))


def _own_rows(x_M: jax.Array, micro_batch: jax.Array) -> jax.Array:
    if x_M.shape[0] == 1:
        return x_M[0]
    x = jax.lax.dynamic_index_in_dim(x_M, micro_batch, keepdims=False)
    return constrain(x, "activation_batch", *(None,) * (x.ndim - 1))

"""One training step: differentiate, accumulate, divide once, clip, update or skip."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from llm_jax import optim, sharding
from llm_jax.errors import UserError
from llm_jax.models.heads import HEADS
from llm_jax.types import Mean, TrainState, join

# (params, batch, rng) → (loss, metrics). Pure; the step differentiates `loss.total`.
Objective = Callable[[Any, Any, jax.Array], tuple[Mean, dict[str, Mean]]]


@dataclasses.dataclass(frozen=True)
class Pooled:
    """An Objective whose total on some rows depends on sums over all rows of the global batch.

    pool: `(params, batch, rng) → tree of sums over rows`; no gradient flows through them.
    objective: `(params, batch, rng, sums) → (loss, metrics)`, such that over micro-batches that are
      given the same sums, totals and gradients add up to those of the whole batch. Without sums
      (None) the batch is the whole.
    """

    pool: Callable[[Any, Any, jax.Array], Any]
    objective: Callable[[Any, Any, jax.Array, Any], tuple[Mean, dict[str, Mean]]]

    def __call__(
        self, params: Any, batch: Any, rng: jax.Array, sums: Any = None
    ) -> tuple[Mean, dict[str, Mean]]:
        return self.objective(params, batch, rng, sums)


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How a global batch is cut inside the jitted step; the numbers come out the same."""

    # Most tokens that a micro-batch holds on one batch shard. None: everything at once on
    # accelerators; on CPU a size whose temporaries stay in cache and are not remapped every step.
    micro_batch_tokens: int | None = None
    # What the loss is differentiated by. bfloat16: the parameters, which stay float32 between steps
    # (masters), are rounded once a step, and so are gradients, on their way between devices too.
    # With model.dtype=bfloat16 the loss is the same to the bit, as products round them anyway.
    parameter_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.parameter_dtype not in ("float32", "bfloat16"):
            raise UserError(
                f"config.step.parameter_dtype={self.parameter_dtype!r} must be 'float32' or "
                "'bfloat16'."
            )


# Parameters that the model computes with in float32 whatever its dtype, and their trees.
UNROUNDED = (*optim.UNDECAYED, "router", *HEADS)

CPU_MICRO_BATCH_TOKENS = 512


def micro_batches(config: StepConfig, batch: int, length: int, mesh: Mesh, pieces: int = 1) -> int:
    """Into how many micro-batches a `[batch, length]` global batch is cut.

    Args:
      pieces: into how many the model cuts the rows that a micro-batch has on each shard
        (`models.pipeline.micro_batches_per_stage`).

    Raises:
      UserError: the mesh does not divide the batch, or its rows on a shard do not make the pieces.
    """
    shards = sharding.batch_shards(mesh)
    if batch % (shards * pieces):
        divisor = shards * pieces
        nearest = max(divisor, round(batch / divisor) * divisor)
        cut = f"the mesh's {shards} batch shards (stage x data x fsdp x expert)"
        if pieces > 1:
            stages = mesh.shape["stage"]
            cut = (
                f"the pipeline's {pieces * stages} micro-batches x {shards // stages} batch shards "
                "(data x fsdp x expert)"
            )
        raise UserError(
            f"a batch of {batch} sequences is not divided by {cut}: use a multiple of {divisor}, "
            f"such as {nearest}."
        )
    limit = config.micro_batch_tokens
    if limit is None and mesh.devices.flat[0].platform == "cpu":
        limit = CPU_MICRO_BATCH_TOKENS
    return fewest_parts(batch // shards, length, limit, pieces)


def fewest_parts(rows: int, length: int, limit: int | None, pieces: int = 1) -> int:
    """Into how many equal parts `rows` rows of `length` tokens are cut, so that none has more than
    `limit` tokens; into `pieces` rows each where these have more. `pieces` divides every part."""
    if limit is None:
        return 1
    most = rows // pieces
    fitting = [n for n in range(1, most + 1) if most % n == 0 and rows // n * length <= limit]
    return fitting[0] if fitting else most


def init_state(
    init_params: Callable[[jax.Array], Any],
    optimizer: optax.GradientTransformationExtraArgs,
    seed: int,
    mesh: Mesh,
    param_shardings: Any,
) -> tuple[TrainState, TrainState]:
    """The abstract initial state and its shardings; `materialise` makes the arrays.

    Returns:
      (state of jax.ShapeDtypeStruct with shardings, state of NamedSharding)
    """
    traced, abstract = jax.make_jaxpr(
        lambda: _initial(init_params, optimizer, seed), return_shape=True
    )()
    shardings = TrainState(
        step=sharding.replicated(mesh),
        params=param_shardings,
        opt_state=sharding.tree_shardings(
            mesh, abstract.params, param_shardings, abstract.opt_state
        ),
        rng=sharding.replicated(mesh),
    )
    spaces = jax.tree.unflatten(
        jax.tree.structure(abstract), [aval.memory_space for aval in traced.out_avals]
    )
    shardings = jax.tree.map(sharding.in_space, shardings, spaces)
    abstract = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        abstract,
        shardings,
    )
    return abstract, shardings


def materialise(
    init_params: Callable[[jax.Array], Any],
    optimizer: optax.GradientTransformationExtraArgs,
    seed: int,
    shardings: TrainState,
) -> TrainState:
    """The initial state, made directly in its shards."""
    return jax.jit(lambda: _initial(init_params, optimizer, seed), out_shardings=shardings)()


def begin(
    params: Any,
    optimizer: optax.GradientTransformationExtraArgs,
    seed: int,
    shardings: TrainState,
) -> TrainState:
    """The initial state with given parameters; all else is that of `materialise`."""

    def rest(params: Any) -> tuple[jax.Array, Any, jax.Array]:
        state = _initial(lambda rng: params, optimizer, seed)
        return state.step, state.opt_state, state.rng

    where = (shardings.step, shardings.opt_state, shardings.rng)
    step, opt_state, rng = jax.jit(rest, out_shardings=where)(params)
    return TrainState(step, params, opt_state, rng)


def _initial(init_params: Any, optimizer: Any, seed: int) -> TrainState:
    init_rng, step_rng = jax.random.split(jax.random.key(seed))
    params = init_params(init_rng)
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params), rng=step_rng
    )


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    mesh: Mesh,
    shardings: TrainState,
    micro_batches: int = 1,
    parameter_dtype: str = "float32",
) -> jax.stages.Wrapped:
    """The jitted `(state, batch, learning_rate) → (state, metrics)`.

    Gradients of `loss.total` are summed over micro-batches and devices and divided once by the
    global `loss.count`, so accumulation, packing and sharding change nothing but speed. (A `Pooled`
    objective costs one more forward pass of each micro-batch.) The objective sees the state's
    frozen parameters joined to the trained ones; only these have gradients, in `parameter_dtype`,
    whose sum over micro-batches is float32. The state's buffers are donated. Metrics are Means and
    float32 scalars, replicated.
    """

    def gradient(objective: Objective, params: Any, frozen: Any, batch: Any, rng: jax.Array) -> Any:
        def loss_total(params: Any) -> tuple[jax.Array, dict[str, Mean]]:
            loss, metrics = objective(join(params, frozen), batch, rng)
            return loss.total, {"loss": loss, **metrics}

        (_, metrics), gradients = jax.value_and_grad(loss_total, has_aux=True)(params)
        return metrics, gradients

    def accumulate(
        params: Any, frozen: Any, batch: Any, rng: jax.Array
    ) -> tuple[dict[str, Mean], Any]:
        if micro_batches == 1:
            return gradient(objective, params, frozen, batch, rng)
        parts = jax.tree.map(lambda x: _split(x, micro_batches), batch)
        parts_and_rngs = (parts, jax.random.split(rng, micro_batches))
        informed = objective
        if isinstance(objective, Pooled):
            whole = functools.partial(objective.pool, join(params, frozen))
            informed = functools.partial(objective, sums=_sum_over(whole, parts_and_rngs))

        def exact(batch: Any, rng: jax.Array) -> Any:
            metrics, gradients = gradient(informed, params, frozen, batch, rng)
            return metrics, optax.tree.cast(gradients, jnp.float32)

        return _sum_over(exact, parts_and_rngs)

    def train_step(
        state: TrainState, batch: Any, learning_rate: Any
    ) -> tuple[TrainState, dict[str, Any]]:
        rng = jax.random.fold_in(state.rng, state.step)
        params = rounded(state.params, parameter_dtype)
        metrics, gradients = accumulate(params, state.frozen, batch, rng)
        count = metrics["loss"].count
        count = jnp.where(count > 0, count, 1)
        gradients = jax.tree.map(lambda g: (g / count).astype(g.dtype), gradients)
        params, opt_state = optimizer.update(
            gradients, state.opt_state, state.params, learning_rate=learning_rate, apply=True
        )
        state = TrainState(state.step + 1, params, opt_state, state.rng, state.frozen)
        return state, {**metrics, **optim.read_metrics(opt_state)}

    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(shardings, sharding.batch_sharding(mesh), None),
        out_shardings=(shardings, sharding.replicated(mesh)),
    )


def rounded(params: Any, dtype: str) -> Any:
    """The parameters in `dtype`, all but those of `UNROUNDED`."""

    def cast(path: Any, x: jax.Array) -> jax.Array:
        names = {getattr(key, "key", key) for key in path}
        return x if names & set(UNROUNDED) else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def _sum_over(function: Callable[..., Any], operands: Any) -> Any:
    """Σ function(*part) over the parts along the leading axis of every operand, one at a time."""

    def add(carry: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, function(*part)), None

    shapes = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], operands))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, operands)[0]


def _split(x: jax.Array, parts: int) -> jax.Array:
    """[batch, ...] → [parts, batch / parts, ...]; every micro-batch takes rows of every shard."""
    x = jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)
    return sharding.constrain(x, None, "activation_rows", *[None] * (x.ndim - 2))

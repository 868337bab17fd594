"""Optimisers: optax pieces in one fixed order, inside a guard that skips bad steps.

    guard (skip non-finite and spiking steps)
      └ average (optional EMA of the parameters)
          └ clip → precondition → scale by width (muP) → add decayed weights → × −learning_rate
            (whose state, the moments, may live in the host's memory)

The learning rate is an argument of `update`, never part of the state, so that a run may change its
schedule between phases without touching the moments. The values come from `llm_jax.schedules`.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from llm_jax import mup
from llm_jax.errors import UserError, did_you_mean
from llm_jax.moments import keep_on_host, keep_second_moment_in_bfloat16

OptimizerName = Literal["adamw", "lion", "adafactor", "muon"]
ScheduleName = Literal["cosine", "linear", "wsd", "constant", "inverse_sqrt"]

# Parameters with these names set a level or a gain; pulling them to zero is not regularisation.
UNDECAYED = ("scale", "bias", "magnitude")

# The running mean of gradient norms is a plain mean of the first hundred accepted steps and an
# exponential one after that.
NORM_MEAN_DECAY = 0.99

# RMS of an AdamW update, to which Muon's updates are scaled so that one learning rate serves both
# (Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2).
MUON_UPDATE_RMS = 0.2


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser and its schedule. Steps are optimiser steps; rates are per step."""

    name: OptimizerName = "adamw"
    learning_rate: float = 1e-3  # the peak; Lion wants about a fifth of AdamW's
    schedule: ScheduleName = "cosine"
    warmup_steps: int = 100
    final_learning_rate_ratio: float = 0.1  # the floor, as a share of the peak
    decay_fraction: float = 0.2  # wsd: the share of all steps in the final decay

    b1: float = 0.9  # AdamW, Lion, and Muon's Adam for everything but kernels
    b2: float = 0.95  # the same three; Lion's authors use 0.99
    epsilon: float = 1e-8  # AdamW, and Muon's Adam
    momentum: float = 0.95  # Muon: Nesterov momentum of kernels
    mu_dtype: Literal["float32", "bfloat16"] = "float32"  # first moment; Adafactor has none
    # Second moment of AdamW and of Muon's Adam; bfloat16 is rounded at random (see `moments`).
    nu_dtype: Literal["float32", "bfloat16"] = "float32"
    # Between updates the moments are in the host's memory: of their 8 bytes a parameter (less in
    # bfloat16) the devices hold none during the forward and backward passes (arXiv:2101.06840). The
    # update needs them all at once, so only where activations take more than that does it help.
    offload: bool = False
    parameter_scale: bool = False  # Adafactor: multiply updates by the RMS of each parameter

    weight_decay: float = 0.1  # multiplied by the learning rate; norms' scales and biases skipped
    clip_norm: float | None = 1.0  # global norm; None: no clipping
    ema_decay: float | None = None  # exponential average of the parameters; None: none is kept

    # A non-finite step is always skipped. A step whose norm before clipping exceeds spike_factor ×
    # the running mean of accepted norms is skipped too; None: spikes are accepted.
    spike_factor: float | None = None
    spike_warmup_steps: int = 100  # accepted steps before the first one is judged
    spike_patience: int = 10  # skips in a row after which a high norm is the new level, no spike

    def __post_init__(self) -> None:
        _check_choice("name", self.name, OptimizerName)
        _check_choice("schedule", self.schedule, ScheduleName)
        for name in ("mu_dtype", "nu_dtype"):
            _check_choice(name, getattr(self, name), Literal["float32", "bfloat16"])
        for name in ("learning_rate", "warmup_steps", "weight_decay"):
            _check_range(name, getattr(self, name), 0, math.inf, "not negative")
        for name in ("final_learning_rate_ratio", "decay_fraction"):
            _check_range(name, getattr(self, name), 0, 1, "between 0 and 1")
        for name in ("b1", "b2", "momentum", "ema_decay"):
            _check_range(name, getattr(self, name), 0, math.nextafter(1, 0), "at least 0, below 1")
        for name in ("epsilon", "clip_norm"):
            _check_range(name, getattr(self, name), 5e-324, math.inf, "positive")
        for name in ("spike_factor", "spike_warmup_steps", "spike_patience"):
            _check_range(name, getattr(self, name), 1, math.inf, "at least 1")
        if self.name == "adafactor" and self.mu_dtype != "float32":
            raise UserError(
                "config.optimizer.mu_dtype is set, but Adafactor keeps no first moment: remove it."
            )
        if self.name in ("lion", "adafactor") and self.nu_dtype != "float32":
            raise UserError(
                f"config.optimizer.nu_dtype is set, but {self.name} keeps no full second moment: "
                "remove it."
            )


def make_optimizer(
    config: OptimizerConfig, params: Any, width_multiplier: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    """The whole optimiser.

    `init(params)` is pure and may be jitted. `update(gradients, state, params, learning_rate=x)`
    takes gradients of any float dtype with the structure of `params` and a float32 scalar; the
    returned updates are added with `optax.apply_updates`, or come added with `apply=True`. A
    skipped step changes no bit of the parameters.

    Args:
      config: the settings.
      params: the parameters, or their shapes (`jax.ShapeDtypeStruct`); only names and ranks count.
      width_multiplier: that of the model, see `mup`.

    Raises:
      UserError: muP has no rule for the optimiser.
    """
    pieces: list[optax.GradientTransformation] = []
    if config.clip_norm is not None:
        pieces.append(optax.clip_by_global_norm(config.clip_norm))
    pieces.append(_precondition(config, params))
    if width_multiplier != 1:
        pieces.append(mup.scale_by_width(config, params, width_multiplier))
    if config.weight_decay:
        pieces.append(optax.add_decayed_weights(config.weight_decay, mask=decay_mask(params)))
    pieces.append(scale_by_negative_learning_rate())
    optimizer = optax.chain(*pieces)
    if config.offload:
        optimizer = keep_on_host(optimizer)
    if config.ema_decay is not None:
        optimizer = average_parameters(optimizer, config.ema_decay)
    return skip_bad_steps(
        optimizer, config.spike_factor, config.spike_warmup_steps, config.spike_patience
    )


def read_metrics(opt_state: SkipState) -> dict[str, jax.Array]:
    """Scalars of the last update: `grad_norm` (float32, before clipping), `skipped_steps` (int32,
    since the start of the run)."""
    return {"grad_norm": opt_state.gradient_norm, "skipped_steps": opt_state.skipped_steps}


def ema_params(opt_state: SkipState) -> Any | None:
    """The average of the parameters in float32, or None where `ema_decay` is off."""
    return opt_state.inner.average if isinstance(opt_state.inner, AverageState) else None


def decay_mask(params: Any) -> Any:
    """True for parameters that decay: all but those named in `UNDECAYED`.

    The rank would not tell: in scanned layers a norm's scale has two dimensions.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _names(path)[-1] not in UNDECAYED, params
    )


# --- preconditioners ------------------------------------------------------------------------------


def _precondition(config: OptimizerConfig, params: Any) -> optax.GradientTransformation:
    mu_dtype = jnp.dtype(config.mu_dtype)
    adam = optax.scale_by_adam(config.b1, config.b2, config.epsilon, mu_dtype=mu_dtype)
    if config.nu_dtype == "bfloat16":
        adam = keep_second_moment_in_bfloat16(adam)
    if config.name == "adamw":
        return adam
    if config.name == "lion":
        return optax.scale_by_lion(config.b1, config.b2, mu_dtype=mu_dtype)
    if config.name == "adafactor":
        # Shazeer & Stern 2018, with the decay and the update clipping of its section 7. Stacked
        # layers count as one block: their updates are clipped by their joint RMS.
        pieces = [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
        if config.parameter_scale:
            pieces.append(optax.scale_by_param_block_rms())
        return optax.chain(*pieces)
    dimensions = muon_dimension_numbers(params)
    labels = jax.tree.map(lambda d: "adam" if d is None else "muon", dimensions, is_leaf=_is_spec)
    # Inside optax.partition the parameters of other groups are MaskedNodes, which have no leaves.
    masked = jax.tree.map(
        lambda d: optax.MaskedNode() if d is None else d, dimensions, is_leaf=_is_spec
    )
    muon = optax.chain(
        scale_by_muon(beta=config.momentum, mu_dtype=mu_dtype, weight_dimension_numbers=masked),
        _scale_to_update_rms(masked, MUON_UPDATE_RMS),
    )
    return optax.partition({"muon": muon, "adam": adam}, labels)


# How the kernels that Muon orthogonalises are read as matrices: axes that the product sums over,
# axes of its result. Axes count from the end, so a leading axis of stacked layers is a batch, and
# so is one of experts or fused parts: every part is a matrix of its own, as if it stood alone.
MUON_KERNELS = {
    "attention/qkv/kernel": MuonDimensionNumbers((-2,), (-4, -1)),  # heads, fused, embed, head_dim
    "attention/output/kernel": MuonDimensionNumbers((-3, -2), (-1,)),  # heads, head_dim, embed
    "mlp/gate_up/kernel": MuonDimensionNumbers((-2,), (-1,)),  # fused, embed, mlp
    "mlp/up/kernel": MuonDimensionNumbers((-2,), (-1,)),  # embed, mlp
    "mlp/down/kernel": MuonDimensionNumbers((-2,), (-1,)),  # mlp, embed
    "moe/gate_up": MuonDimensionNumbers((-2,), (-1,)),  # experts, fused, embed, mlp
    "moe/up": MuonDimensionNumbers((-2,), (-1,)),  # experts, embed, mlp
    "moe/down": MuonDimensionNumbers((-2,), (-1,)),  # experts, mlp, embed
}


def muon_dimension_numbers(params: Any) -> Any:
    """A tree like `params` of how Muon reads each kernel, None for what Adam updates."""

    def numbers(path: Any, _: Any) -> MuonDimensionNumbers | None:
        name = "/" + "/".join(_names(path))
        return next((d for end, d in MUON_KERNELS.items() if name.endswith(f"/{end}")), None)

    return jax.tree_util.tree_map_with_path(numbers, params)


def _scale_to_update_rms(dimensions: Any, rms: float) -> optax.GradientTransformation:
    """An orthogonal [m, n] matrix has RMS 1/√max(m, n); brings it to `rms` whatever the shape."""

    def scale(spec: Any, update: Any) -> Any:
        if isinstance(spec, optax.MaskedNode):
            return update
        fan_in, fan_out = (
            math.prod(update.shape[axis] for axis in axes)
            for axes in (spec.reduction_axis, spec.output_axis)
        )
        return update * (rms * math.sqrt(max(fan_in, fan_out)))

    return optax.stateless(
        lambda updates, params: jax.tree.map(scale, dimensions, updates, is_leaf=_is_spec)
    )


# --- pieces ---------------------------------------------------------------------------------------


def scale_by_negative_learning_rate() -> optax.GradientTransformationExtraArgs:
    """Multiplies by −learning_rate, the extra argument of `update`."""

    def update(
        updates: Any, state: Any, params: Any = None, *, learning_rate: Any, **_: Any
    ) -> Any:
        del params
        return optax.tree.scale(-learning_rate, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


class AverageState(NamedTuple):
    """inner: the wrapped state. average: float32 tree like the parameters."""

    inner: Any
    average: Any


def average_parameters(
    inner: optax.GradientTransformationExtraArgs, decay: float
) -> optax.GradientTransformationExtraArgs:
    """Keeps average ← decay × average + (1 − decay) × new parameters, from the first parameters on.

    In float32: a bfloat16 average would not move by the last (1 − decay) of it.
    """

    def init(params: Any) -> AverageState:
        # A copy, so that a train step may donate the parameters and the state together.
        average = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
        return AverageState(inner.init(params), average)

    def update(updates: Any, state: AverageState, params: Any = None, **extra: Any) -> Any:
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        average = jax.tree.map(
            lambda mean, new: decay * mean + (1 - decay) * new.astype(jnp.float32),
            state.average,
            optax.apply_updates(params, updates),
        )
        return updates, AverageState(inner_state, average)

    return optax.GradientTransformationExtraArgs(init, update)


class SkipState(NamedTuple):
    """inner: the wrapped state. Scalars:

    gradient_norm: float32, of the last step, accepted or not, before clipping.
    norm_mean: float32, running mean of the accepted norms. accepted_steps: int32.
    skipped_steps: int32. consecutive_skips: int32, since the last accepted step.
    """

    inner: Any
    gradient_norm: jax.Array
    norm_mean: jax.Array
    accepted_steps: jax.Array
    skipped_steps: jax.Array
    consecutive_skips: jax.Array


def skip_bad_steps(
    inner: optax.GradientTransformationExtraArgs,
    spike_factor: float | None,
    spike_warmup_steps: int,
    spike_patience: int,
) -> optax.GradientTransformationExtraArgs:
    """Skips steps whose gradient norm is not finite, or far above the mean of the accepted ones.

    The norm is taken in float32 over the gradients as they come, before `inner` clips them: after
    clipping no spike would be left to see. A skipped step leaves `inner`'s state and the mean as
    they are, bit for bit, and its updates are −0.0, the one number that leaves every parameter
    unchanged when added (+0.0 would turn −0.0 into +0.0).

    With `apply=True`, `update` returns the new parameters instead: made inside the branch, they
    take the place of the old ones, and no updates take memory of their own.
    """

    def init(params: Any) -> SkipState:
        zero, none = jnp.zeros([], jnp.float32), jnp.zeros([], jnp.int32)
        return SkipState(inner.init(params), zero, zero, none, none, none)

    def update(
        updates: Any, state: SkipState, params: Any = None, *, apply: bool = False, **extra: Any
    ) -> Any:
        norm = optax.tree.norm(optax.tree.cast(updates, jnp.float32))
        accept = jnp.isfinite(norm)
        if spike_factor is not None:
            judged = state.accepted_steps >= spike_warmup_steps
            judged &= state.consecutive_skips < spike_patience
            accept &= ~(judged & (norm > spike_factor * state.norm_mean))

        weight = jnp.maximum(1 / (state.accepted_steps + 1), 1 - NORM_MEAN_DECAY)

        def accepted() -> tuple[Any, SkipState]:
            exact = optax.tree.cast(updates, jnp.float32)
            new, inner_state = inner.update(exact, state.inner, params, **extra)
            new = optax.apply_updates(params, new) if apply else new
            new_state = state._replace(
                inner=inner_state,
                gradient_norm=norm,
                norm_mean=state.norm_mean + weight * (norm - state.norm_mean),
                accepted_steps=state.accepted_steps + 1,
                consecutive_skips=jnp.zeros_like(state.consecutive_skips),
            )
            return new, new_state

        def skipped() -> tuple[Any, SkipState]:
            new_state = state._replace(
                gradient_norm=norm,
                skipped_steps=state.skipped_steps + 1,
                consecutive_skips=state.consecutive_skips + 1,
            )
            if apply:
                return params, new_state
            return jax.tree.map(lambda u: jnp.full_like(u, -0.0, jnp.float32), updates), new_state

        # A branch, because selecting between the old and the new state would make XLA copy every
        # donated moment before it overwrites it.
        return jax.lax.cond(accept, accepted, skipped)

    return optax.GradientTransformationExtraArgs(init, update)


# --- helpers --------------------------------------------------------------------------------------


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, (MuonDimensionNumbers, optax.MaskedNode))


def _names(path: Any) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", key)) for key in path)


def _check_choice(name: str, value: Any, choices: Any) -> None:
    known = typing.get_args(choices)
    if value not in known:
        raise UserError(
            f"config.optimizer.{name}={value!r} is unknown.{did_you_mean(str(value), known)}"
        )


def _check_range(name: str, value: float | None, low: float, high: float, wanted: str) -> None:
    # Written so that NaN fails too.
    if value is not None and not low <= value <= high:
        raise UserError(f"config.optimizer.{name}={value} must be {wanted}.")

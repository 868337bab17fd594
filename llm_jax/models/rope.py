"""Rotary position embedding and the scalings that stretch it to longer contexts.

Legend: B batch (or 1), T time, H head dimension, R half of the rotated dimensions.
The two halves of a head are rotated against one another (the layout of Hugging Face checkpoints),
and every table is made in float32: bfloat16 angles are wrong from a few hundred positions on.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.errors import UserError

Scaling = Literal["none", "linear", "ntk", "dynamic", "yarn", "llama3", "longrope"]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Which angle a position turns each pair of dimensions by.

    Sources: RoFormer (arXiv:2104.09864); linear, position interpolation (arXiv:2306.15595); ntk,
    dynamic and yarn (arXiv:2309.00071); llama3, the Llama 3.1 release; longrope (arXiv:2402.13753).

    The angles of dynamic and longrope depend on the length of the row that is read, past
    `original_length`: that of the row without a cache, its padding included; with a cache the
    tokens held. Keys in a cache keep the angle that they came with, so a row that grows past
    `original_length` while it is generated differs a little from one that is read at once.
    """

    theta: float = 10_000.0  # base: the slowest pair turns once in about 2π·theta positions
    fraction: float = 1.0  # share of the head dimensions that is rotated, the first ones
    scaling: Scaling = "none"
    factor: float = 1.0  # how many times longer the context becomes
    original_length: int | None = None  # trained context; not for linear and ntk
    low_frequency_factor: float = 1.0  # llama3: pairs with fewer turns in it are stretched whole
    high_frequency_factor: float = 4.0  # llama3: pairs with more turns in it are left alone
    beta_fast: float = 32.0  # yarn: pairs with more turns over original_length are left alone
    beta_slow: float = 1.0  # yarn: pairs with fewer turns are stretched whole
    truncate: bool = True  # yarn: round the two bounds between pairs to whole pairs
    # yarn, longrope: what queries and keys are multiplied by; None = 0.1·ln(factor) + 1 and
    # √(1 + ln(factor) / ln(original_length)), as the papers have it.
    attention_factor: float | None = None
    # longrope: what each pair is stretched by in rows up to original_length, and in longer ones.
    short_factors: tuple[float, ...] | None = None
    long_factors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.theta <= 1:
            raise UserError(f"rope.theta={self.theta} must be above 1.")
        if not 0 < self.fraction <= 1:
            raise UserError(f"rope.fraction={self.fraction} must lie in (0, 1].")
        if self.factor < 1:
            raise UserError(f"rope.factor={self.factor} must be at least 1.")
        if self.scaling == "none" and self.factor != 1:
            raise UserError(
                f"rope.factor={self.factor} has no effect with rope.scaling='none': "
                "name a scaling or set the factor to 1."
            )
        if self.scaling in ("dynamic", "yarn", "llama3", "longrope") and not self.original_length:
            raise UserError(
                f"rope.scaling={self.scaling!r} needs rope.original_length, the context length "
                "that the model was trained at before."
            )
        if self.scaling == "llama3" and self.high_frequency_factor <= self.low_frequency_factor:
            raise UserError("rope.high_frequency_factor must exceed rope.low_frequency_factor.")
        if self.scaling == "longrope" and not (self.short_factors and self.long_factors):
            raise UserError("rope.scaling='longrope' needs rope.short_factors and long_factors.")


def rotated_dim(config: RopeConfig, head_dim: int) -> int:
    """How many leading dimensions of a head are rotated; even."""
    return int(head_dim * config.fraction) // 2 * 2


def frequencies(config: RopeConfig, head_dim: int, lengths: jax.Array | int) -> jax.Array:
    """Angle per position of each rotated pair, float32 [batch or 1, rotated_dim // 2], in radians.

    Args:
      lengths: of the rows, int32 [batch] or one for all; only dynamic and longrope ask for them.

    Raises:
      UserError: longrope has not one factor for each pair.
    """
    dim = rotated_dim(config, head_dim)
    theta = config.theta
    if config.scaling == "ntk" and dim > 2:
        # The base grows so that the slowest pair is stretched by `factor`, the fastest not at all.
        theta *= config.factor ** (dim / (dim - 2))
    plain = theta ** -(np.arange(0, dim, 2) / max(dim, 1))
    if config.scaling == "dynamic":
        return _dynamic(config, plain, dim, lengths)
    if config.scaling == "longrope":
        return _longrope(config, plain, lengths)
    if config.scaling == "linear":
        plain = plain / config.factor
    elif config.scaling == "llama3":
        plain = _llama3(config, plain)
    elif config.scaling == "yarn":
        plain = _yarn(config, plain, dim)
    return jnp.asarray(plain, jnp.float32)[None]


def _dynamic(
    config: RopeConfig, plain: np.ndarray, dim: int, lengths: jax.Array | int
) -> jax.Array:
    """ntk with the factor that the current length asks for: none up to the original length."""
    assert config.original_length is not None
    stretch_B1 = jnp.asarray(lengths, jnp.float32).reshape(-1, 1) / config.original_length
    growth_B1 = jnp.maximum(config.factor * stretch_B1 - (config.factor - 1), 1)
    exponents = np.arange(0, dim, 2) / max(dim - 2, 1)
    return jnp.asarray(plain, jnp.float32) * growth_B1 ** jnp.asarray(-exponents, jnp.float32)


def _longrope(config: RopeConfig, plain: np.ndarray, lengths: jax.Array | int) -> jax.Array:
    short, long = (np.asarray(f or ()) for f in (config.short_factors, config.long_factors))
    if not len(short) == len(long) == len(plain):
        raise UserError(
            f"rope.short_factors has {len(short)} numbers and rope.long_factors {len(long)}; "
            f"{len(plain)} pairs of head dimensions are rotated: give one for each."
        )
    assert config.original_length is not None
    is_long_B1 = jnp.asarray(lengths).reshape(-1, 1) > config.original_length
    return jnp.where(
        is_long_B1, jnp.asarray(plain / long, jnp.float32), jnp.asarray(plain / short, jnp.float32)
    )


def _llama3(config: RopeConfig, plain: np.ndarray) -> np.ndarray:
    assert config.original_length is not None
    low, high = config.low_frequency_factor, config.high_frequency_factor
    turns = config.original_length * plain / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return plain * (keep + (1 - keep) / config.factor)


def _yarn(config: RopeConfig, plain: np.ndarray, dim: int) -> np.ndarray:
    assert config.original_length is not None

    def pair(turns: float) -> float:
        """The (fractional) pair that makes `turns` turns over the original length."""
        length = config.original_length or 0
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = pair(config.beta_fast), pair(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    stretch = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
    return plain * ((1 - stretch) + stretch / config.factor)


def amplitude(config: RopeConfig) -> float:
    """What queries and keys are both multiplied by: 1 but for yarn and longrope."""
    if config.scaling not in ("yarn", "longrope"):
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor
    if config.scaling == "yarn":
        return 0.1 * math.log(config.factor) + 1.0
    assert config.original_length is not None
    return math.sqrt(1 + math.log(config.factor) / math.log(config.original_length))


def rotary_tables(
    config: RopeConfig, head_dim: int, positions_BT: jax.Array, lengths: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    """Sine and cosine of every position's angles, two float32 [batch, time, rotated_dim // 2].

    `lengths` is that of `frequencies`.
    """
    frequencies_BR = frequencies(config, head_dim, lengths)
    angles_BTR = positions_BT.astype(jnp.float32)[..., None] * frequencies_BR[:, None]
    scale = amplitude(config)
    return jnp.sin(angles_BTR) * scale, jnp.cos(angles_BTR) * scale


def apply_rotary(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
    """Rotates x [..., head_dim]; sin and cos [..., rotated_dim // 2] broadcast against it.

    The turn is computed in float32 and returned in the dtype of x.
    """
    half = sin.shape[-1]
    rotated, rest = jnp.split(x, (2 * half,), axis=-1)
    pairs = rotated.astype(jnp.float32).reshape(*x.shape[:-1], 2, half)
    # The other half's sine comes with its sign, so that one pass makes both halves in place.
    signed_sin = jnp.stack([-sin, sin], axis=-2)
    turned = pairs * cos[..., None, :] + jnp.flip(pairs, axis=-2) * signed_sin
    turned = turned.reshape(rotated.shape).astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned

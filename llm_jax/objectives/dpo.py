"""Direct preference optimisation and its variants by name, on pairs and on unpaired answers.

Legend: B batch, K = 2 (chosen and rejected; for unpaired answers: the answer and a mismatched one).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp

from llm_jax.errors import UserError, did_you_mean
from llm_jax.models import LanguageModel
from llm_jax.objectives.logprobs import response_lengths, response_logprobs
from llm_jax.step import Objective
from llm_jax.types import Mean, PreferenceBatch

log_sigmoid, sigmoid = jax.nn.log_sigmoid, jax.nn.sigmoid


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Which preference loss, and its constants."""

    variant: str = "sigmoid"  # one of VARIANTS
    beta: float = 0.1  # strength of the pull to the reference; for simpo 2 to 2.5 is usual
    # The share of pairs that are labelled the wrong way round: sigmoid (then called cDPO), robust,
    # aot, aot_unpaired, and exo_pair, which needs some.
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5  # the margin by which SimPO's chosen reward should win
    discopop_temperature: float = 0.05
    desirable_weight: float = 1.0  # KTO: of answers labelled good
    undesirable_weight: float = 1.0  # KTO: of answers labelled bad
    # Weight of −log p(chosen) / length beside the loss (RPO, arXiv:2404.19733); ORPO has it built
    # in.
    sft_weight: float = 0.0
    # Log-probabilities under the reference: computed once and cached on disk, or in every step from
    # the same weights with the LoRA adapters off.
    reference: Literal["precomputed", "adapter_off"] = "precomputed"
    chunk: int | None = None  # positions of each row whose logits are held at once; None = all

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise UserError(
                f"config.loss.variant={self.variant!r} is unknown."
                f"{did_you_mean(self.variant, VARIANTS)}"
            )
        if not self.beta > 0:
            raise UserError(f"config.loss.beta={self.beta} must be positive.")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(
                f"config.loss.label_smoothing={self.label_smoothing} must be in [0, 0.5)."
            )
        takes_smoothing = self.variant in ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")
        if self.label_smoothing and not takes_smoothing:
            raise UserError(
                f"config.loss.label_smoothing has no meaning for variant {self.variant!r}: "
                "leave it at 0."
            )
        if self.variant == "exo_pair" and not self.label_smoothing:
            raise UserError(
                "config.loss.variant=exo_pair needs config.loss.label_smoothing, such as 0.001."
            )
        if not self.discopop_temperature > 0:
            raise UserError(
                f"config.loss.discopop_temperature={self.discopop_temperature} must be positive."
            )
        for name in ("desirable_weight", "undesirable_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"config.loss.{name}={getattr(self, name)} must not be negative.")
        if self.chunk is not None and self.chunk < 1:
            raise UserError(
                f"config.loss.chunk={self.chunk} must be positive; leave it out for no chunks."
            )
        if self.sft_weight < 0:
            raise UserError(f"config.loss.sft_weight={self.sft_weight} must not be negative.")
        has_it = self.variant == "orpo" or VARIANTS[self.variant].unpaired
        if self.sft_weight and has_it:
            raise UserError(
                f"config.loss.sft_weight has no meaning for variant {self.variant!r}: leave it "
                "at 0."
            )


@flax.struct.dataclass
class Pairs:
    """What the variants are made of; float32 [batch, 2], chosen first.

    policy: log-probabilities of the responses, summed over tokens. ratio: the same over those of
    the reference, or again `policy` where a variant has no reference. lengths: counted tokens.
    good: bool [batch], whether an unpaired answer is labelled good. valid: bool [batch], False for
    padding rows.
    """

    policy: jax.Array
    ratio: jax.Array
    lengths: jax.Array
    good: jax.Array
    valid: jax.Array

    @property
    def chosen(self) -> jax.Array:
        return self.ratio[:, 0]

    @property
    def rejected(self) -> jax.Array:
        return self.ratio[:, 1]

    @property
    def delta(self) -> jax.Array:
        return self.ratio[:, 0] - self.ratio[:, 1]

    @property
    def averaged(self) -> jax.Array:
        """The log-ratios for each token, [batch, 2]."""
        return self.ratio / jnp.maximum(self.lengths, 1)


@dataclasses.dataclass(frozen=True)
class Variant:
    """loss: `(config, pairs) → float32 [batch]`. whole_batch: rows are compared with one another,
    so a batch must not be cut into micro-batches."""

    loss: Callable[[LossConfig, Pairs], jax.Array]
    needs_reference: bool = True
    whole_batch: bool = False
    unpaired: bool = False


def make_objective(
    model: LanguageModel,
    config: LossConfig,
    reference_params: Callable[[Any], Any] | None = None,
) -> Objective:
    """(params, PreferenceBatch, rng) → (loss, metrics); the loss counts rows.

    Metrics: "rewards/chosen" and "rewards/rejected", β times the log-ratio of policy to reference
    (without a reference: β times the mean log-probability of a token); "rewards/margins", their
    difference; "rewards/accuracies", the share of pairs whose chosen reward is strictly higher;
    "logps/chosen" and "logps/rejected", the policy's summed log-probabilities. KTO has no pairs,
    so it has "kl" in place of margins and accuracies.

    Args:
      model: the policy and, for `reference="adapter_off"`, the reference.
      config: the variant.
      reference_params: `params → the reference's parameters`, for `reference="adapter_off"`; the
        batch's `reference_logprobs` are used otherwise.
    """
    variant = VARIANTS[config.variant]

    def objective(
        params: Any, batch: PreferenceBatch, rng: jax.Array | None
    ) -> tuple[Mean, dict[str, Mean]]:
        policy_BK = response_logprobs(model, params, batch.responses, chunk=config.chunk, rng=rng)
        reference_BK: Any = 0.0
        if variant.needs_reference and reference_params is not None:
            reference_BK = response_logprobs(
                model, reference_params(params), batch.responses, chunk=config.chunk
            )
        elif variant.needs_reference:
            assert batch.reference_logprobs is not None, "the source attaches reference_logprobs"
            reference_BK = batch.reference_logprobs
        return preference_loss(config, policy_BK, jax.lax.stop_gradient(reference_BK), batch)

    return objective


def preference_loss(
    config: LossConfig, policy_BK: jax.Array, reference_BK: jax.Array, batch: PreferenceBatch
) -> tuple[Mean, dict[str, Mean]]:
    """Loss and metrics of given log-probabilities, float32 [batch, 2]; see `make_objective`.

    `reference_BK` is 0 for variants without a reference.
    """
    variant = VARIANTS[config.variant]
    lengths_BK = response_lengths(batch.responses)
    pairs = Pairs(
        policy=policy_BK,
        ratio=policy_BK - reference_BK,
        lengths=lengths_BK,
        good=batch.scores[:, 0] > 0.5,
        valid=jnp.all(lengths_BK > 0, axis=1),
    )
    rewards_BK = config.beta * (pairs.ratio if variant.needs_reference else pairs.averaged)

    def mean(values_B: jax.Array, counted_B: jax.Array = pairs.valid) -> Mean:
        total = jnp.sum(jnp.where(counted_B, values_B, 0.0))
        return Mean(total, jnp.sum(counted_B).astype(jnp.float32))

    loss_B = variant.loss(config, pairs)
    if config.sft_weight:
        loss_B += config.sft_weight * _nats_per_token(pairs)
    if variant.unpaired:
        metrics = {"kl": mean(pairs.rejected)}
        columns = {
            "chosen": (0, pairs.valid & pairs.good),
            "rejected": (0, pairs.valid & ~pairs.good),
        }
    else:
        gap_B = rewards_BK[:, 0] - rewards_BK[:, 1]
        metrics = {
            "rewards/margins": mean(gap_B),
            "rewards/accuracies": mean((gap_B > 0).astype(jnp.float32)),
        }
        columns = {"chosen": (0, pairs.valid), "rejected": (1, pairs.valid)}
    for name, (column, counted_B) in columns.items():
        metrics[f"rewards/{name}"] = mean(rewards_BK[:, column], counted_B)
        metrics[f"logps/{name}"] = mean(policy_BK[:, column], counted_B)
    return mean(loss_B), jax.lax.stop_gradient(metrics)


# --- the variants: (config, pairs) → float32 [batch] ----------------------------------------------


def _smoothed(config: LossConfig, x: jax.Array) -> jax.Array:
    smoothing = config.label_smoothing
    return -(1 - smoothing) * log_sigmoid(x) - smoothing * log_sigmoid(-x)


def _sigmoid(config: LossConfig, pairs: Pairs) -> jax.Array:
    return _smoothed(config, config.beta * pairs.delta)


def _sigmoid_norm(config: LossConfig, pairs: Pairs) -> jax.Array:
    averaged = pairs.averaged
    return -log_sigmoid(config.beta * (averaged[:, 0] - averaged[:, 1]))


def _robust(config: LossConfig, pairs: Pairs) -> jax.Array:
    smoothing, x = config.label_smoothing, config.beta * pairs.delta
    clean, flipped = -(1 - smoothing) * log_sigmoid(x), -smoothing * log_sigmoid(-x)
    return (clean - flipped) / (1 - 2 * smoothing)


def _hinge(config: LossConfig, pairs: Pairs) -> jax.Array:
    return jnp.maximum(0.0, 1 - config.beta * pairs.delta)


def _ipo(config: LossConfig, pairs: Pairs) -> jax.Array:
    averaged = pairs.averaged
    return jnp.square(averaged[:, 0] - averaged[:, 1] - 1 / (2 * config.beta))


def _ipo_summed(config: LossConfig, pairs: Pairs) -> jax.Array:
    return jnp.square(pairs.delta - 1 / (2 * config.beta))


def _exo_pair(config: LossConfig, pairs: Pairs) -> jax.Array:
    x, smoothing = config.beta * pairs.delta, config.label_smoothing
    win = sigmoid(x) * (log_sigmoid(x) - math.log1p(-smoothing))
    return win + sigmoid(-x) * (log_sigmoid(-x) - math.log(smoothing))


def _nca_pair(config: LossConfig, pairs: Pairs) -> jax.Array:
    chosen, rejected = config.beta * pairs.chosen, config.beta * pairs.rejected
    return -log_sigmoid(chosen) - 0.5 * (log_sigmoid(-chosen) + log_sigmoid(-rejected))


def _bco_pair(config: LossConfig, pairs: Pairs) -> jax.Array:
    return -log_sigmoid(config.beta * pairs.chosen) - log_sigmoid(-config.beta * pairs.rejected)


def _sppo_hard(config: LossConfig, pairs: Pairs) -> jax.Array:
    half = 0.5 / config.beta
    return jnp.square(pairs.chosen - half) + jnp.square(pairs.rejected + half)


def _apo_zero(config: LossConfig, pairs: Pairs) -> jax.Array:
    return 1 - sigmoid(config.beta * pairs.chosen) + sigmoid(config.beta * pairs.rejected)


def _apo_down(config: LossConfig, pairs: Pairs) -> jax.Array:
    return sigmoid(config.beta * pairs.chosen) + 1 - sigmoid(config.beta * pairs.delta)


def _discopop(config: LossConfig, pairs: Pairs) -> jax.Array:
    x = config.beta * pairs.delta
    scaled = x / config.discopop_temperature
    # exp(−x) · share in one exponent: alone, exp(−x) overflows where the share is 0.
    return -log_sigmoid(x) * sigmoid(-scaled) + jnp.exp(log_sigmoid(scaled) - x)


def _aot(config: LossConfig, pairs: Pairs) -> jax.Array:
    reference = pairs.policy - pairs.ratio
    policy_gap = pairs.policy[:, 0] - pairs.policy[:, 1]
    reference_gap = reference[:, 0] - reference[:, 1]
    return _between_sorted(config, policy_gap, reference_gap, pairs.valid)


def _aot_unpaired(config: LossConfig, pairs: Pairs) -> jax.Array:
    return _between_sorted(config, pairs.chosen, pairs.rejected, pairs.valid)


def _between_sorted(
    config: LossConfig, upper_B: jax.Array, lower_B: jax.Array, valid_B: jax.Array
) -> jax.Array:
    """Compares quantiles of the batch; each lands in the row that its `upper` value came from."""
    upper_order = jnp.argsort(jnp.where(valid_B, upper_B, jnp.inf))
    lower_order = jnp.argsort(jnp.where(valid_B, lower_B, jnp.inf))
    losses = _smoothed(config, config.beta * (upper_B[upper_order] - lower_B[lower_order]))
    return jnp.zeros_like(losses).at[upper_order].set(losses)


def _simpo(config: LossConfig, pairs: Pairs) -> jax.Array:
    averaged = pairs.averaged
    gap = averaged[:, 0] - averaged[:, 1]
    return -log_sigmoid(config.beta * gap - config.simpo_gamma)


def _orpo(config: LossConfig, pairs: Pairs) -> jax.Array:
    """β weighs the odds ratio (λ in the paper); the odds are those of the mean token."""
    averaged = jnp.minimum(pairs.averaged, -1e-7)  # p = 1 has no odds
    log_odds = averaged - jnp.log(-jnp.expm1(averaged))
    return _nats_per_token(pairs) - config.beta * log_sigmoid(log_odds[:, 0] - log_odds[:, 1])


def _kto(config: LossConfig, pairs: Pairs) -> jax.Array:
    """The point of reference z0 is the mean log-ratio of answers to other prompts over the whole
    batch, at least 0; no gradient flows through it."""
    count = jnp.maximum(jnp.sum(pairs.valid), 1)
    kl = jnp.sum(jnp.where(pairs.valid, pairs.rejected, 0.0)) / count
    z0 = jax.lax.stop_gradient(jnp.maximum(kl, 0))
    good = config.desirable_weight * (1 - sigmoid(config.beta * (pairs.chosen - z0)))
    bad = config.undesirable_weight * (1 - sigmoid(config.beta * (z0 - pairs.chosen)))
    return jnp.where(pairs.good, good, bad)


def _nats_per_token(pairs: Pairs) -> jax.Array:
    """−log p of the chosen response for each of its tokens."""
    return -pairs.policy[:, 0] / jnp.maximum(pairs.lengths[:, 0], 1)


VARIANTS: dict[str, Variant] = {
    "sigmoid": Variant(_sigmoid),  # DPO, arXiv:2305.18290
    "sigmoid_norm": Variant(_sigmoid_norm),  # the log-ratios of a token, as in arXiv:2411.15124
    "robust": Variant(_robust),  # arXiv:2403.00409
    "hinge": Variant(_hinge),  # SLiC, arXiv:2309.06657
    "ipo": Variant(_ipo),  # arXiv:2310.12036 with log-ratios averaged over tokens
    "ipo_summed": Variant(_ipo_summed),  # the same as printed
    "exo_pair": Variant(_exo_pair),  # arXiv:2402.00856, eq. 16
    "nca_pair": Variant(_nca_pair),  # arXiv:2402.05369
    "bco_pair": Variant(_bco_pair),  # arXiv:2404.04656, without its running shift
    "sppo_hard": Variant(_sppo_hard),  # arXiv:2405.00675
    "apo_zero": Variant(_apo_zero),  # arXiv:2408.06266, eq. 7
    "apo_down": Variant(_apo_down),  # arXiv:2408.06266, eq. 8
    "discopop": Variant(_discopop),  # arXiv:2406.08414, eq. 5
    "aot": Variant(_aot, whole_batch=True),  # arXiv:2406.05882
    "aot_unpaired": Variant(_aot_unpaired, whole_batch=True),  # arXiv:2406.05882
    "simpo": Variant(_simpo, needs_reference=False),  # arXiv:2405.14734
    "orpo": Variant(_orpo, needs_reference=False),  # arXiv:2403.07691
    "kto": Variant(_kto, whole_batch=True, unpaired=True),  # arXiv:2402.01306, eq. 7 and 8
}

"""The preference losses against values worked out by hand."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.models import LanguageModel, LoraConfig, ModelConfig
from llm_jax.models.lora import init_adapters, join, split
from llm_jax.objectives.dpo import VARIANTS, LossConfig, make_objective, preference_loss
from llm_jax.objectives.logprobs import response_logprobs
from llm_jax.sharding import unbox
from llm_jax.types import Batch, PreferenceBatch

TIME = 12
SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")
PAIRED = [name for name, variant in VARIANTS.items() if not variant.unpaired]


def config_of(variant, **changes):
    smoothing = {"label_smoothing": 0.1} if variant == "exo_pair" else {}
    return LossConfig(**{"variant": variant, **smoothing, **changes})


def make_batch(lengths, good=None):
    """Comparisons whose answers have so many tokens, after prompts of two; 0: a padding row."""
    lengths = np.asarray(lengths)
    place = np.arange(TIME)
    ends = np.where(lengths > 0, lengths + 2, 0)[..., None]
    weights = (place >= 1) & (place < ends - 1)
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 32, (*lengths.shape, TIME + 1)).astype(np.int32)
    scores = np.zeros(lengths.shape, np.float32)
    scores[:, 0] = 1 if good is None else good
    return PreferenceBatch(
        responses=Batch(
            tokens=tokens[..., :-1],
            targets=tokens[..., 1:],
            loss_weights=weights.astype(np.float32),
            segment_ids=(place < ends).astype(np.int32),
            positions=(place * (place < ends)).astype(np.int32),
        ),
        scores=scores,
        margins=np.zeros(len(lengths), np.float32),
        reference_logprobs=None,
    )


def evaluate(config, policy, reference, batch):
    """The loss of each row on average, its gradient by the policy, and the metrics' values."""
    if not VARIANTS[config.variant].needs_reference:
        reference = 0.0

    def value(policy):
        loss, metrics = preference_loss(config, policy, reference, batch)
        return loss.value(), {name: metric.value() for name, metric in metrics.items()}

    policy = jnp.asarray(policy, jnp.float32)
    (loss, metrics), gradient = jax.value_and_grad(value, has_aux=True)(policy)
    return float(loss), gradient, {name: float(value) for name, value in metrics.items()}


def random_logprobs(rows, seed=0):
    """Of policy and reference: float32 [rows, 2] each."""
    drawn = np.random.default_rng(seed).normal(-12, 4, (2, rows, 2))
    return np.minimum(drawn, -1).astype(np.float32)


def softplus(x):
    return math.log1p(math.exp(x))


def logistic(x):
    return 1 / (1 + math.exp(-x))


# --- the closed forms -----------------------------------------------------------------------------

BETA = 0.25
POLICY, REFERENCE, LENGTHS = [[-3.0, -5.0]], [[-4.0, -4.5]], [[2, 4]]
# The log-ratios are 1 and -0.5, so Δ = 1.5; averaged over tokens they are 0.5 and -0.125.
X, CHOSEN, REJECTED = BETA * 1.5, BETA * 1.0, BETA * -0.5
BY_HAND = {
    "sigmoid": ({}, softplus(-X)),
    "cdpo": (
        {"variant": "sigmoid", "label_smoothing": 0.2},
        0.8 * softplus(-X) + 0.2 * softplus(X),
    ),
    "robust": ({"label_smoothing": 0.2}, (0.8 * softplus(-X) - 0.2 * softplus(X)) / 0.6),
    "sigmoid_norm": ({}, softplus(-BETA * 0.625)),
    "hinge": ({}, 0.625),
    "ipo": ({}, (0.625 - 2) ** 2),
    "ipo_summed": ({}, (1.5 - 2) ** 2),
    "exo_pair": (
        {"label_smoothing": 0.2},
        logistic(X) * math.log(logistic(X) / 0.8) + logistic(-X) * math.log(logistic(-X) / 0.2),
    ),
    "nca_pair": ({}, softplus(-CHOSEN) + 0.5 * softplus(CHOSEN) + 0.5 * softplus(REJECTED)),
    "bco_pair": ({}, softplus(-CHOSEN) + softplus(REJECTED)),
    "sppo_hard": ({}, (1 - 2) ** 2 + (-0.5 + 2) ** 2),
    "apo_zero": ({}, logistic(-CHOSEN) + logistic(REJECTED)),
    "apo_down": ({}, logistic(CHOSEN) + logistic(-X)),
    "discopop": (
        {"discopop_temperature": 0.5},
        softplus(-X) * logistic(-2 * X) + math.exp(-X) * logistic(2 * X),
    ),
    "aot": ({"label_smoothing": 0.2}, 0.8 * softplus(-X) + 0.2 * softplus(X)),
    "aot_unpaired": ({}, softplus(-X)),
    "simpo": ({"simpo_gamma": 0.75}, softplus(-(BETA * (-1.5 + 1.25) - 0.75))),
    # odds p / (1 - p) = 1 / (1/p - 1) of the mean tokens, whose log-probabilities are -1.5, -1.25.
    "orpo": ({}, 1.5 + BETA * math.log1p((math.exp(1.5) - 1) / (math.exp(1.25) - 1))),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_every_variant_by_hand(name):
    changes, expected = BY_HAND[name]
    config = LossConfig(**{"variant": name, "beta": BETA, **changes})
    loss, _, _ = evaluate(config, POLICY, np.float32(REFERENCE), make_batch(LENGTHS))
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_every_variant_has_a_closed_form_here():
    assert {*BY_HAND, "kto"} - {"cdpo"} == VARIANTS.keys()


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("variant", ["sigmoid", "aot", "aot_unpaired"])
def test_at_the_reference_the_loss_is_ln_2_and_pulls_by_half_of_beta(variant, beta):
    policy, _ = random_logprobs(3)
    config = LossConfig(variant, beta=beta)
    loss, gradient, metrics = evaluate(config, policy, policy, make_batch([[3, 5]] * 3))
    assert loss == pytest.approx(math.log(2))
    assert metrics["rewards/margins"] == metrics["rewards/accuracies"] == 0
    np.testing.assert_allclose(3 * gradient, [[-beta / 2, beta / 2]] * 3, rtol=1e-5)


def test_aot_compares_quantiles_and_not_pairs():
    policy = np.float32([[-1, -4], [-2, -3], [-5, -3]])  # gaps 3, 1, -2
    reference = np.float32([[-3, -3], [-1, -5], [-2, -3]])  # gaps 0, 4, 1
    batch = make_batch([[2, 2]] * 3)
    sorted_gaps = [-2 - 0, 1 - 1, 3 - 4]
    loss, _, _ = evaluate(LossConfig("aot", beta=0.5), policy, reference, batch)
    assert loss == pytest.approx(np.mean([softplus(-0.5 * gap) for gap in sorted_gaps]))
    # Log-ratios: chosen 2, -1, -3; rejected -1, 2, 0.
    sorted_gaps = [-3 + 1, -1 - 0, 2 - 2]
    loss, _, _ = evaluate(LossConfig("aot_unpaired", beta=0.5), policy, reference, batch)
    assert loss == pytest.approx(np.mean([softplus(-0.5 * gap) for gap in sorted_gaps]))


@pytest.mark.parametrize("variant", ["sigmoid", "simpo"])
def test_sft_adds_the_nats_of_a_chosen_token(variant):
    policy, reference = random_logprobs(2)
    batch = make_batch([[4, 1], [2, 9]])
    plain, _, _ = evaluate(LossConfig(variant), policy, reference, batch)
    both, gradient, _ = evaluate(LossConfig(variant, sft_weight=0.5), policy, reference, batch)
    nats = (-policy[0, 0] / 4 - policy[1, 0] / 2) / 2
    assert both == pytest.approx(plain + 0.5 * float(nats), rel=1e-5)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("variant", PAIRED)
@pytest.mark.parametrize("gap", [-2000.0, 2000.0])
def test_far_from_the_reference_nothing_overflows(variant, gap):
    policy = np.float32([[-2001.0, -2001.0]]) + np.maximum([[gap, -gap]], 0).astype(np.float32)
    reference = np.full((1, 2), -2001, np.float32)
    loss, gradient, _ = evaluate(config_of(variant), policy, reference, make_batch([[2, 2]]))
    assert np.isfinite(loss) and np.all(np.isfinite(gradient))


# --- metrics --------------------------------------------------------------------------------------


def test_metrics_of_pairs():
    policy = np.float32([[-2, -5], [-4, -3], [-1, -1]])
    reference = np.float32([[-3, -4], [-3, -2], [-2, -4]])
    _, _, metrics = evaluate(LossConfig(beta=0.5), policy, reference, make_batch([[2, 3]] * 3))
    # Log-ratios: chosen 1, -1, 1; rejected -1, -1, 3: won, tied, lost.
    assert metrics == pytest.approx(
        {
            "rewards/chosen": 0.5 / 3,
            "rewards/rejected": 0.5 / 3,
            "rewards/margins": 0,
            "rewards/accuracies": 1 / 3,
            "logps/chosen": -7 / 3,
            "logps/rejected": -3,
        },
        abs=1e-6,
    )


def test_rewards_without_a_reference_are_those_of_the_mean_token():
    _, _, metrics = evaluate(
        LossConfig("simpo", beta=2.0), np.float32([[-6, -3]]), 0.0, make_batch([[4, 1]])
    )
    assert (metrics["rewards/chosen"], metrics["rewards/rejected"]) == (-3, -6)
    assert metrics["rewards/accuracies"] == 1
    assert metrics["logps/chosen"] == -6


def test_metrics_pass_no_gradient():
    policy, reference = (jnp.asarray(x) for x in random_logprobs(2))
    batch = make_batch([[3, 5]] * 2)

    def margin(policy):
        return preference_loss(LossConfig(), policy, reference, batch)[1]["rewards/margins"].total

    assert not np.any(jax.grad(margin)(policy))


# --- KTO ------------------------------------------------------------------------------------------


def kto(ratios, good, mismatched, **changes):
    """Answers and mismatched answers with these log-ratios."""
    ratios = np.stack([ratios, mismatched], axis=1).astype(np.float32)
    config = LossConfig("kto", **{"beta": 0.5, **changes})
    reference = np.full_like(ratios, -9)
    return evaluate(config, ratios - 9, reference, make_batch([[3, 5]] * len(ratios), good))


@pytest.mark.parametrize("mismatched, z0", [([1.0, 3.0], 2.0), ([1.0, -3.0], 0.0)])
def test_kto_measures_from_the_divergence_which_is_not_negative(mismatched, z0):
    loss, gradient, metrics = kto([1.5, -0.5], [1, 0], mismatched)
    good, bad = logistic(-0.5 * (1.5 - z0)), logistic(-0.5 * (z0 + 0.5))
    assert loss == pytest.approx((good + bad) / 2, rel=1e-5)
    assert metrics["kl"] == pytest.approx(np.mean(mismatched))
    assert not np.any(gradient[:, 1]), "no gradient flows through the divergence"
    slopes = [-0.25 * good * (1 - good), 0.25 * bad * (1 - bad)]
    np.testing.assert_allclose(gradient[:, 0], slopes, rtol=1e-4)


def test_kto_weighs_good_and_bad_answers():
    ratios, good, mismatched = [1.0, 0.5, -1.0], [1, 0, 1], [0.0, 1.0, 2.0]
    loss, _, metrics = kto(ratios, good, mismatched, desirable_weight=3.0, undesirable_weight=0.25)
    parts = 3 * logistic(0), 0.25 * logistic(-0.5 * (1 - 0.5)), 3 * logistic(-0.5 * (-1 - 1))
    assert loss == pytest.approx(sum(parts) / 3, rel=1e-5)
    assert metrics == pytest.approx(
        {
            "kl": 1, "rewards/chosen": 0, "rewards/rejected": 0.25, "logps/chosen": -9,
            "logps/rejected": -8.5,
        }
    )  # fmt: skip


def test_kto_estimates_the_divergence_without_padding_rows():
    policy = np.float32([[-8, -6], [0, 0]])
    reference = np.float32([[-9, -9], [0, 0]])
    batch = make_batch([[3, 5], [0, 0]], good=[1, 0])
    loss, _, metrics = evaluate(LossConfig("kto", beta=0.5), policy, reference, batch)
    assert metrics["kl"] == 3
    assert loss == pytest.approx(logistic(-0.5 * (1 - 3)))


# --- padding and micro-batches --------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant, sft_weight", [*((name, 0.0) for name in VARIANTS), ("sigmoid", 0.5), ("aot", 0.5)]
)
def test_padding_rows_count_nothing(variant, sft_weight):
    config = config_of(variant, sft_weight=sft_weight)
    policy, reference = random_logprobs(3)
    lengths, good = np.array([[3, 5], [1, 1], [9, 2]]), [1, 0, 1]
    loss, gradient, metrics = evaluate(config, policy, reference, make_batch(lengths, good))
    rows = [0, 3, 1, 2, 4]  # of which 3 and 4 are padding

    def spread(x):
        return np.concatenate([x, np.zeros((2, 2), x.dtype)])[rows]

    padded = make_batch(spread(lengths), np.array([*good, 0, 0])[rows])
    own, own_gradient, own_metrics = evaluate(config, spread(policy), spread(reference), padded)
    assert own == pytest.approx(loss, rel=1e-6)
    assert own_metrics == pytest.approx(metrics, rel=1e-6, abs=1e-6)
    np.testing.assert_allclose(own_gradient, spread(np.asarray(gradient)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_of_padding_has_no_loss_and_no_gradient(variant):
    zeros = np.zeros((2, 2), np.float32)
    loss, gradient, metrics = evaluate(
        config_of(variant), zeros, zeros, make_batch([[0, 0]] * 2, good=[0, 0])
    )
    assert loss == 0 and not np.any(gradient)  # NaN would be "any"
    assert set(metrics.values()) == {0}


@pytest.mark.parametrize("variant", VARIANTS)
def test_micro_batches_sum_to_the_batch_where_rows_stand_alone(variant):
    config, batch = config_of(variant), make_batch([[3, 5], [1, 1], [9, 2], [4, 4]])
    policy, reference = random_logprobs(4, seed=1)
    if not VARIANTS[variant].needs_reference:
        reference = np.zeros_like(reference)

    def loss_of(rows):
        part = jax.tree.map(lambda x: x[rows], batch)
        return preference_loss(config, jnp.asarray(policy[rows]), reference[rows], part)[0]

    whole, parts = loss_of(slice(None)), loss_of(slice(0, 2)) + loss_of(slice(2, 4))
    assert float(whole.count) == float(parts.count) == 4
    same = float(whole.total) == pytest.approx(float(parts.total), rel=1e-5)
    assert same != VARIANTS[variant].whole_batch


# --- the objective on a model ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted():
    """A model with adapters, its base and its adapters."""
    config = ModelConfig(
        vocab_size=32, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16,
        lora=LoraConfig(rank=2, targets=("query", "down")),
    )  # fmt: skip
    model = LanguageModel(config)
    base = jax.tree.map(lambda x: 3 * x, unbox(jax.jit(model.init)(jax.random.key(2))))
    adapters = unbox(init_adapters(jax.random.key(1), config, base))
    return model, base, jax.tree.map(lambda x: x + 0.3, adapters)


def value_and_gradient(model, base, adapters, batch, reference_params=None):
    objective = make_objective(model, LossConfig(beta=0.5), reference_params)

    def value(adapters):
        loss, metrics = objective(join(base, adapters), batch, None)
        return loss.value(), metrics["rewards/margins"].value()

    return jax.jit(jax.value_and_grad(value, has_aux=True))(adapters)


def test_the_reference_with_adapters_off_is_the_precomputed_one(adapted):
    model, base, adapters = adapted
    batch = make_batch([[3, 5], [0, 0], [7, 2]])
    online = value_and_gradient(model, base, adapters, batch, lambda params: split(params)[1])
    reference = jax.jit(functools.partial(response_logprobs, model))(base, batch.responses)
    precomputed = value_and_gradient(
        model, base, adapters, batch.replace(reference_logprobs=reference)
    )
    assert abs(float(online[0][1])) > 0.01, "policy and reference differ"
    for actual, expected in zip(*map(jax.tree.leaves, (online, precomputed)), strict=True):
        assert np.all(np.isfinite(actual)) and np.any(expected)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)


def test_the_reference_gets_no_gradient(adapted):
    model, base, _ = adapted
    batch = make_batch([[3, 5], [7, 2]])
    objective = make_objective(model, LossConfig(beta=0.5), lambda params: params)
    value = jax.jit(jax.value_and_grad(lambda params: objective(params, batch, None)[0].value()))
    loss, gradient = value(base)
    assert float(loss) == pytest.approx(math.log(2))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


# --- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"variant": "sigmoyd"}, "sigmoyd.*sigmoid"),
        ({"beta": 0.0}, "beta=0.0 must be positive"),
        ({"beta": -0.1}, "beta=-0.1 must be positive"),
        ({"beta": math.nan}, "beta=nan must be positive"),
        ({"label_smoothing": 0.5}, r"label_smoothing=0.5 must be in \[0, 0.5\)"),
        ({"label_smoothing": -0.1}, r"label_smoothing=-0.1 must be in \[0, 0.5\)"),
        ({"variant": "exo_pair"}, "exo_pair needs config.loss.label_smoothing"),
        ({"variant": "discopop", "discopop_temperature": 0.0}, "discopop_temperature=0.0 must be"),
        ({"variant": "kto", "desirable_weight": -1.0}, "desirable_weight=-1.0 must not"),
        ({"variant": "kto", "undesirable_weight": -1.0}, "undesirable_weight=-1.0 must not"),
        ({"chunk": 0}, "chunk=0 must be positive"),
        ({"sft_weight": -1.0}, "sft_weight=-1.0 must not be negative"),
        ({"variant": "kto", "sft_weight": 1.0}, "sft_weight has no meaning for variant 'kto'"),
    ],
)
def test_senseless_configs_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        LossConfig(**changes)


@pytest.mark.parametrize("variant", VARIANTS)
def test_label_smoothing_only_where_it_means_something(variant):
    if variant in SMOOTHED:
        assert LossConfig(variant, label_smoothing=0.1).label_smoothing == 0.1
    else:
        with pytest.raises(UserError, match=f"no meaning for variant '{variant}'"):
            LossConfig(variant, label_smoothing=0.1)

"""Preference learning, reward models and SFT against TRL: tests/golden/make_preferences.py."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.models.heads import REWARD, rewards
from llm_jax.objectives import dpo, lm, reward
from llm_jax.objectives.logprobs import response_logprobs
from llm_jax.types import Batch, PreferenceBatch
from tests.golden.llama import llama_params

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "preferences.npz"))
MODEL = LanguageModel(
    ModelConfig(
        vocab_size=64, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=48,
        tie_embeddings=False,
    )
)  # fmt: skip
PADDING = 3  # columns more than TRL pads to
TOLERANCE = 1e-4
VARIANTS = {
    "sigmoid": {},
    "sigmoid_smoothed": {"variant": "sigmoid", "label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.1},
    "hinge": {},
    "ipo": {},
    "ipo_summed": {},
    "exo_pair": {"label_smoothing": 0.1},
    "nca_pair": {},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {"label_smoothing": 0.1},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_temperature": 0.5},
    "sigmoid_norm": {},
    "simpo": {"beta": 2.0, "simpo_gamma": 0.5},
}


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def under(folder):
    return {n.removeprefix(folder): x for n, x in GOLDEN.items() if n.startswith(folder)}


@functools.cache
def params_of(name):
    return llama_params(under(f"{name}/"), MODEL.config)


@jax.jit
def logprobs_of(params, responses):
    return response_logprobs(MODEL, params, responses)


@jax.jit
def gradient_norm_of(params, responses, logprob_gradient):
    _, pull = jax.vjp(lambda params: response_logprobs(MODEL, params, responses), params)
    return optax.tree.norm(pull(logprob_gradient))


def rows_of(prefix):
    """TRL's batch, in which masks mark tokens, as ours, in which weights mark targets."""
    tokens, real, completion = (
        np.pad(GOLDEN[prefix + name], ((0, 0), (0, PADDING + 1)))
        for name in ("input_ids", "attention_mask", "completion_mask")
    )
    positions = np.arange(tokens.shape[1] - 1) * real[:, :-1]
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_weights=completion[:, 1:].astype(np.float32),
        segment_ids=real[:, :-1],
        positions=positions.astype(np.int32),
    )


def comparisons(first, second, scores):
    """A PreferenceBatch of two sequences a row, with log-probabilities under the reference."""
    width = max(first.tokens.shape[1], second.tokens.shape[1])

    def both(a, b):
        a, b = (np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in (a, b))
        return np.stack([a, b], axis=1)

    responses = jax.tree.map(both, first, second)
    return PreferenceBatch(
        responses=responses,
        scores=np.asarray(scores, np.float32),
        margins=np.zeros(len(scores), np.float32),
        reference_logprobs=logprobs_of(params_of("reference"), responses),
    )


def make_pairs():
    rows = rows_of("pairs/")
    chosen, rejected = (
        jax.tree.map(lambda x, part=part: np.split(x, 2)[part], rows) for part in (0, 1)
    )
    return comparisons(chosen, rejected, [(1, 0)] * 6)


def make_unpaired():
    scores = [(good, 0) for good in GOLDEN["unpaired/label"]]
    return comparisons(rows_of("unpaired/"), rows_of("unpaired/KL_"), scores)


def evaluate(config, batch, name="policy"):
    """The mean loss, the norm of its gradient by the weights, and the mean metrics."""
    params = params_of(name)
    needs_reference = dpo.VARIANTS[config.variant].needs_reference
    reference = batch.reference_logprobs if needs_reference else 0.0

    def value(policy):
        loss, metrics = dpo.preference_loss(config, policy, reference, batch)
        return loss.value(), {name: metric.value() for name, metric in metrics.items()}

    policy = logprobs_of(params, batch.responses)
    (loss, metrics), gradient = jax.value_and_grad(value, has_aux=True)(policy)
    return loss, gradient_norm_of(params, batch.responses, gradient), metrics


def assert_golden(actual, name):
    np.testing.assert_allclose(actual, GOLDEN[name], rtol=0, atol=TOLERANCE, err_msg=name)


# --- language-model losses ------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 4])
def test_sft_averages_over_the_completion_tokens_of_the_batch(chunk):
    chosen = jax.tree.map(lambda x: x[:6], rows_of("pairs/"))
    objective = lm.make_objective(MODEL, lm.LossConfig(chunk=chunk))
    assert_golden(objective(params_of("policy"), chosen, None)[0].value(), "loss/sft")


@pytest.mark.parametrize("name", ["policy", "reference"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_log_probabilities_of_sequences(name, chunk):
    logprobs = response_logprobs(MODEL, params_of(name), rows_of("pairs/"), chunk=chunk)
    assert_golden(logprobs, f"logps/{name}")


# --- preference losses ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_on_pairs_and_their_gradients(name):
    config = dpo.LossConfig(**{"variant": name, "beta": 0.3, **VARIANTS[name]})
    loss, norm, _ = evaluate(config, make_pairs())
    assert_golden(loss, f"loss/{name}")
    if f"gradient_norm/{name}" in GOLDEN:
        assert float(norm) == pytest.approx(float(GOLDEN[f"gradient_norm/{name}"]), rel=TOLERANCE)


def test_orpo_is_the_odds_ratio_of_trl_and_the_nats_of_chosen_completions():
    config = dpo.LossConfig(variant="orpo", beta=0.3)
    loss, _, _ = evaluate(config, make_pairs())
    parts = GOLDEN["loss/orpo_nats"], GOLDEN["loss/orpo_odds_ratio"]
    np.testing.assert_allclose(loss, sum(parts), atol=TOLERANCE)


def test_kto_with_its_divergence_from_mismatched_completions():
    config = dpo.LossConfig("kto", beta=0.3, desirable_weight=0.75, undesirable_weight=1.5)
    batch = make_unpaired()
    loss, norm, metrics = evaluate(config, batch)
    assert_golden(loss, "loss/kto")
    assert_golden(metrics["kl"], "metrics/kl")
    assert float(norm) == pytest.approx(float(GOLDEN["gradient_norm/kto"]), rel=TOLERANCE)
    swapped = batch.replace(reference_logprobs=logprobs_of(params_of("policy"), batch.responses))
    loss, _, metrics = evaluate(config, swapped, name="reference")
    assert_golden(loss, "loss/kto_swapped")
    assert metrics["kl"] < -0.1


@pytest.mark.parametrize("name", ["sigmoid", "simpo"])
def test_the_objective_from_weights_to_gradient(name):
    config = dpo.LossConfig(**{"variant": name, "beta": 0.3, **VARIANTS[name]})
    objective, batch = dpo.make_objective(MODEL, config), make_pairs()
    value = jax.jit(jax.value_and_grad(lambda params: objective(params, batch, None)[0].value()))
    loss, gradient = value(params_of("policy"))
    assert_golden(loss, f"loss/{name}")
    norm = float(optax.tree.norm(gradient))
    assert norm == pytest.approx(float(GOLDEN[f"gradient_norm/{name}"]), rel=TOLERANCE)


def test_metrics_of_pairs():
    _, _, metrics = evaluate(dpo.LossConfig(beta=0.3), make_pairs())
    assert metrics.keys() == under("metrics/").keys() - {"kl"}
    for name, value in metrics.items():
        assert_golden(value, f"metrics/{name}")


# --- reward models --------------------------------------------------------------------------------


def reward_params():
    return {**params_of("policy"), REWARD: {"kernel": jnp.asarray(GOLDEN["score.weight"].T)}}


def test_rewards_are_read_where_transformers_reads_them():
    assert_golden(rewards(MODEL, reward_params(), rows_of("pairs/")), "rewards")


@pytest.mark.parametrize(
    "name, centring, margins",
    [
        ("reward", 0.0, np.zeros(6, np.float32)),
        ("reward_margins", 0.0, GOLDEN["margins"]),
        ("reward_centring", 0.01, np.zeros(6, np.float32)),
    ],
)
def test_reward_losses(name, centring, margins):
    objective = reward.make_objective(MODEL, reward.LossConfig(centring=centring))
    batch = make_pairs().replace(margins=margins)
    loss, _ = objective(reward_params(), batch, None)
    assert_golden(loss.value(), f"loss/{name}")

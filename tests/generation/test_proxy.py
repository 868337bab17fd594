import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import sharding
from llm_jax.data.tokenizer_base import ByteTokenizer
from llm_jax.errors import UserError
from llm_jax.generation.continuous import generate_many
from llm_jax.generation.generate import generate, generate_texts, stream
from llm_jax.generation.proxy import Part, proxy_tuned, weighted
from llm_jax.generation.sampler import SamplerConfig
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.models import LanguageModel, ModelConfig

BASE = ModelConfig(
    vocab_size=64, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=24,
    window=3, attention_pattern=("local", "global"), max_length=40,
)  # fmt: skip
# Learned positions, stacked layers, and an embedding padded to a rounder size.
SMALL = ModelConfig(
    vocab_size=80, embed_dim=8, num_layers=2, num_heads=2, mlp_dim=12, position="learned",
    scan_layers=True, tie_embeddings=False, max_length=36,
)  # fmt: skip
GREEDY = SamplerConfig(temperature=0)
RANDOM = SamplerConfig(temperature=1.5, top_k=20, top_p=0.9, min_p=0.01)
PENALIZED = SamplerConfig(temperature=1.2, repetition_penalty=1.4)
PROMPTS = [[3, 14, 15, 9, 26, 5, 35, 8, 9], [7], [27, 18, 28, 18, 2]]
NEW = 10
LENGTH = 24  # of the reference's rows


def make_part(config, seed):
    model = LanguageModel(config)
    rng = np.random.default_rng(seed)
    shapes = sharding.unbox(jax.eval_shape(model.init, jax.random.key(0)))
    return Part(model, jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype("f4"), shapes))


@functools.cache
def parts():
    """Base, expert and anti-expert: two architectures, three sets of weights."""
    return make_part(BASE, 0), make_part(SMALL, 1), make_part(SMALL, 2)


def run(model, params, prompts=PROMPTS, sampler=RANDOM, **settings):
    settings = {"max_new_tokens": NEW, "rng": jax.random.key(7)} | settings
    return generate(model, params, prompts, sampler=sampler, **settings)


def alone(part, **settings):
    return run(part.model, part.params, **settings)


@functools.partial(jax.jit, static_argnums=0)
def whole_rows(model, params, tokens):
    return model.logits(params, model.apply(params, tokens)[0])


def full_logits(part, tokens):
    """Float32 [len(tokens), 64]: one row in one forward pass without a cache."""
    padded = jnp.asarray([[*tokens, *[0] * (LENGTH - len(tokens))]])
    return np.asarray(whole_rows(part.model, part.params, padded))[0, : len(tokens), :64]


def assert_same(made, expected, atol=0.0):
    np.testing.assert_array_equal(made.tokens, expected.tokens)
    np.testing.assert_array_equal(made.lengths, expected.lengths)
    np.testing.assert_allclose(made.logprobs, expected.logprobs, rtol=0, atol=atol)


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("sampler", [GREEDY, RANDOM, PENALIZED])
def test_without_strength_it_is_the_base_bit_for_bit(sampler):
    assert_same(
        run(*proxy_tuned(*parts(), 0.0), sampler=sampler), alone(parts()[0], sampler=sampler)
    )


@pytest.mark.usefixtures("optimised")
def test_an_expert_that_is_its_own_anti_expert_changes_nothing():
    base, expert, _ = parts()
    assert_same(run(*proxy_tuned(base, expert, expert, 1.7)), alone(base))
    twin = dataclasses.replace(expert)  # the same weights, not known to be: run twice, rounded
    assert_same(run(*proxy_tuned(base, expert, twin, 1.7)), alone(base), atol=2e-5)


def test_a_base_that_is_the_anti_expert_leaves_the_expert():
    _, base, expert = parts()
    assert_same(run(*proxy_tuned(base, expert, base, 1.0)), alone(expert))
    twin = dataclasses.replace(base)
    assert_same(run(*proxy_tuned(base, expert, twin, 1.0)), alone(expert), atol=2e-5)


@pytest.mark.parametrize("sampler", [GREEDY, RANDOM, PENALIZED])
def test_logprobs_are_those_of_the_sum_of_full_forward_passes(sampler):
    made = run(*proxy_tuned(*parts(), 0.8), sampler=sampler)
    for row, prompt in enumerate(PROMPTS):
        tokens = made.tokens[row]
        base, expert, anti = (full_logits(part, [*prompt, *tokens]) for part in parts())
        logits = (base + 0.8 * (expert - anti))[len(prompt) - 1 : -1] / (sampler.temperature or 1)
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        np.testing.assert_allclose(made.logprobs[row], logprobs[np.arange(NEW), tokens], atol=3e-5)
        if sampler == GREEDY:
            assert tokens.tolist() == logits.argmax(axis=-1).tolist()
    assert (made.tokens != alone(parts()[0], sampler=sampler).tokens).any()


def test_either_side_may_be_left_out():
    base, expert, anti = parts()
    for made, terms in [
        (proxy_tuned(base, expert, None, 0.5), [(1, base), (0.5, expert)]),
        (proxy_tuned(base, None, anti, 0.5), [(1, base), (-0.5, anti)]),
    ]:
        tokens = run(*made, PROMPTS[:1], GREEDY).tokens[0].tolist()
        logits = sum(w * full_logits(part, [*PROMPTS[0], *tokens]) for w, part in terms)
        assert tokens == logits[len(PROMPTS[0]) - 1 : -1].argmax(axis=-1).tolist()


def test_a_ragged_batch_equals_each_prompt_alone():
    model, params = proxy_tuned(*parts())
    rng = jax.random.split(jax.random.key(5), 3)
    together = run(model, params, rng=rng)
    for row, prompt in enumerate(PROMPTS):
        made = run(model, params, [prompt], rng=rng[row : row + 1])
        assert together.tokens[row].tolist() == made.tokens[0].tolist()
        np.testing.assert_allclose(together.logprobs[row], made.logprobs[0], atol=2e-5)


def test_rows_take_the_places_of_those_that_have_ended():
    model, params = proxy_tuned(*parts())
    stops = tuple(range(0, 64, 8))
    rows = [prompt for prompt in PROMPTS for _ in range(3)]
    expected = run(model, params, rows, stop_ids=stops)
    assert len(set(expected.lengths.tolist())) > 2
    made = generate_many(
        model, params, PROMPTS, samples=3, max_new_tokens=NEW, sampler=RANDOM,
        rng=jax.random.key(7), stop_ids=stops, slots=2,
    )  # fmt: skip
    assert_same(made, expected, atol=2e-5)


def test_a_mesh_changes_nothing():
    model, params = proxy_tuned(*parts())
    mesh = make_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        spread = [
            jax.device_put(
                part.params,
                sharding.parameter_shardings(
                    mesh, jax.eval_shape(part.model.init, jax.random.key(0))
                ),
            )
            for part in parts()
        ]
        made = run(model, dataclasses.replace(params, parts=tuple(spread)), sampler=GREEDY)
    assert_same(made, run(model, params, sampler=GREEDY), atol=1e-4)


def test_a_text_that_is_streamed_is_the_same():
    model, params = weighted([(0.5, make_byte_part(0)), (0.5, make_byte_part(1))])
    settings = {"max_new_tokens": 20, "sampler": RANDOM, "rng": jax.random.key(0)}
    (text,) = generate_texts(model, params, ByteTokenizer(), [[65, 66]], **settings)
    assert "".join(stream(model, params, ByteTokenizer(), [65, 66], **settings)) == text


def make_byte_part(seed):
    return make_part(dataclasses.replace(SMALL, vocab_size=264), seed)


def test_another_strength_compiles_nothing_anew():
    traces = []

    class Traced(LanguageModel):
        def apply(self, *args, **kwargs):
            traces.append(1)
            return super().apply(*args, **kwargs)

    base = dataclasses.replace(parts()[0], model=Traced(BASE))
    run(*proxy_tuned(base, *parts()[1:], 0.5), sampler=GREEDY)
    once = len(traces)
    run(*proxy_tuned(base, *parts()[1:], 2.0), sampler=GREEDY)
    assert len(traces) == once


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([[1] * 27], "pass model.max_length=36"), ([[64]], "model's vocabulary of 64")],
)
def test_the_narrowest_model_sets_the_limits(prompts, message):
    with pytest.raises(UserError, match=message):
        run(*proxy_tuned(*parts()), prompts)

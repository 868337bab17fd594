import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import sharding
from llm_jax.errors import UserError
from llm_jax.generation import decoding
from llm_jax.generation.generate import generate
from llm_jax.generation.sampler import SamplerConfig
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.models import LanguageModel, ModelConfig, init_cache

BASE = ModelConfig(
    vocab_size=64, embed_dim=16, num_layers=1, num_heads=4, num_kv_heads=2, mlp_dim=24,
    max_length=40,
)  # fmt: skip
CONFIGS = {
    "grouped": BASE,
    "window": dataclasses.replace(
        BASE,
        num_layers=2,
        window=3,
        attention_pattern=("local", "global"),
        qk_norm="head",
        logits_soft_cap=5.0,
    ),
    "scanned": dataclasses.replace(
        BASE, window=3, attention_pattern=("local", "global"), num_layers=4, scan_layers=True
    ),
}
GREEDY = SamplerConfig(temperature=0)
RANDOM = SamplerConfig(temperature=1.5, top_k=20, top_p=0.9)
PENALIZED = SamplerConfig(temperature=1.2, min_p=0.05, repetition_penalty=1.4)
PROMPTS = [[3, 14, 15, 9, 26, 5, 35, 8, 9], [7], [27, 18, 28, 18, 2]]
LENGTH = 24  # of the reference's rows


def random_params(model):
    """Parameters that make logits far from uniform; numpy makes them without compiling `init`."""
    rng = np.random.default_rng(0)
    shapes = sharding.unbox(jax.eval_shape(model.init, jax.random.key(0)))
    return jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)


@functools.cache
def make(name):
    """Model, params, and a jitted full forward without a cache."""
    model = LanguageModel(CONFIGS[name])

    @jax.jit
    def logits(params, tokens):
        return model.logits(params, model.apply(params, tokens)[0])

    return model, random_params(model), logits


def full_logits(name, tokens):
    """Float32 [len(tokens), vocab]: one row alone in one forward pass."""
    _, params, logits = make(name)
    padded = jnp.asarray([[*tokens, *[0] * (LENGTH - len(tokens))]])
    return np.asarray(logits(params, padded))[0, : len(tokens)]


def naive_greedy(name, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(full_logits(name, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def run(name, prompts=PROMPTS, **settings):
    model, params, _ = make(name)
    settings = {"max_new_tokens": 10, "sampler": GREEDY, "rng": jax.random.key(7)} | settings
    return generate(model, params, prompts, **settings)


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_token_by_token_equals_one_forward_pass(name):
    model, params, _ = make(name)
    rows = np.random.default_rng(0).integers(0, 64, (3, 16))
    lengths = np.array([9, 1, 5])

    @jax.jit
    def step(tokens, segment_ids, cache):
        hidden, cache = model.apply(params, tokens, segment_ids=segment_ids, cache=cache)
        return model.logits(params, hidden), cache

    inside = (np.arange(9) < lengths[:, None]).astype(np.int32)
    prefilled, cache = step(rows[:, :9], inside, init_cache(model.config, 3, 24))
    rest = []
    for i in range(7):
        next_tokens = rows[np.arange(3), lengths + i][:, None]
        logits, cache = step(next_tokens, np.ones((3, 1), np.int32), cache)
        rest.append(logits[:, 0])
    for row, length in enumerate(lengths):
        expected = full_logits(name, rows[row, : length + 7])
        np.testing.assert_allclose(prefilled[row, :length], expected[:length], atol=2e-5)
        np.testing.assert_allclose([x[row] for x in rest], expected[length:], atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_rerunning_the_whole_forward_pass(name):
    made = run(name)
    for row, prompt in enumerate(PROMPTS):
        assert made.tokens[row].tolist() == naive_greedy(name, prompt, 10)
    assert made.lengths.tolist() == [10, 10, 10]
    assert not made.stopped.any()


@pytest.mark.parametrize("penalty", [1.7, 0.02])
def test_the_penalty_counts_prompt_and_continuation_and_no_padding(penalty):
    # The smaller one makes a row choose among the tokens that it holds, if it can.
    prompts = np.random.default_rng(3).integers(1, 64, (12, 9)).tolist()
    prompts = [prompt[: 1 + row % 9] for row, prompt in enumerate(prompts)]
    made = run("grouped", prompts, sampler=SamplerConfig(0, repetition_penalty=penalty))
    for row, prompt in enumerate(prompts):
        tokens = list(prompt)
        for _ in range(10):
            logits = full_logits("grouped", tokens)[-1].copy()
            for token in set(tokens):
                logits[token] *= 1 / penalty if logits[token] > 0 else penalty
            tokens.append(int(logits.argmax()))
        assert made.tokens[row].tolist() == tokens[len(prompt) :]


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("grouped", GREEDY),
        ("window", GREEDY),
        ("scanned", GREEDY),
        ("window", RANDOM),
        ("grouped", PENALIZED),
    ],
)
def test_logprobs_equal_a_recomputation(name, sampler):
    made = run(name, sampler=sampler)
    for row, prompt in enumerate(PROMPTS):
        tokens = made.tokens[row]
        logits = full_logits(name, [*prompt, *tokens])[len(prompt) - 1 : -1]
        scaled = jax.nn.log_softmax(logits / (sampler.temperature or 1))
        expected = scaled[np.arange(10), tokens]
        np.testing.assert_allclose(made.logprobs[row], expected, atol=2e-5)


@pytest.mark.parametrize("sampler", [RANDOM, PENALIZED])
def test_a_ragged_batch_equals_each_prompt_alone(sampler):
    rng = jax.random.split(jax.random.key(5), 3)
    together = run("window", sampler=sampler, rng=rng)
    for row, prompt in enumerate(PROMPTS):
        alone = run("window", [prompt], sampler=sampler, rng=rng[row : row + 1])
        assert together.tokens[row].tolist() == alone.tokens[0].tolist()
        np.testing.assert_allclose(together.logprobs[row], alone.logprobs[0], atol=1e-5)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_a_mesh_changes_nothing_and_need_not_divide_the_batch(sizes):
    model, params, _ = make("window")
    mesh = make_mesh(MeshConfig(*sizes))
    boxed = jax.eval_shape(model.init, jax.random.key(0))
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, sharding.parameter_shardings(mesh, boxed))
        made = generate(
            model, spread, PROMPTS, max_new_tokens=10, sampler=GREEDY, rng=jax.random.key(7)
        )
    alone = run("window")
    np.testing.assert_array_equal(made.tokens, alone.tokens)
    np.testing.assert_array_equal(made.lengths, alone.lengths)
    np.testing.assert_allclose(made.logprobs, alone.logprobs, atol=1e-4)


def test_one_seed_gives_rows_and_runs_their_own_randomness():
    made = run("window", [[7]] * 3, sampler=RANDOM)
    again = run("window", [[7], [8, 9], [7]], sampler=RANDOM)
    np.testing.assert_array_equal(again.tokens[::2], made.tokens[::2])
    other = run("window", [[7]] * 3, sampler=RANDOM, rng=jax.random.key(8))
    distinct = {tuple(row) for row in [*made.tokens.tolist(), *other.tokens.tolist()]}
    assert len(distinct) == 6


def test_each_step_draws_anew():
    model, params, _ = make("window")
    flat = {**params, "embedding": np.zeros_like(params["embedding"])}  # every logit is 0
    made = generate(model, flat, PROMPTS, max_new_tokens=10, sampler=RANDOM, rng=jax.random.key(0))
    assert all(len(set(row)) > 3 for row in made.tokens.tolist())


def test_first_token_follows_the_distribution():
    count = 2000
    rng = jax.random.key(11)
    made = run("grouped", [[7]] * count, sampler=SamplerConfig(), rng=rng, max_new_tokens=1)
    expected = np.asarray(jax.nn.softmax(full_logits("grouped", [7])[-1]))
    seen = np.bincount(made.tokens[:, 0], minlength=64) / count
    # Total variation of a sample from its distribution is about sqrt(V / (2 pi n)) = 0.07.
    assert np.abs(seen - expected).sum() / 2 < 0.1


def test_stop_ids_end_a_row_and_count_once():
    free = run("grouped", max_new_tokens=10)
    stop = int(free.tokens[0, 4])
    made = run("grouped", stop_ids=(60, stop), pad_id=57)
    for row in range(3):
        tokens = free.tokens[row].tolist()
        length = tokens.index(stop) + 1 if stop in tokens else 10
        assert made.lengths[row] == length
        assert made.stopped[row] == (stop in tokens)
        assert made.tokens[row, :length].tolist() == tokens[:length]
        assert (made.tokens[row, length:] == 57).all()
        assert (made.logprobs[row, length:] == 0).all()
        np.testing.assert_allclose(made.logprobs[row, :length], free.logprobs[row, :length])
    assert made.lengths[0] < 10  # or nothing was tested


def test_decoding_ends_when_all_rows_have_stopped():
    model, params, _ = make("grouped")
    calls = []

    class Watched(LanguageModel):
        def logits(self, params, hidden):
            jax.debug.callback(lambda: calls.append(1))
            return super().logits(params, hidden)

    first = [naive_greedy("grouped", prompt, 1)[0] for prompt in PROMPTS]
    made = generate(
        Watched(model.config), params, PROMPTS, max_new_tokens=10, sampler=GREEDY,
        rng=jax.random.key(0), stop_ids=first,
    )  # fmt: skip
    jax.effects_barrier()
    assert made.lengths.tolist() == [1, 1, 1]
    assert made.stopped.all()
    assert len(calls) == 1


def test_the_cache_of_a_row_that_has_ended_grows_no_more():
    model, params, _ = make("grouped")
    first = [naive_greedy("grouped", prompt, 1)[0] for prompt in PROMPTS]
    request = decoding.make_request(model, PROMPTS, 10)
    terms = decoding.make_terms(jax.random.key(0), 3, first[:1])
    state = decoding.start(model, params, request, sampler=GREEDY, room=32)
    state = decoding.advance(model, params, state, terms, 8, 3, sampler=GREEDY)
    assert state.lengths_B[0] == 1 < state.lengths_B.max()
    np.testing.assert_array_equal(state.cache.lengths, request.lengths_B + state.lengths_B)


def test_long_prompts_are_read_in_chunks(monkeypatch):
    prompts = [list(range(1, 22)), [5, 6, 7], list(range(30, 47))]
    whole = run("scanned", prompts, max_new_tokens=3)
    monkeypatch.setattr("llm_jax.generation.decoding.PREFILL_CHUNK", 8)
    model, params, _ = make("scanned")
    fresh = LanguageModel(model.config)  # compiles anew, with the smaller chunk
    chunked = generate(
        fresh, params, prompts, max_new_tokens=3, sampler=GREEDY, rng=jax.random.key(7)
    )
    np.testing.assert_array_equal(chunked.tokens, whole.tokens)
    np.testing.assert_allclose(chunked.logprobs, whole.logprobs, atol=1e-5)


def test_lengths_of_one_bucket_share_a_compilation():
    model, params, _ = make("grouped")
    traces = []

    class Traced(LanguageModel):
        def apply(self, params, tokens, *args, **kwargs):
            traces.append(tokens.shape)
            return super().apply(params, tokens, *args, **kwargs)

    continue_ = functools.partial(generate, Traced(model.config), params, sampler=GREEDY)
    continue_([[1, 2]], max_new_tokens=3, rng=jax.random.key(0))
    assert set(traces) == {(1, 32), (1, 1)}
    once = len(traces)
    continue_([[1, 2, 3, 4, 5]], max_new_tokens=9, rng=jax.random.key(1))
    continue_([list(range(20))], max_new_tokens=20, rng=jax.random.key(2))
    assert len(traces) == once


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1] * 31], {}, r"prompt 0 of 31 tokens and max_new_tokens=10 pass model.max_length=40"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([], {}, "no prompt"),
        ([[1, 64]], {}, "vocabulary of 64"),
        ([[-1]], {}, "vocabulary of 64"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_bad_input_is_refused(prompts, settings, message):
    with pytest.raises(UserError, match=message):
        run("grouped", prompts, **settings)


def test_a_prompt_may_fill_the_model_to_its_last_position():
    prompts = [list(range(30)), [1], [2]]
    assert run("grouped", prompts).lengths.tolist() == [10, 10, 10]


def test_keys_must_be_one_a_row():
    with pytest.raises(ValueError, match="one for each prompt"):
        run("grouped", rng=jax.random.split(jax.random.key(0), 2))

import dataclasses
import functools

import jax
import numpy as np
import pytest

from llm_jax import sharding
from llm_jax.errors import UserError
from llm_jax.generation import continuous
from llm_jax.generation.continuous import DecodingCost, generate_many
from llm_jax.generation.generate import generate
from llm_jax.generation.sampler import SamplerConfig
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.models.moe import MoeConfig

BASE = ModelConfig(
    vocab_size=64, embed_dim=16, num_layers=1, num_heads=4, num_kv_heads=2, mlp_dim=24,
    max_length=60,
)  # fmt: skip
CONFIGS = {
    "grouped": BASE,
    "learned": dataclasses.replace(BASE, position="learned", max_length=39),
    "scanned": dataclasses.replace(BASE, num_layers=2, window=3, scan_layers=True),
    "experts": dataclasses.replace(BASE, moe=MoeConfig(num_experts=4)),
}
GREEDY = SamplerConfig(temperature=0)
RANDOM = SamplerConfig(temperature=1.5, top_k=20, top_p=0.9)
PENALIZED = SamplerConfig(temperature=1.2, min_p=0.05, repetition_penalty=1.4)
PROMPTS = [[3, 14, 15, 9, 26, 5, 35, 8, 9], [7], [27, 18, 28, 18, 2], [7, 8], [40, 41]]
STOPS = tuple(range(0, 64, 16))  # about one token in sixteen ends a row
NEW, SAMPLES = 30, 4


@functools.cache
def make(name):
    model = LanguageModel(CONFIGS[name])
    rng = np.random.default_rng(0)
    shapes = sharding.unbox(jax.eval_shape(model.init, jax.random.key(0)))
    return model, jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)


def run(name="grouped", prompts=PROMPTS, **settings):
    defaults = {
        "samples": SAMPLES, "max_new_tokens": NEW, "sampler": RANDOM, "rng": jax.random.key(7),
        "stop_ids": STOPS, "pad_id": 57, "slots": 4,
    }  # fmt: skip
    return generate_many(*make(name), prompts, **defaults | settings)


@functools.cache
def all_at_once(name="grouped", sampler=RANDOM):
    rows = [prompt for prompt in PROMPTS for _ in range(SAMPLES)]
    return generate(
        *make(name), rows, max_new_tokens=NEW, sampler=sampler, rng=jax.random.key(7),
        stop_ids=STOPS, pad_id=57,
    )  # fmt: skip


def assert_same(made, expected):
    np.testing.assert_array_equal(made.tokens, expected.tokens)
    np.testing.assert_array_equal(made.lengths, expected.lengths)
    np.testing.assert_array_equal(made.stopped, expected.stopped)
    np.testing.assert_allclose(made.logprobs, expected.logprobs, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("grouped", RANDOM),
        ("grouped", PENALIZED),
        ("learned", RANDOM),
        ("scanned", RANDOM),
        ("experts", RANDOM),
    ],
)
def test_rows_are_those_of_one_batch(name, sampler):
    expected = all_at_once(name, sampler)
    assert_same(run(name, sampler=sampler), expected)
    # Rows that stop early and rows that are cut off, or little was tested.
    assert expected.lengths.min() < 10 and not expected.stopped.all()


@pytest.mark.parametrize("slots", [1, 3, 1000])
def test_the_number_of_slots_changes_nothing(slots):
    assert_same(run(slots=slots), all_at_once())


def test_a_mesh_changes_nothing_but_rounds_the_slots_up():
    model, params = make("grouped")
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    boxed = jax.eval_shape(model.init, jax.random.key(0))
    cost = DecodingCost()
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, sharding.parameter_shardings(mesh, boxed))
        made = generate_many(
            LanguageModel(model.config), spread, PROMPTS, samples=SAMPLES, max_new_tokens=NEW,
            sampler=RANDOM, rng=jax.random.key(7), stop_ids=STOPS, pad_id=57, slots=7, cost=cost,
        )  # fmt: skip
    expected = all_at_once()
    np.testing.assert_array_equal(made.tokens, expected.tokens)
    np.testing.assert_allclose(made.logprobs, expected.logprobs, atol=1e-4)
    assert cost.compilations == 4
    assert cost.slot_steps == 8 * steps_of(expected.lengths, 8, 1)


def test_samples_of_a_prompt_differ():
    made = run(prompts=[[7]], samples=6, stop_ids=())
    assert len({tuple(row) for row in made.tokens.tolist()}) == 6
    assert made.lengths.tolist() == [NEW] * 6
    assert not made.stopped.any()


@pytest.mark.parametrize("slots", [1, 6, 20])
def test_a_prompt_is_read_once(monkeypatch, slots):
    read = []

    def watched(model, params, request, **settings):
        for tokens, length, last in zip(*request_arrays(request), strict=True):
            read.append([*tokens[:length], last])
        return start(model, params, request, **settings)

    def request_arrays(request):
        return request.tokens_BP.tolist(), request.lengths_B.tolist(), request.last_B.tolist()

    start = continuous.start
    monkeypatch.setattr(continuous, "start", watched)
    cost = DecodingCost()
    run(slots=slots, cost=cost)
    assert [prompt for prompt in read if prompt != [0]] == PROMPTS  # [0] fills the last block up
    assert cost.prompts == len(PROMPTS)


def steps_of(lengths, slots, enough):
    """Decode steps of a schedule that fills slots again when `enough` of them are idle."""
    waiting, left, steps = list(lengths), [0] * slots, 0
    while waiting or any(left):
        for slot in range(slots):
            if waiting and not left[slot]:
                left[slot] = waiting.pop(0)
        limit = enough if waiting else slots
        while sum(not count for count in left) < limit:
            left = [max(count - 1, 0) for count in left]
            steps += 1
    return steps


@pytest.mark.parametrize(("slots", "enough"), [(1, 1), (3, 1), (16, 2), (20, 2)])
def test_a_row_that_has_ended_makes_place_for_the_next(slots, enough):
    cost = DecodingCost()
    lengths = run(slots=slots, cost=cost).lengths
    assert cost.tokens == lengths.sum()
    assert cost.slot_steps == slots * steps_of(lengths, slots, enough)
    assert cost.idle_share == pytest.approx(1 - cost.tokens / cost.slot_steps)
    if slots == 1:
        assert cost.idle_share == 0


def test_slots_for_more_rows_than_there_are_take_no_time():
    cost = DecodingCost()
    lengths = run(prompts=[[7]], samples=5, slots=1000, cost=cost).lengths
    assert cost.slot_steps == 8 * lengths.max()


def test_calls_of_many_sizes_share_four_programs():
    model, params = make("grouped")
    fresh = functools.partial(
        generate_many, LanguageModel(model.config), params, sampler=GREEDY, rng=jax.random.key(0),
        slots=5,
    )  # fmt: skip
    cost = DecodingCost()
    fresh(PROMPTS, samples=2, max_new_tokens=3, cost=cost)
    assert cost.compilations == 4
    fresh([[1, 2, 3]] * 9, samples=2, max_new_tokens=9, cost=cost)
    fresh([list(range(30)), [1]] * 20, samples=2, max_new_tokens=25, cost=cost)
    assert cost.compilations == 4
    fresh([[1] * 40] * 5, samples=2, max_new_tokens=3, cost=cost)  # a longer bucket of prompts
    assert cost.compilations == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slots": 0}, "slots=0"),
        ({"samples": 0}, "samples=0"),
        ({"prompts": []}, "no prompt"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1] * 31]}, "prompt 0 of 31 tokens and max_new_tokens=30 pass"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_bad_input_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        run(**settings)

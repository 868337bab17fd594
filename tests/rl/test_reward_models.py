"""Rewards of trained reward models: read at the last token, whatever stands beside a sample."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.checkpoint import CheckpointConfig, Checkpointer
from llm_jax.config import resolved
from llm_jax.data.template_jinja import JinjaTemplate
from llm_jax.data.templates import make_template
from llm_jax.data.tokenizer_base import ByteTokenizer
from llm_jax.errors import UserError
from llm_jax.evals.batching import sequence_batch
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.models.heads import REWARD, init_reward_head, rewards
from llm_jax.rl.rewards import RewardTerm, Scorer
from llm_jax.rl.scoring import Policy
from llm_jax.sharding import unbox
from llm_jax.types import TrainState

LONGEST = 48
MODEL = LanguageModel(
    ModelConfig(
        vocab_size=320, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16, max_length=LONGEST
    )
)


@functools.cache
def make_params(seed):
    """Parameters whose rewards lie apart."""
    params = unbox(MODEL.init(jax.random.key(seed)) | init_reward_head(jax.random.key(seed), 16))
    kernel = params[REWARD]["kernel"]
    return {**params, REWARD: {"kernel": 3 * kernel}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`run(seed, heads, template)`: the folder of a run with the parameters of that seed."""

    @functools.cache
    def make(seed, heads=(REWARD,), template=None):
        folder = tmp_path_factory.mktemp("rewards") / "run"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        ByteTokenizer().save(folder / "tokenizer")
        checkpointer = Checkpointer(folder, CheckpointConfig())
        params = dict(make_params(seed))
        if not heads:
            del params[REWARD]
        meta = {
            "stage": "reward" if heads else "sft",
            "model": resolved(MODEL.config),
            "lineage": [],
            "heads": list(heads),
        }
        if template is not None:
            meta["template"] = template.describe()
        state = TrainState(jnp.int32(1), params, {}, jax.random.key(0))
        checkpointer.save(1, state, params, {}, meta)
        checkpointer.wait()
        checkpointer.close()
        return str(folder)

    return make


_rewards = jax.jit(functools.partial(rewards, MODEL))


def expected(seed, ids):
    """The reward of one sequence, read by itself."""
    return float(_rewards(make_params(seed), sequence_batch([list(ids)], LONGEST))[0])


def ids_of(sample):
    return (*sample.prompt_ids, *sample.completion_ids)


@pytest.fixture
def score(policy):
    """`score(samples, name, limit=..., policy=..., **settings)`"""

    def compute(samples, name, *, limit=0, policy=policy, **settings):
        return Scorer([RewardTerm(name, 1.0, settings)], limit, policy)(samples)

    return compute


@pytest.fixture
def samples(sample):
    texts = ["a", "bc" * 20, "def", "gh " * 5, "i", "jk" * 18, "l"]
    return [sample(text, prompt="?") for text in texts]


@pytest.mark.parametrize("batch", [2, 16])
def test_rewards_are_those_of_each_sequence_by_itself(run, score, samples, batch):
    scores = score(samples, "model", run=run(1), batch=batch)
    wanted = [expected(1, ids_of(sample)) for sample in samples]
    np.testing.assert_allclose(scores.parts["model"], wanted, atol=1e-4)
    assert np.ptp(wanted) > 0.1
    np.testing.assert_array_equal(scores.total, scores.parts["model"])


def test_rewards_are_the_same_on_a_mesh(run, score, samples, policy):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    spread = dataclasses.replace(policy, mesh=mesh)
    alone = score(samples, "model", run=run(1))
    together = score(samples, "model", run=run(1), policy=spread, batch=3)
    np.testing.assert_allclose(together.total, alone.total, atol=1e-4)
    with jax.set_mesh(mesh):
        inside = score(samples, "model", run=run(1), policy=spread)
    np.testing.assert_allclose(inside.total, alone.total, atol=1e-4)


def test_few_lengths_compile(run, score, sample, monkeypatch):
    shapes = set()
    monkeypatch.setattr(
        "llm_jax.rl.reward_models.sequence_batch",
        lambda rows, length: shapes.add((len(rows), length)) or sequence_batch(rows, length),
    )
    score([sample("a" * n, prompt="") for n in range(1, LONGEST - 2)], "model", run=run(1), batch=4)
    assert shapes == {(4, 32), (4, LONGEST)}


def test_what_is_too_long_fails_by_itself(run, score, sample, told):
    fitting, too_long = sample("a" * (LONGEST - 3), prompt=""), sample("a" * LONGEST, number=8)
    scores = score([too_long, fitting], "model", run=run(1), limit=1)
    assert np.isnan(scores.total[0])
    assert scores.total[1] == pytest.approx(expected(1, ids_of(fitting)), abs=1e-4)
    (line,) = told
    assert "row 8" in line and "more than the 48 that the reward model reads" in line


def test_a_run_of_another_tokenizer_is_refused(run, score, samples, policy):
    other = ByteTokenizer()
    other.__dict__["fingerprint"] = "another"
    with pytest.raises(UserError, match="has another tokenizer than the policy"):
        score(samples, "model", run=run(1), policy=Policy(other, policy.mesh, policy.log))


def test_a_run_of_another_chat_template_is_refused(run, score, samples, policy):
    chatml, zephyr = make_template("chatml"), make_template("zephyr")
    for ours in (zephyr, JinjaTemplate("chatml", (("default", "{{ messages }}"),))):
        with pytest.raises(UserError, match="trained with the chat template 'chatml'") as caught:
            other = dataclasses.replace(policy, template=ours)
            score(samples, "model", run=run(1, (REWARD,), chatml), policy=other)
        assert "\n" not in str(caught.value)
    same = dataclasses.replace(policy, template=chatml)
    for template in (chatml, None):
        assert score(samples, "model", run=run(1, (REWARD,), template), policy=same).failures == 0


def test_a_jinja_template_is_known_by_its_source(run, score, samples, policy):
    here, there = (JinjaTemplate(name, (("default", "{{ messages }}"),)) for name in "ab")
    scores = score(
        samples,
        "model",
        run=run(1, (REWARD,), here),
        policy=dataclasses.replace(policy, template=there),
    )
    assert scores.failures == 0


def test_a_run_without_a_reward_head_is_refused(run, score, samples):
    with pytest.raises(UserError, match="is no reward model but of the stage 'sft'"):
        score(samples, "model", run=run(3, ()))


def test_safety_decides_where_it_is_asked_for_or_low(run, score, sample):
    texts = [chr(97 + 7 * i % 26) * (i % 5 + 1) for i in range(24)]
    tags = ({"safety": True}, {"safety": False}, {})
    made = [sample(text, **tags[i % 3]) for i, text in enumerate(texts)]
    safe = np.array([expected(1, ids_of(s)) for s in made])
    helpful = np.array([expected(2, ids_of(s)) for s in made])
    threshold = 1 / (1 + np.exp(-np.median(safe)))
    low = safe < np.median(safe)
    tagged = np.arange(24) % 3 == 0
    wanted = np.where(tagged | low, safe, helpful)
    assert len(set(zip(tagged.tolist(), low.tolist(), strict=True))) == 4
    settings = {"safety": run(1), "helpfulness": run(2)}
    scores = score(made, "llama2", threshold=float(threshold), **settings)
    np.testing.assert_allclose(scores.parts["llama2"], wanted, atol=1e-4)
    whitened = (wanted - wanted.mean()) / wanted.std(ddof=1)
    np.testing.assert_allclose(scores.total, whitened, atol=1e-3)


def test_the_threshold_of_llama_2_is_a_probability(run, score, sample):
    settings = {"safety": run(1), "helpfulness": run(2)}
    with pytest.raises(UserError, match=r"threshold=2\.0 is a probability"):
        score([], "llama2", threshold=2, **settings)
    scores = score([sample("a", safety="perhaps"), sample("a")], "llama2", limit=1, **settings)
    assert np.isnan(scores.total[0]) and scores.total[1] == 0

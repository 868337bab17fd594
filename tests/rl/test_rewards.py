"""The weighted sum of rewards: by name, with what fails counted."""

import json
import math

import numpy as np
import pytest

from llm_jax.config import build
from llm_jax.errors import UserError
from llm_jax.rl.rewards import REPORTED, REWARDS, Kind, NoSettings, RewardTerm, Scorer
from llm_jax.rl.scoring import Reward

MODULE = "rewards_of_the_user"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module with rewards of the user's."""
    (tmp_path / f"{MODULE}.py").write_text(
        "def share(prompt, completion, row, letter='a'):\n"
        "    return completion.count(letter) / len(completion)\n"
        "async def later(prompt, completion, row):\n"
        "    return row['score']\n"
        "constant = 3\n"
    )
    (tmp_path / "rewards_that_fail.py").write_text("raise ValueError('two\\nlines')\n")
    monkeypatch.syspath_prepend(tmp_path)
    return MODULE


@pytest.fixture
def scorer(policy):
    def make(*configs, limit=0):
        return Scorer([RewardTerm(**config) for config in configs], limit, policy)

    return make


def test_the_total_is_the_weighted_sum_and_fractions_survive(scorer, module, sample):
    score = scorer(
        {"name": f"{module}:share", "weight": 2.0},
        {"name": f"{module}:later", "weight": -1.0},
        {"name": "finished", "weight": 0.0},
    )
    scores = score([sample("abb", score=1), sample("aabb", score=0.25, finished=False)])
    np.testing.assert_allclose(scores.total, [2 / 3 - 1, 0.75], rtol=1e-6)
    np.testing.assert_allclose(scores.parts["share"], [1 / 3, 0.5], rtol=1e-6)
    assert scores.parts["later"].tolist() == [1, 0.25]
    assert scores.parts["finished"].tolist() == [1, 0]
    assert {a.dtype for a in (scores.total, *scores.parts.values())} == {np.dtype(np.float32)}
    assert scores.failures == 0


def test_settings_are_arguments_of_a_function(scorer, module, sample):
    score = scorer({"name": f"{module}:share", "settings": {"letter": "b"}})
    assert score([sample("abbb")]).total == 0.75


def test_settings_are_fields_of_a_reward_by_name(scorer, sample):
    score = scorer({"name": "exact_match", "settings": {"field": "wanted", "normalised": True}})
    assert score([sample("The cat", wanted="cat"), sample("dog", wanted="cat")]).total.tolist() == [
        1,
        0,
    ]


def test_a_reward_may_stand_there_twice(scorer, sample):
    patterns = [{"name": "regex", "settings": {"pattern": p}} for p in ("a", "b", "c")]
    scores = scorer(*patterns)([sample("ab")])
    assert {name: float(part[0]) for name, part in scores.parts.items()} == {
        "regex": 1.0,
        "regex_2": 1.0,
        "regex_3": 0.0,
    }


def test_a_failure_is_told_and_counted_and_leaves_no_score(scorer, module, sample, told):
    score = scorer({"name": f"{module}:later"}, {"name": "finished"}, limit=3)
    prompt = "What is\n" + "very " * 20 + "long?"
    scores = score([sample("a", score=1), sample("b", number=7, prompt=prompt)])
    assert scores.total[0] == 2 and np.isnan(scores.total[1])
    assert np.isnan(scores.parts["later"][1]) and scores.parts["finished"].tolist() == [1, 1]
    assert (scores.failures, score.failures) == (1, 1)
    (line,) = told
    assert line.startswith("the reward 'later' failed on row 7 ('What is very very")
    assert line.endswith("...'): KeyError: 'score'") and "\n" not in line and len(line) < 140
    score([sample("a", score=math.nan), sample("a", score="1")])
    assert score.failures == 3
    assert told[1].endswith("ValueError: it gave nan")
    assert told[2].endswith("TypeError: it gave str, a number is wanted")


def test_a_reward_of_weight_zero_costs_no_sample(scorer, module, sample):
    score = scorer({"name": f"{module}:later", "weight": 0.0}, {"name": "finished"}, limit=1)
    scores = score([sample("a")])
    assert scores.total.tolist() == [1] and np.isnan(scores.parts["later"][0])
    assert scores.failures == 1


def test_one_failure_more_than_the_limit_ends_the_run(scorer, module, sample):
    score = scorer({"name": f"{module}:later"}, limit=2)
    score([sample("a")] * 2)
    with pytest.raises(UserError) as error:
        score([sample("a", number=5)])
    assert str(error.value) == (
        "rewards have failed 3 times, and the limit is 2; mend them, or raise it. The last: the "
        "reward 'later' failed on row 5 ('What?'): KeyError: 'score'"
    )
    resumed = scorer({"name": f"{module}:later"}, limit=2)
    resumed.failures = 2
    with pytest.raises(UserError, match="failed 3 times"):
        resumed([sample("a")])


def test_only_the_first_failures_are_told(scorer, module, sample, told):
    scorer({"name": f"{module}:later"}, limit=100)([sample("a")] * 20)
    assert len(told) == REPORTED + 1
    assert told[-1] == "further failures of rewards are counted only."


def test_nothing_to_score_gives_nothing(scorer):
    scores = scorer({"name": "numeric"}, {"name": "length"})([])
    assert scores.total.shape == (0,) and scores.parts["length"].shape == (0,)


def test_a_whitened_reward_counts_whitened_and_is_reported_as_it_is(scorer, sample, monkeypatch):
    def make(settings, policy, seconds):
        values = [1.0, 2.0, 6.0]
        return Reward(lambda s: [*values, RuntimeError("no")][: len(s)], whitened=True)

    monkeypatch.setitem(REWARDS, "mine", Kind(NoSettings, make))
    scores = scorer({"name": "mine", "weight": 2.0}, {"name": "finished"}, limit=1)(
        [sample("a")] * 4
    )
    np.testing.assert_array_equal(scores.parts["mine"], [1, 2, 6, np.nan])
    deviation = np.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 2)
    expected = 1 + 2 * (np.array([1, 2, 6, np.nan]) - 3) / deviation
    np.testing.assert_allclose(scores.total, expected, rtol=1e-5)
    np.testing.assert_allclose(scores.plain, [3, 5, 13, np.nan])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"name": "numerc"},
            "config.rewards[0], 'numerc': no such reward. Did you mean 'numeric'?",
        ),
        ({"name": "regex", "settings": {"patern": "a"}}, "settings has no key 'patern'"),
        ({"name": "regex"}, "'pattern'"),
        ({"name": "regex", "settings": {"pattern": "("}}, "is no regular expression"),
        ({"name": "numeric", "settings": {"tolerance": "a"}}, "settings.tolerance='a' is of the"),
        ({"name": "nowhere:reward"}, "it cannot be imported: ModuleNotFoundError: No module named"),
        ({"name": f"{MODULE}:nothing"}, "it cannot be imported: AttributeError"),
        ({"name": f"{MODULE}:constant"}, "it is no function"),
        ({"name": "rewards_that_fail:any"}, "it cannot be imported: ValueError: two lines."),
        ({"name": f"{MODULE}:share", "settings": {"leter": "a"}}, "cannot be called with a prompt"),
        ({"name": "model", "settings": {"run": "/nowhere"}}, "config.rewards[0], 'model': "),
        ({"name": "model", "settings": {"run": "/nowhere", "batch": 0}}, "batch=0 must be"),
        ({"name": "finished", "weight": math.nan}, "the weight nan of the reward 'finished'"),
        ({"name": "finished", "seconds": 0.0}, "seconds=0.0 of the reward 'finished'"),
    ],
)
def test_what_cannot_be_made_is_one_line_with_its_place(scorer, module, config, message):
    with pytest.raises(UserError) as error:
        scorer(config)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_without_rewards_nothing_can_be_learned(policy):
    with pytest.raises(UserError, match=r"config\.rewards is empty: name one of exact_match, "):
        Scorer([], 0, policy)


def test_configs_are_built_from_json(policy, sample):
    pytest.importorskip("jsonschema")
    settings = {"schema": {"properties": {"a": {"enum": [None, 1]}}, "const": None}}
    text = json.dumps({"name": "json_schema", "settings": settings})
    score = Scorer([build(RewardTerm, json.loads(text))], 0, policy)
    assert score([sample("null"), sample("1")]).total.tolist() == [1, 0]

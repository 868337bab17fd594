"""Generated answers: pass@k against counting, what counts as right, shots, and bad input."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from llm_jax.data.prompts import PromptDataConfig
from llm_jax.errors import UserError
from llm_jax.evals.generation import (
    GenerationConfig,
    generation_task,
    make_generation,
    pass_at_k,
)
from llm_jax.rl.rewards import RewardTerm
from llm_jax.rl.rollouts import Rollouts, completion_batch
from llm_jax.rl.scoring import Sample

COLOURS = ("red", "green", "blue")


@pytest.mark.parametrize("samples", [1, 4, 6])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(samples):
    for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        outcomes = [place < right for place in range(samples)]
        draws = list(itertools.combinations(outcomes, k))
        assert pass_at_k(samples, right, k) == pytest.approx(np.mean([any(d) for d in draws]))


@pytest.fixture
def data(tmp_path):
    """`data(rows=None)`: where rows, or forty questions, are written to."""

    def make(rows=None):
        rows = rows or [
            {"prompt": f"What is {i}?", "completion": COLOURS[i % 3]} for i in range(40)
        ]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return PromptDataConfig(source=str(tmp_path / "rows.jsonl"), validation_fraction=0.2)

    return make


def answered(task, texts):
    """Rollouts in which the prompts of a task are answered with given texts, prompt by prompt."""
    each = len(texts) // len(task.prompts)
    prompts = [prompt for prompt in task.prompts for _ in range(each)]
    samples = [
        Sample(i, prompt.text, text, prompt.ids, list(text.encode()), True, prompt.row)
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    batch = completion_batch(samples, 200)
    lengths = np.array([len(text) for text in texts])
    return Rollouts(samples, batch, batch.loss_weights * 0, lengths, np.ones(len(texts), bool))


def test_right_answers_are_counted_by_prompt(data, subject):
    config = GenerationConfig(data=data(), samples=4, temperature=1.0, ks=(1, 2), rows=3)
    task = make_generation(config, subject)
    wanted = [prompt.answer for prompt in task.prompts]
    texts = [wanted[0]] * 4 + [wanted[1], "no", "no", "no"] + ["no"] * 4
    result = task.result(answered(task, texts))
    assert result.metrics["accuracy"] == pytest.approx(5 / 12)
    assert result.metrics["reward"] == pytest.approx(5 / 12)
    assert result.metrics["accuracy_stderr"] == pytest.approx(
        np.std([1, 1 / 4, 0], ddof=1) / 3**0.5
    )
    assert result.metrics["reward_stderr"] == pytest.approx(result.metrics["accuracy_stderr"])
    assert result.metrics["pass@1"] == pytest.approx(5 / 12)
    assert result.metrics["pass@2"] == pytest.approx(np.mean([1, 1 / 2, 0]))
    assert [row["rewards"] for row in result.examples] == [[1] * 4, [1, 0, 0, 0], [0] * 4]
    assert result.examples[1]["texts"] == texts[4:8]
    assert len({row["id"] for row in result.examples}) == 3


def test_a_completion_without_a_score_counts_nowhere(data, subject):
    rows = [{"prompt": f"p{i}", "completion": str(i)} for i in range(20)]
    config = GenerationConfig(
        data=data([*rows, {"prompt": "q", "completion": "none"}]),
        rewards=(RewardTerm("numeric"),), held_out=False, rows=30,
    )  # fmt: skip
    task = make_generation(config, subject)
    result = task.result(answered(task, ["1"] * 21))
    scores = {row["prompt"]: row["rewards"][0] for row in result.examples}
    assert scores["q"] is None and scores["p1"] == 1.0
    assert result.metrics["accuracy"] == result.metrics["pass@1"] == pytest.approx(1 / 20)


def test_final_numbers_are_compared_as_gsm8k_writes_them(data, subject):
    rows = [
        {"question": f"{i} and {i}?", "answer": f"{i} + {i} = <<{i}+{i}=x>>.\n#### {i * 1000:,}"}
        for i in range(1, 12)
    ]
    config = GenerationConfig(data=data(rows), rewards=(RewardTerm("numeric"),), held_out=False)
    task = make_generation(config, subject)
    texts = [f"It is {prompt.text.split()[0]}000.0 dollars." for prompt in task.prompts]
    assert task.result(answered(task, texts)).metrics["accuracy"] == 1.0
    assert task.result(answered(task, ["5"] * len(texts))).metrics["accuracy"] == 0.0


def test_a_model_is_asked(data, subject, params):
    settings = {"data": data(), "max_new_tokens": 5, "rows": 4}
    made = generation_task(GenerationConfig(**settings), subject)(params)
    again = generation_task(GenerationConfig(**settings, slots=2), subject)(params)
    assert made.examples == again.examples and len(made.examples) == 4
    assert made.metrics["completion_length"] <= 5


def test_shots_are_turns_of_prompts_that_are_not_asked(data, subject):
    plain = make_generation(GenerationConfig(data=data(), rows=4), subject)
    task = make_generation(GenerationConfig(data=data(), rows=4, shots=2), subject)
    assert [p.text for p in task.prompts] == [p.text for p in plain.prompts]
    held_out = {prompt.text for prompt in plain.prompts}
    for prompt, bare in zip(task.prompts, plain.prompts, strict=True):
        text = subject.tokenizer.decode(prompt.ids, skip_special=False)
        assert text.count("<|user|>") == 3 and text.count("<|assistant|>") == 3
        assert text.endswith(subject.tokenizer.decode(bare.ids[1:], skip_special=False))
        shown = [part.partition("<")[0] for part in text.split("<|user|>")[1:3]]
        assert not held_out & set(shown)
    with pytest.raises(UserError, match="shots=60 are more than"):
        make_generation(GenerationConfig(data=data(), shots=60), subject)
    with pytest.raises(UserError, match="no prompt fits"):
        make_generation(GenerationConfig(data=data(), shots=20), subject)


def test_bad_input_is_told_before_anything_is_asked(data, subject):
    questions = [{"prompt": f"What is {i}?"} for i in range(20)]
    with pytest.raises(UserError, match="compares with the field 'answer', which no row has"):
        make_generation(GenerationConfig(data=data(questions)), subject)
    with pytest.raises(UserError, match="max_new_tokens=256 leaves no room"):
        make_generation(GenerationConfig(data=data(), max_new_tokens=256), subject)
    for settings, message in [
        ({"samples": 2}, "samples=2 at temperature=0 are all alike"),
        ({"ks": (2,)}, "must lie between 1 and samples=1"),
        ({"rows": 0}, "rows=0"),
    ]:
        with pytest.raises(UserError, match=message):
            GenerationConfig(**settings)


def test_the_template_is_the_default_one_where_the_run_has_none(data, subject, plain_subject):
    config = GenerationConfig(data=data(), rows=2)
    with_one, without = make_generation(config, subject), make_generation(config, plain_subject)
    assert [p.ids for p in with_one.prompts] == [p.ids for p in without.prompts]
    named = dataclasses.replace(config, data=dataclasses.replace(data(), template="plain"))
    assert make_generation(named, plain_subject).prompts[0].ids != without.prompts[0].ids

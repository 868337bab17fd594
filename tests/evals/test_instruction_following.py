"""Instruction following: strict and loose, by prompt and by instruction, and what is left out."""

import dataclasses
import json

import pytest

from llm_jax.data.prompts import PromptDataConfig
from llm_jax.errors import UserError
from llm_jax.evals.instruction_following import (
    InstructionFollowingConfig,
    instruction_following_task,
)
from llm_jax.evals.subject import Subject
from llm_jax.rl import rollouts

NO_COMMA, END = "punctuation:no_comma", "startend:end_checker"
ROWS = [
    {"key": 1, "prompt": "One", "instruction_id_list": [NO_COMMA, END],
     "kwargs": [{}, {"end_phrase": "done"}]},
    {"key": 2, "prompt": "Two", "instruction_id_list": [NO_COMMA], "kwargs": [{"keywords": None}]},
    {"key": 3, "prompt": "Three", "instruction_id_list": ["language:response_language"],
     "kwargs": [{"language": "de"}]},
    {"key": 4, "prompt": "Four", "instruction_id_list": [NO_COMMA], "kwargs": [{}]},
]  # fmt: skip
ANSWERS = {"One": "*a done*", "Two": "fine", "Four": "Sure, yes:\nno commas"}


@pytest.fixture
def config(tmp_path):
    def make(rows):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = PromptDataConfig(source=str(tmp_path / "rows.jsonl"))
        return InstructionFollowingConfig(data=data, max_new_tokens=8)

    return make


def test_responses_are_judged_strictly_and_loosely(config, subject, params, monkeypatch):
    original, said = rollouts.Sample, []
    answering = lambda **fields: original(  # noqa: E731
        **{**fields, "completion_text": ANSWERS[fields["prompt_text"]]}
    )
    monkeypatch.setattr(rollouts, "Sample", answering)
    subject = dataclasses.replace(subject, log=said.append)
    result = instruction_following_task(config(ROWS), subject)(params)
    metrics = result.metrics
    assert metrics["strict/prompt_accuracy"] == pytest.approx(1 / 3)
    assert metrics["strict/instruction_accuracy"] == pytest.approx(2 / 4)
    assert metrics["loose/prompt_accuracy"] == metrics["loose/instruction_accuracy"] == 1.0
    assert metrics["strict/prompt_accuracy_stderr"] > 0
    assert {row["prompt"]: row["strict"] for row in result.examples} == {
        "One": [True, False], "Two": [True], "Four": [False],
    }  # fmt: skip
    assert len(said) == 1 and said[0].startswith("1 prompts are left out: the instruction")


def test_prompts_without_instructions_are_refused(config, subject: Subject):
    with pytest.raises(UserError, match="no prompt has instructions that can be checked"):
        instruction_following_task(config(ROWS[2:3] * 2 + [{**ROWS[2], "prompt": "x"}]), subject)

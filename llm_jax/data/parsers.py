"""One parser a format of examples: each turns the fields of a row into what they teach.

A parser reads the shape of a row; whether its turns make a legal dialogue, where the row stands
and which tools it describes is up to `formats.parse`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from llm_jax.data.examples import Comparison, Conversation, MalformedExample, Message
from llm_jax.data.fields import (
    Fields,
    as_list,
    as_number,
    as_object,
    as_truth,
    has,
    list_of,
    name_of,
    optional_text,
    text_of,
    value_of,
)
from llm_jax.data.transcripts import (
    Turns,
    answered,
    asked,
    best_path,
    shared_turns,
    transcript_of,
    turns_of,
)

STRENGTH = "strength|preference_strength"
ANSWERS = "responses|completions|answers"

# --- conversations


def messages(fields: Fields) -> list[Conversation]:
    """A list of messages."""
    return [Conversation(turns_of(value_of(fields, "messages"), "messages"))]


def sharegpt(fields: Fields) -> list[Conversation]:
    """A list of messages, before which the row may give the system's turn."""
    turns = turns_of(value_of(fields, "conversations"), "conversations")
    return [Conversation(_system(fields, "system") + turns)]


def openassistant(fields: Fields) -> list[Conversation]:
    """The best dialogue of a tree of replies."""
    turns = best_path(value_of(fields, "prompt"))
    return [Conversation(turns)] if turns else []


def prompt_completion(fields: Fields) -> list[Conversation]:
    """A prompt and its answer, each a text or a list of messages."""
    name = name_of(fields, "completion|response")
    return [Conversation(_prompt(fields, "prompt") + answered(fields[name], name))]


def self_instruct(fields: Fields) -> list[Conversation]:
    """An instruction with an answer for each of its inputs; all fall on one side of the split."""
    instruction = text_of(fields, "instruction")
    found = []
    for instance in list_of(fields, "instances"):
        instance = as_object(instance, "an instance")
        answer = text_of(instance, "output")
        conversation = _dialogue(_about(instruction, optional_text(instance, "input")), answer)
        found.append(dataclasses.replace(conversation, split_text=instruction))
    return found


def alpaca(fields: Fields) -> list[Conversation]:
    """An instruction, perhaps with an input."""
    question = _about(text_of(fields, "instruction"), optional_text(fields, "input"))
    return [_dialogue(question, text_of(fields, "output"))]


def dolly(fields: Fields) -> list[Conversation]:
    """An instruction, perhaps with a context."""
    question = _about(text_of(fields, "instruction"), optional_text(fields, "context"))
    return [_dialogue(question, text_of(fields, "response"))]


def openorca(fields: Fields) -> list[Conversation]:
    """A question, perhaps after a system's turn."""
    dialogue = _dialogue(text_of(fields, "question"), text_of(fields, "response"))
    return [Conversation(_system(fields, "system_prompt") + dialogue.messages)]


def flan(fields: Fields) -> list[Conversation]:
    """An input and its target."""
    return [_dialogue(text_of(fields, "inputs"), text_of(fields, "targets"))]


def gsm8k(fields: Fields) -> list[Conversation]:
    """A question and its answer."""
    return [_dialogue(text_of(fields, "question"), text_of(fields, "answer"))]


def text(fields: Fields) -> list[Conversation]:
    """Plain text to continue; none where it is white space."""
    plain = text_of(fields, "text")
    return [Conversation((Message("assistant", plain),))] if plain.strip() else []


# --- comparisons


def preference(fields: Fields) -> list[Comparison]:
    """A chosen and a rejected answer, to a prompt that is given or that both start with."""
    if has(fields, "prompt"):
        prompt, chosen, rejected = _prompted_pair(fields)
    elif isinstance(fields.get("chosen"), str) and isinstance(fields.get("rejected"), str):
        prompt, chosen, rejected = _cut_texts(
            text_of(fields, "chosen"), text_of(fields, "rejected")
        )
    else:
        prompt, chosen, rejected = shared_turns(
            turns_of(value_of(fields, "chosen"), "chosen"),
            turns_of(value_of(fields, "rejected"), "rejected"),
        )
    return [_pair(prompt, chosen, rejected, fields)]


def hh_rlhf(fields: Fields) -> list[Comparison]:
    """A chosen and a rejected dialogue, each written out as one text."""
    dialogues = (transcript_of(text_of(fields, name)) for name in ("chosen", "rejected"))
    return [_pair(*shared_turns(*dialogues), fields)]


def ranked(fields: Fields) -> list[Comparison]:
    """Any number of answers with their ranks (1 is the best) or scores (higher is better)."""
    name = name_of(fields, ANSWERS)
    answers = as_list(fields[name], name)
    if has(fields, "ranks"):
        scores = [-as_number(rank, "ranks") for rank in list_of(fields, "ranks")]
    elif has(fields, "scores"):
        scores = [as_number(score, "scores") for score in list_of(fields, "scores")]
    else:
        objects = [as_object(answer, f"an answer of {name!r}") for answer in answers]
        scores = [as_number(value_of(o, "overall_score"), "overall_score") for o in objects]
        answers = [text_of(o, "response") for o in objects]
    if len(scores) != len(answers):
        raise MalformedExample(f"{name!r} holds {len(answers)} answers but {len(scores)} scores")
    responses = [answered(answer, name) for answer in answers]
    return _ranking(_prompt(fields, "prompt|instruction"), responses, scores, fields)


def unpaired(fields: Fields) -> list[Comparison]:
    """One answer and whether it is good."""
    score = float(as_truth(value_of(fields, "label"), "label"))
    answer = answered(value_of(fields, "completion"), "completion")
    return [Comparison(_prompt(fields, "prompt"), (answer,), (score,), _strength(fields))]


def gsm8k_solutions(fields: Fields) -> list[Comparison]:
    """Solutions that are correct or not, the ground truth among them."""
    scores = {text_of(fields, "ground_truth"): 1.0}  # by the text: equal solutions count once
    for value in filter(is_solution, fields.values()):
        is_correct = as_truth(value["is_correct"], "is_correct")
        scores.setdefault(text_of(value, "solution"), float(is_correct))
    responses = [answered(solution, "solution") for solution in scores]
    return _ranking(_prompt(fields, "question"), responses, list(scores.values()), fields)


def is_solution(value: Any) -> bool:
    """Whether the value of a field is a solution that was judged."""
    return isinstance(value, dict) and has(value, "solution") and has(value, "is_correct")


def prompt(fields: Fields) -> list[Comparison]:
    """A prompt, a text or a list of messages, without an answer."""
    return [Comparison(_prompt(fields, "prompt|question|problem"), (), ())]


# --- their parts


def _dialogue(question: str, answer: str) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)))


def _about(instruction: str, context: str) -> str:
    """An instruction with what it is about, if anything."""
    return f"{instruction}\n\n{context}" if context.strip() else instruction


def _system(fields: Fields, name: str) -> Turns:
    said = optional_text(fields, name)
    return (Message("system", said),) if said.strip() else ()


def _prompt(fields: Fields, names: str) -> Turns:
    name = name_of(fields, names)
    return asked(fields[name], name)


def _prompted_pair(fields: Fields) -> tuple[Turns, Turns, Turns]:
    """The prompt and two answers, out of which the prompt is taken where they repeat it."""
    prompt = _prompt(fields, "prompt")
    chosen = answered(value_of(fields, "chosen"), "chosen")
    rejected = answered(value_of(fields, "rejected"), "rejected")
    if chosen[0].role == rejected[0].role == "assistant":
        return prompt, chosen, rejected
    shared, chosen, rejected = shared_turns(chosen, rejected)
    if prompt[-1] not in shared:
        raise MalformedExample("'chosen' and 'rejected' do not both repeat the prompt")
    return max(prompt, shared, key=len), chosen, rejected


def _cut_texts(chosen: str, rejected: str) -> tuple[Turns, Turns, Turns]:
    """The words that both texts start with, as the user's turn, and how each goes on."""
    cut = 0
    for position, (first, second) in enumerate(zip(chosen, rejected, strict=False), start=1):
        if first != second:
            break
        if first.isspace():
            cut = position
    prompt = chosen[:cut].strip()
    return (
        (Message("user", prompt),) if prompt else (),
        (Message("assistant", chosen[cut:]),),
        (Message("assistant", rejected[cut:]),),
    )


def _pair(prompt: Turns, chosen: Turns, rejected: Turns, fields: Fields) -> Comparison:
    if chosen == rejected:
        raise MalformedExample("'chosen' and 'rejected' are equal")
    return Comparison(prompt, (chosen, rejected), (1.0, 0.0), _strength(fields))


def _ranking(
    prompt: Turns, responses: list[Turns], scores: list[float], fields: Fields
) -> list[Comparison]:
    """One comparison, or none where no answer is better than another."""
    if len(set(scores)) < 2:
        return []
    return [Comparison(prompt, tuple(responses), tuple(scores), _strength(fields))]


def _strength(fields: Fields) -> str | None:
    """By how much the best answer is better: a level's name or its number."""
    if not has(fields, STRENGTH):
        return None
    name = name_of(fields, STRENGTH)
    if isinstance(fields[name], str):
        return text_of(fields, name)
    return f"{as_number(fields[name], name):g}"

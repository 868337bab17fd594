import dataclasses
import json

import pytest

from llm_jax.data.examples import Comparison, Conversation, MalformedExample, Message
from llm_jax.data.formats import FORMATS, detect, parse, read_examples
from llm_jax.data.sources import SourceConfig

Q, A, B = "Why?", "Because.", "No idea."


def user(text):
    return Message("user", text)


def assistant(text):
    return Message("assistant", text)


def said(role, content):
    return {"role": role, "content": content}


def dialogue(question, answer, **rest):
    return Conversation((user(question), assistant(answer)), **rest)


def answers(prompt, *scored, **rest):
    """A comparison of (answer, score), each answer one turn of that text."""
    responses = tuple((assistant(text),) for text, _ in scored)
    return Comparison(tuple(prompt), responses, tuple(score for _, score in scored), **rest)


ASKED, BRIEF = [said("user", Q)], [said("system", "Be brief.")]
ANSWER_A, ANSWER_B = [said("assistant", A)], [said("assistant", B)]
QA, SYSTEM = dialogue(Q, A), Message("system", "Be brief.")
BRIEF_QA = Conversation((SYSTEM, *QA.messages))
PAIR = answers([user(Q)], (A, 1.0), (B, 0.0))
TALK = f"\n\nHuman: Hi\n\nAssistant: Hello\n\nyou\n\nHuman: {Q}\n\nAssistant: "
TREE = dict(role="prompter", text=Q, replies=[dict(role="assistant", text=A, rank=0)])


def preferred(chosen, rejected, **rest):
    return dict(chosen=chosen, rejected=rejected, **rest)


def judged(solution, is_correct):
    return dict(solution=solution, is_correct=is_correct)


# Format → rows, each with the examples that it becomes.
ROWS = {
    "messages": [
        (dict(messages=ASKED + ANSWER_A), [QA]),
        (dict(messages=BRIEF + ASKED + ANSWER_A, prompt="of the data set", id=3), [BRIEF_QA]),
    ],
    "sharegpt": [
        (dict(conversations=[{"from": "human", "value": Q}, {"from": "gpt", "value": A}]), [QA]),
        (dict(conversations=ASKED + ANSWER_A, system="Be brief."), [BRIEF_QA]),
        (dict(conversations=ASKED + ANSWER_A, system=" "), [QA]),
    ],
    "prompt_completion": [
        (dict(prompt=Q, completion=A), [QA]),
        (dict(prompt=Q, response=A), [QA]),
        (dict(prompt=ASKED, completion=ANSWER_A), [QA]),
        (dict(prompt=BRIEF + ASKED, completion=A), [BRIEF_QA]),
    ],
    "alpaca": [
        (dict(instruction=Q, input="", output=A), [QA]),
        (dict(instruction=Q, output=A), [QA]),
        (dict(instruction=Q, input=None, output=A, text="all of it"), [QA]),
        (dict(instruction="Add.", input="1 2", output="3"), [dialogue("Add.\n\n1 2", "3")]),
    ],
    "self_instruct": [
        (
            dict(
                instruction="Add.",
                instances=[dict(input="1 2", output="3"), dict(input="", output="0")],
            ),
            [
                dialogue("Add.\n\n1 2", "3", split_text="Add."),
                dialogue("Add.", "0", split_text="Add."),
            ],
        ),
        (dict(instruction="Add.", instances=[]), []),
    ],
    "dolly": [
        (dict(instruction=Q, context=" \n", response=A, category="open_qa"), [QA]),
        (dict(instruction=Q, context="A fact.", response=A), [dialogue(f"{Q}\n\nA fact.", A)]),
    ],
    "openorca": [
        (dict(id="1", system_prompt="", question=Q, response=A), [QA]),
        (dict(system_prompt="Be brief.", question=Q, response=A), [BRIEF_QA]),
    ],
    "flan": [(dict(inputs=Q, targets=A, task="qa"), [QA])],
    "gsm8k": [(dict(question=Q, answer=A), [QA])],
    "text": [
        (dict(text="Once.\n"), [Conversation((assistant("Once.\n"),))]),
        (dict(text=" \n"), []),
    ],
    "openassistant": [(dict(message_tree_id="t", prompt=TREE), [QA])],
    "preference": [
        (preferred(A, B, prompt=Q), [PAIR]),
        (preferred(ANSWER_A, ANSWER_B, prompt=ASKED), [PAIR]),
        (preferred(ASKED + ANSWER_A, ASKED + ANSWER_B), [PAIR]),
        (preferred(ASKED + ANSWER_A, ASKED + ANSWER_B, prompt=None), [PAIR]),
        # As UltraFeedback: the prompt once more, and the best dialogue on top.
        (
            preferred(
                ASKED + ANSWER_A, ASKED + ANSWER_B, prompt=Q, messages=ASKED + ANSWER_A, score=8.0
            ),
            [PAIR],
        ),
        (
            preferred(BRIEF + ASKED + ANSWER_A, BRIEF + ASKED + ANSWER_B, prompt=Q),
            [answers([SYSTEM, user(Q)], (A, 1.0), (B, 0.0))],
        ),
        (
            preferred(ASKED + ANSWER_A, ASKED + ANSWER_B, prompt=BRIEF + ASKED),
            [answers([SYSTEM, user(Q)], (A, 1.0), (B, 0.0))],
        ),
        # The dialogues part at the user's turn, so that each answer is several turns.
        (
            preferred(
                ASKED + ANSWER_A + [said("user", "1")] + ANSWER_A,
                ASKED + ANSWER_A + [said("user", "2")] + ANSWER_A,
            ),
            [
                Comparison(
                    (user(Q),),
                    (
                        (assistant(A), user("1"), assistant(A)),
                        (assistant(A), user("2"), assistant(A)),
                    ),
                    (1.0, 0.0),
                )
            ],
        ),
        # All turns that they share are the prompt's.
        (
            preferred((ASKED + ANSWER_A) * 2, ASKED + ANSWER_A + ASKED + ANSWER_B),
            [answers((*QA.messages, user(Q)), (A, 1.0), (B, 0.0))],
        ),
        # Texts are cut between words, though "the" and "that" start alike.
        (
            preferred("Is it so? the first", "Is it so? that one"),
            [answers([user("Is it so?")], ("the first", 1.0), ("that one", 0.0))],
        ),
        (preferred("one", "two"), [answers([], ("one", 1.0), ("two", 0.0))]),
        (
            preferred(A, B, prompt=Q, strength="slightly"),
            [answers([user(Q)], (A, 1.0), (B, 0.0), strength="slightly")],
        ),
        (
            preferred(A, B, prompt=Q, preference_strength=3.0),
            [answers([user(Q)], (A, 1.0), (B, 0.0), strength="3")],
        ),
    ],
    "hh_rlhf": [
        (
            preferred(f"{TALK}{A}", f"{TALK}{B}"),
            [answers([user("Hi"), assistant("Hello\n\nyou"), user(Q)], (A, 1.0), (B, 0.0))],
        ),
        (preferred(f"Human: {Q}\n\nAssistant: {A}", f"Human: {Q}\n\nAssistant: {B}"), [PAIR]),
    ],
    "ranked": [
        (
            dict(prompt=Q, responses=[A, B, "?"], ranks=[2, 1, 2]),
            [answers([user(Q)], (A, -2.0), (B, -1.0), ("?", -2.0))],
        ),
        (
            dict(prompt=ASKED, answers=[ANSWER_A, ANSWER_B], scores=[0.5, 7]),
            [answers([user(Q)], (A, 0.5), (B, 7.0))],
        ),
        (
            dict(
                instruction=Q,
                completions=[
                    dict(response=A, overall_score=8.5),
                    dict(response=B, overall_score=2.0),
                ],
            ),
            [answers([user(Q)], (A, 8.5), (B, 2.0))],
        ),
        (dict(prompt=Q, responses=[A, B], scores=[1, 1]), []),
        (dict(prompt=Q, completions=[A], ranks=[1]), []),
    ],
    "unpaired": [
        (dict(prompt=Q, completion=A, label=label), [answers([user(Q)], (A, score))])
        for score, labels in [
            (1.0, (True, 1, 1.0, "True", "yes", "1")),
            (0.0, (False, 0, 0.0, "false ", "no", "0")),
        ]
        for label in labels
    ]
    + [(dict(prompt=ASKED, completion=ANSWER_A, label=True), [answers([user(Q)], (A, 1.0))])],
    "gsm8k_solutions": [
        (
            dict(
                question=Q,
                ground_truth=A,
                small=judged(B, False),
                again=judged(B, False),
                large=judged("Right.", True),
                repeats=judged(A, True),
            ),
            [answers([user(Q)], (A, 1.0), (B, 0.0), ("Right.", 1.0))],
        ),
        (dict(question=Q, ground_truth=A, large=judged("Right.", True)), []),
    ],
    "prompt": [
        (dict(prompt=Q, ground_truth=A), [answers([user(Q)])]),
        (dict(problem=Q, answer=A), [answers([user(Q)])]),
        (dict(question=Q), [answers([user(Q)])]),
        (dict(prompt=BRIEF + ASKED), [answers([SYSTEM, user(Q)])]),
    ],
}
CASES = [
    pytest.param(name, fields, wanted, id=f"{name}-{number}")
    for name, rows in ROWS.items()
    for number, (fields, wanted) in enumerate(rows)
]


def test_every_format_has_a_row_here():
    assert set(ROWS) == set(FORMATS)


@pytest.mark.parametrize("name, fields, wanted", CASES)
def test_a_row_is_detected_and_becomes_its_examples(name, fields, wanted):
    assert detect(fields, "here") == detect(dict(reversed(fields.items())), "here") == name
    assert parse(fields, name, "") == wanted
    kind = {"conversation": Conversation, "comparison": Comparison}[FORMATS[name].kind]
    assert all(type(example) is kind for example in wanted)


@pytest.mark.parametrize("name, fields, wanted", [case for case in CASES if case.values[2]])
def test_json_lines_and_parquet_hold_the_same_examples(tmp_path, name, fields, wanted):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "rows.jsonl").write_text((json.dumps(fields) + "\n") * 2)
    # As tables of mixed data do: a column more, which is null.
    table = pyarrow.Table.from_pylist([{**fields, "tools": None}] * 2)
    parquet.write_table(table, tmp_path / "rows.parquet")
    for path in (tmp_path / "rows.jsonl", tmp_path / "rows.parquet"):
        found = list(read_examples(SourceConfig(source=str(path))))
        places = [f"{path}:{row}" for row in (1, 2) for _ in wanted]
        assert [example.where for example in found] == places
        assert [dataclasses.replace(example, where="") for example in found] == wanted * 2


@pytest.mark.parametrize(
    "fields, why",
    [
        (dict(prompt=Q, completion=" "), "turn 2 (assistant) is empty"),
        (dict(prompt="", completion=A), "turn 1 (user) is empty"),
        (dict(prompt=Q, completion=None), "'completion' is null"),
        (dict(prompt=Q, completion=7), "'completion' is int, a string is wanted"),
        (dict(prompt=Q, completion="\ud83d"), "'completion' is not Unicode text"),
        (dict(prompt=Q, completion=ASKED), "turn 2 has role 'user' after 'user'"),
        (dict(prompt=Q, completion=[]), "'completion' holds no turn"),
        (dict(prompt=["x"], completion=A), "turn 1 of 'prompt': the turn is str"),
        (dict(prompt=Q, completion=A, split_text=3), "'split_text' is int"),
        (dict(instruction=Q, input=3, output=A), "'input' is int"),
        (dict(instruction=Q, output=""), "turn 2 (assistant) is empty"),
        (dict(instruction=Q, instances={}), "'instances' is dict, a list is wanted"),
        (dict(instruction=Q, instances=[A]), "an instance is str"),
        (dict(instruction=Q, instances=[{"input": A}]), "no field 'output', it has 'input'"),
        (dict(instruction=Q, context=[A], response=A), "'context' is list"),
        (dict(system_prompt=1, question=Q, response=A), "'system_prompt' is int"),
        (dict(inputs=Q, targets="\udc80"), "'targets' is not Unicode"),
        (dict(question=Q, answer="\n"), "turn 2 (assistant) is empty"),
        (dict(text=None), "'text' is null"),
        # preference
        (preferred(A, A, prompt=Q), "'chosen' and 'rejected' are equal"),
        (preferred(A, A), "'chosen' and 'rejected' are equal"),
        (preferred(ASKED + ANSWER_A, ASKED + ANSWER_A), "'chosen' and 'rejected' are equal"),
        (preferred(A, "", prompt=Q), "answer 2: turn 2 (assistant) is empty"),
        (preferred(None, B, prompt=Q), "'chosen' is null"),
        (preferred(3, B, prompt=Q), "'chosen' is int"),
        (preferred(A, "\ud83d", prompt=Q), "'rejected' is not Unicode"),
        (preferred(A, ANSWER_B), "'chosen' is str, a list is wanted"),
        (preferred(ANSWER_A, B), "'rejected' is str, a list is wanted"),
        (preferred(A, B, prompt=" "), "answer 1: turn 1 (user) is empty"),
        (preferred(A, B, prompt=ASKED + ANSWER_A), "answer 1: turn 3 has role 'assistant' after"),
        (
            preferred([said("user", "1"), *ANSWER_A], [said("user", "2"), *ANSWER_A]),
            "answer 1 does not start with the assistant's turn",
        ),
        (preferred(ASKED + ASKED + ANSWER_A, ASKED), "turn 2 has role 'user' after 'user'"),
        (preferred(ASKED + ANSWER_A, ASKED + ANSWER_B, prompt="Else?"), "both repeat the prompt"),
        (preferred(ASKED + ANSWER_A, ANSWER_B, prompt=Q), "both repeat the prompt"),
        (preferred(A, B, prompt=Q, strength=[]), "'strength' holds []"),
        # unpaired
        (dict(prompt=Q, completion=A, label=None), "'label' is null"),
        (dict(prompt=Q, completion=A, label=2), "'label' is 2, true or false is wanted"),
        (dict(prompt=Q, completion=A, label="good?"), "'label' is 'good?'"),
        (dict(prompt=Q, completion="", label=True), "answer 1: turn 2 (assistant) is empty"),
        (dict(prompt=Q, completion=ASKED, label=True), "answer 1 does not start with the assist"),
        # ranked
        (dict(prompt=Q, responses=[A, B], ranks=[1]), "'responses' holds 2 answers but 1 scores"),
        (dict(prompt=Q, responses=[A], scores=[1, 2]), "'responses' holds 1 answers but 2 scores"),
        (dict(prompt=Q, responses=[A, B], scores=[1, float("nan")]), "'scores' holds nan"),
        (dict(prompt=Q, responses=[A, B], ranks=[1, "2"]), "'ranks' holds '2', a number"),
        (dict(prompt=Q, responses=[A, B], ranks=[1, True]), "'ranks' holds True"),
        (dict(prompt=Q, responses=[A, B], ranks=1), "'ranks' is int, a list is wanted"),
        (dict(prompt=Q, responses=[A, 3], ranks=[1, 2]), "'responses' is int"),
        (dict(prompt=Q, responses=[A, " "], ranks=[1, 2]), "answer 2: turn 2 (assistant)"),
        (dict(prompt=Q, responses=[A, B, A], ranks=[1, 2, 2]), "answer 3 equals another one"),
        (dict(instruction=Q, completions=[dict(overall_score=1.0)]), "no field 'response'"),
        # prompt
        (dict(prompt=" "), "turn 1 (user) is empty"),
        (dict(prompt=None), "'prompt' is null"),
        (dict(prompt=ASKED + ANSWER_A), "the prompt ends with role 'assistant'"),
        # gsm8k_solutions
        (dict(question=Q, ground_truth=A, x=judged(B, "?")), "'is_correct' is '?'"),
        (dict(question=Q, ground_truth=A, x=judged("", False)), "answer 2: turn 2 (assistant)"),
    ],
)
def test_a_malformed_row_says_why(fields, why):
    with pytest.raises(MalformedExample) as caught:
        parse(fields, detect(fields, "here"), "here")
    message = str(caught.value)
    assert why in message and "\n" not in message and not message.endswith(".")

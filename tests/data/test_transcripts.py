import json

import pytest

from llm_jax.data.examples import Conversation, MalformedExample, Message
from llm_jax.data.formats import detect, parse, read_examples
from llm_jax.data.sources import ReadCounts, SourceConfig
from llm_jax.errors import UserError

Q, A = "Why?", "Because."


def user(text):
    return Message("user", text)


def assistant(text, **options):
    return Message("assistant", text, **options)


def said(role, content, **rest):
    return {"role": role, "content": content, **rest}


ASKED, ANSWERED = [said("user", Q)], [said("assistant", A)]
QA = (user(Q), assistant(A))


def parsed(fields):
    return parse(fields, detect(fields, "here"), "")


def turns(messages):
    (example,) = parsed({"messages": messages})
    return example.messages


def why_malformed(fields):
    with pytest.raises(MalformedExample) as caught:
        parsed(fields)
    message = str(caught.value)
    assert "\n" not in message and not message.endswith(".")
    return message


# --- messages


@pytest.mark.parametrize(
    "first, second", [("user", "assistant"), ("human", "gpt"), ("Human", "bot")]
)
def test_roles_go_by_many_names(first, second):
    assert turns([said(first, Q), said(second, A)]) == QA
    assert turns([said("prompter", Q), said("model", A)]) == QA
    assert turns([said("developer", "Be brief."), *ASKED, *ANSWERED]) == (
        Message("system", "Be brief."),
        *QA,
    )


def test_content_in_parts_is_joined():
    parts = [{"type": "text", "text": "Be"}, {"type": "text", "text": "cause."}]
    assert turns([*ASKED, said("assistant", parts)]) == QA


def test_a_weight_decides_whether_a_turn_is_trained_on():
    messages = [
        *(*ASKED, said("assistant", A, weight=0)),
        *(*ASKED, said("assistant", A, train=False)),
        *(*ASKED, said("assistant", A, weight=1)),
        *(*ASKED, said("assistant", A, train=None)),
    ]
    assert [m.trained for m in turns(messages)[1::2]] == [False, False, True, True]


def calling(**call):
    return [*ASKED, said("assistant", "", tool_calls=[call])]


@pytest.mark.parametrize(
    "messages, why",
    [
        ([], "'messages' holds no turn"),
        ("none", "'messages' is str, a list is wanted"),
        (ASKED + ASKED + ANSWERED, "turn 2 has role 'user' after 'user'"),
        ([*ASKED, said("system", A), *ANSWERED], "turn 2 has role 'system'"),
        ([*ASKED, said("tool", A)], "turn 2 has role 'tool'"),
        (ASKED, "no assistant's turn to learn from"),
        ([*ASKED, said("assistant", A, weight=0)], "no assistant's turn to learn from"),
        ([*ASKED, said("assistant", A, weight=0.5)], "'weight' is 0.5"),
        ([*ASKED, said("narrator", A)], "turn 2 of 'messages': the role 'narrator' is unknown"),
        ([*ASKED, {"content": A}], "turn 2 of 'messages': the row has no field 'role|from'"),
        ([*ASKED, said(3, A)], "'role' is int"),
        ([*ASKED, said("assistant", None)], "'content' is null"),
        ([*ASKED, said("assistant", "\ud83d")], "'content' is not Unicode text"),
        ([*ASKED, said("assistant", {"text": A})], "'content' is dict"),
        ([*ASKED, said("assistant", [{"type": "image_url"}])], "has type 'image_url', not 'text'"),
        ([*ASKED, said("assistant", [A])], "a part of 'content' is str"),
        (calling(arguments={}), "the row has no field 'name'"),
        (calling(name="f", arguments="{"), "the arguments of 'f' is not JSON"),
        (calling(name="f", arguments="[1]"), "the arguments of 'f' is list, an object is wanted"),
        (calling(name="f", arguments={"x": "\ud83d"}), "the arguments of 'f' is not JSON"),
        (calling(name="f", arguments={"x": b"bytes"}), "the arguments of 'f' is not JSON"),
        ([*ASKED, said("assistant", A, tool_calls="f()")], "'tool_calls' is str"),
        ([*ASKED, said("assistant", A, tool_calls=["f()"])], "a call is str"),
        ([*ASKED, said("function_call", "f()")], "the call is not JSON"),
    ],
)
def test_malformed_messages(messages, why):
    assert why in why_malformed({"messages": messages})


@pytest.mark.parametrize("tools", ["{", "3", [3], {"name": "f"}, [{"x": "\ud83d"}]])
def test_malformed_tools(tools):
    why = why_malformed({"messages": ASKED + ANSWERED, "tools": tools})
    assert "tool" in why and ("wanted" in why or "not JSON" in why)


# --- tools

WEATHER = {"name": "weather", "parameters": {"type": "object"}}
CALL = {"name": "weather", "arguments": {"city": "Ulm"}}


@pytest.mark.parametrize(
    "call",
    [
        {"id": "c1", "type": "function", "function": {**CALL, "arguments": '{"city": "Ulm"}'}},
        {"type": "function", "function": CALL},
        CALL,
        {**CALL, "arguments": '{"city": "Ulm"}'},
    ],
)
def test_tool_calls_of_every_shape_become_one(call):
    messages = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        said("tool", "rain", tool_call_id=call.get("id")),
        *ANSWERED,
    ]
    wanted = Conversation(
        (
            user(Q),
            assistant("", tool_calls=(CALL,)),
            Message("tool", "rain", name="weather"),
            assistant(A),
        ),
        tools=(WEATHER,),
    )
    for tools in ([WEATHER], json.dumps([WEATHER]), [{"type": "function", "function": WEATHER}]):
        assert parsed({"messages": messages, "tools": tools}) == [wanted]


def test_a_turn_may_say_something_and_call():
    (_, turn) = turns([*ASKED, said("assistant", A, tool_calls=[CALL])])
    assert turn == assistant(A, tool_calls=(CALL,))


def test_a_call_without_arguments_and_no_tools():
    for arguments in ("", None, {}):
        call = {"name": "now", "arguments": arguments}
        (example,) = parsed({"messages": [*ASKED, said("assistant", "", tool_calls=[call])]})
        assert example.messages[1].tool_calls == ({"name": "now", "arguments": {}},)
    for tools in ([], " ", "[]", None):
        assert parsed({"messages": ASKED + ANSWERED, "tools": tools}) == [Conversation(QA)]


def test_a_function_call_of_sharegpt_and_of_old_messages():
    wanted = (user(Q), assistant("", tool_calls=(CALL,)), Message("tool", "rain", name="weather"))
    turns = [
        {"from": "human", "value": Q},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "rain"},
    ]
    assert parsed({"conversations": turns, "tools": json.dumps([WEATHER])}) == [
        Conversation(wanted, tools=(WEATHER,))
    ]
    old = {"role": "assistant", "content": None, "function_call": CALL}
    messages = [*ASKED, old, said("function", "rain", name="weather")]
    assert parsed({"messages": messages}) == [Conversation(wanted)]


def test_a_tool_answers_the_call_of_its_id_else_the_next_one():
    def names(*answers):
        calls = [{"id": f"id of {name}", **CALL, "name": name} for name in ("a", "b", "c")]
        called = said("assistant", "", tool_calls=calls)
        (example,) = parsed({"messages": [*ASKED, called, *answers]})
        return [message.name for message in example.messages[2:]]

    by_order = [said("tool", "x")] * 4
    assert names(*by_order) == ["a", "b", "c", None]
    assert names(said("tool", "x", tool_call_id="id of b"), *by_order[:2]) == ["b", "a", "c"]
    assert names(said("tool", "x", name="own"), *by_order[:1]) == ["own", "b"]


# --- transcripts


def test_a_transcript_is_cut_at_its_speakers():
    before = f"\n\nHuman: {Q}\n\nAssistant: So.\n\nHuman: is a word\n\nHuman beings\n\nAssistant:"
    (example,) = parsed({"chosen": f"{before} yes", "rejected": f"{before} no "})
    assert example.prompt == (user(Q), assistant("So."), user("is a word\n\nHuman beings"))
    assert example.responses == ((assistant("yes"),), (assistant("no"),))


@pytest.mark.parametrize(
    "rejected, why",
    [
        ("\n\nHuman: Hi\n\nAssistant:", "turn 2 (assistant) is empty"),
        ("\n\nHuman: Hi\n\nAssistant: Hello", "are equal"),
        ("\n\nHuman: Hi\n\nHuman: Yo\n\nAssistant: Hi", "turn 2 has role 'user' after 'user'"),
        ("Hi\n\nHuman: Hi\n\nAssistant: Ho", "does not start with 'Human:' or 'Assistant:'"),
        ("", "does not start with 'Human:' or 'Assistant:'"),
        (None, "'rejected' is null"),
    ],
)
def test_malformed_transcripts(rejected, why):
    fields = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": rejected}
    assert why in why_malformed(fields)


# --- trees

TREE = {
    "role": "prompter",
    "text": Q,
    "replies": [
        {"role": "assistant", "text": "third", "replies": []},
        {"role": "assistant", "text": "second", "rank": 1, "replies": []},
        {
            "role": "assistant",
            "text": "first",
            "rank": 0,
            "replies": [{"role": "prompter", "text": "unanswered", "replies": []}],
        },
    ],
}

FLAT = [
    {"message_id": "2", "parent_id": "1", "role": "assistant", "text": "worse", "rank": 1.0},
    {"message_id": "4", "parent_id": "3", "role": "prompter", "text": "And?", "rank": None},
    {"message_id": "1", "parent_id": None, "role": "prompter", "text": Q, "rank": None},
    {"message_id": "3", "parent_id": "1", "role": "assistant", "text": "better", "rank": 0.0},
    {"message_id": "5", "parent_id": "4", "role": "assistant", "text": A, "rank": float("nan")},
    {"message_id": "6", "parent_id": "4", "role": "assistant", "text": "most liked", "rank": 2},
]


def jsonl(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def examples(path, format=None, counts=None, **options):
    return list(read_examples(SourceConfig(source=str(path), **options), format, counts))


def tree_rows(tree="t", **changes):
    """The rows of FLAT; changes: fields to set by message, as m3={"deleted": True}."""
    return [
        {**row, "lang": "en", "message_tree_id": tree, **changes.get(f"m{row['message_id']}", {})}
        for row in FLAT
    ]


def test_a_nested_tree_gives_the_best_ranked_dialogue_up_to_its_last_answer():
    (example,) = parsed({"prompt": TREE, "message_tree_id": "t"})
    assert example.messages == (user(Q), assistant("first"))
    assert parsed({"prompt": {**TREE, "deleted": True}}) == []
    assert parsed({"prompt": {**TREE, "replies": []}}) == []
    assert parsed({"prompt": {**TREE, "replies": None}}) == []


def test_rows_of_a_tree_in_any_order_are_joined(tmp_path):
    best = (user(Q), assistant("better"), user("And?"), assistant("most liked"))
    rows = tree_rows("t") + list(reversed(tree_rows("u")))
    assert {detect(row, "here") for row in rows} == {"openassistant"}
    path = jsonl(tmp_path, rows)
    assert [e.messages for e in examples(path)] == [best, best]
    assert [e.messages for e in examples(path, "openassistant")] == [best, best]
    assert [e.where for e in examples(path)] == [f"{path}:1", f"{path}:7"]
    # Another format takes the rows as they come.
    assert [e.messages[0].content for e in examples(path, "text")] == [r["text"] for r in rows]


@pytest.mark.parametrize("mark", [{"deleted": True}, {"review_result": False}])
def test_messages_that_were_deleted_or_not_approved_are_left_out(tmp_path, mark):
    def path_of(**changes):
        path = jsonl(tmp_path, tree_rows(**changes))
        return [m.content for e in examples(path) for m in e.messages]

    assert path_of(m3=mark) == [Q, "worse"]
    assert path_of(m6=mark) == [Q, "better", "And?", A]
    assert path_of(m4=mark) == [Q, "better"]
    assert path_of(m4={"deleted": False, "review_result": True})[2:] == ["And?", "most liked"]
    assert path_of(m4={"deleted": None, "review_result": None})[2:] == ["And?", "most liked"]


def test_a_torn_tree_is_malformed(tmp_path):
    torn = tree_rows("t")[:2] + tree_rows("u") + tree_rows("t")[2:]
    path = jsonl(tmp_path, torn)
    with pytest.raises(UserError, match=f"{path}:1: the tree has no first message"):
        examples(path)
    counts = ReadCounts()
    assert len(examples(path, counts=counts, malformed="skip")) == 2
    assert (counts.documents, counts.skipped) == (2, 1)


REPLY = {"role": "assistant", "text": A}


@pytest.mark.parametrize(
    "tree, why",
    [
        ({**TREE, "role": "narrator"}, "the role 'narrator' is unknown"),
        ({**TREE, "text": None}, "'text' is null"),
        ({**TREE, "text": "\ud83d"}, "'text' is not Unicode"),
        ({**TREE, "replies": "none"}, "'replies' is str"),
        ({**TREE, "replies": ["none"]}, "a message of the tree is str"),
        ({**TREE, "replies": [{**REPLY, "rank": "0"}]}, "'rank' holds '0'"),
        (
            {**TREE, "replies": [{**TREE, "replies": [REPLY]}]},
            "turn 2 has role 'user' after 'user'",
        ),
    ],
)
def test_malformed_trees(tree, why):
    assert why in why_malformed({"prompt": tree})

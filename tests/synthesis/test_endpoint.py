"""Endpoints: what is sent, what comes back, and what goes wrong on the way."""

import math
import threading

import jax
import pytest

from llm_jax.data.examples import Message
from llm_jax.errors import UserError
from llm_jax.synthesis.endpoint import Endpoint, EndpointConfig, letter_of
from llm_jax.synthesis.responders import Reply, Unanswered

KEY = jax.random.key(0)


@pytest.fixture
def judge(endpoint):
    """`judge(**settings)`: the fake endpoint as a responder."""
    return lambda **settings: Endpoint(EndpointConfig(endpoint.url, "tiny", **settings))


def test_dialogues_are_sent_and_answers_come_in_their_order(endpoint, judge, user, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    endpoint.says = lambda body: f" to {body['messages'][-1]['content']}\n"
    dialogues = [(Message("system", "s"), *user(str(i))) for i in range(20)]
    replies = judge(max_new_tokens=7, temperature=0.5).answer(dialogues, KEY)
    assert replies == [Reply(f"to {i}", True) for i in range(20)]
    chat = next(chat for chat in endpoint.asked if chat.body["messages"][-1]["content"] == "3")
    assert chat.key == "Bearer secret"
    assert chat.body == {
        "model": "tiny",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "3"}],
        "max_tokens": 7,
        "temperature": 0.5,
    }


def test_so_many_requests_are_under_way_at_a_time(endpoint, judge, user):
    meeting = threading.Barrier(4, timeout=10)
    endpoint.says = lambda body: str(meeting.wait() >= 0)
    replies = judge(concurrency=4).answer([user("a")] * 8, KEY)
    assert [reply.text for reply in replies] == ["True"] * 8


def test_an_answer_that_was_cut_is_not_finished(endpoint, judge, user):
    endpoint.reason = "length"
    assert judge().answer([user("a")], KEY) == [Reply("fine", False)]


def test_what_fails_for_the_moment_is_tried_again(endpoint, judge, user):
    codes = [(429, "slow down"), (503, "busy"), "there"]
    endpoint.says = lambda body: codes[len(endpoint.asked) - 1]
    assert judge(retries=2).answer([user("a")], KEY) == [Reply("there", True)]
    endpoint.asked.clear()
    (reply,) = judge(retries=1).answer([user("a")], KEY)
    assert isinstance(reply, Unanswered) and "busy" in str(reply)


def test_what_is_wrong_with_one_request_costs_that_one(endpoint, judge, user):
    endpoint.says = lambda body: (400, "too long") if len(str(body)) > 300 else "there"
    long, short = judge().answer([user("a" * 300), user("a")], KEY)
    assert isinstance(long, Unanswered) and "too long" in str(long)
    assert short == Reply("there", True)
    endpoint.says = lambda body: None  # as with a refusal in a field of its own
    assert judge().answer([user("a")], KEY) == [Reply("", True)]


def test_no_answer_in_time_costs_that_one(endpoint, judge, user):
    late = threading.Event()
    endpoint.says = lambda body: str(late.wait(10))
    (reply,) = judge(timeout=0.1, retries=0).answer([user("a")], KEY)
    late.set()
    assert isinstance(reply, Unanswered) and "no answer within 0.1 s" in str(reply)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_an_endpoint_that_refuses_us_ends_the_work(endpoint, judge, user, status):
    endpoint.says = lambda body: (status, "not you")
    with pytest.raises(UserError, match=r"refuses to serve 'tiny' .*not you.*OPENAI_API_KEY"):
        judge().answer([user("a")] * 3, KEY)


def test_an_endpoint_that_is_not_there_ends_the_work(user):
    nowhere = Endpoint(EndpointConfig("http://127.0.0.1:1/v1", "tiny", retries=0))
    with pytest.raises(UserError, match=r"http://127.0.0.1:1/v1 cannot be reached \(.*refused"):
        nowhere.answer([user("a")], KEY)


def test_the_letter_of_an_answer_is_a_leaning(endpoint, judge):
    endpoint.says = lambda body: body["messages"][0]["content"]
    first, second, nonsense = judge().lean(["A", "**B**", "Both are\nnice"])
    assert (first.log_odds, second.log_odds, first.mass) == (math.inf, -math.inf, 1.0)
    assert str(nonsense) == "the judge named no letter but said 'Both are nice'"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        (" b", None),
        ("(B)", "B"),
        ('"A".', "A"),
        ("**B**", "B"),
        ("A. It is shorter than B.", "A"),
        ("B: kinder", "B"),
        ("The answer is B because it is kinder than A.", "B"),
        ("**Answer:** A", "A"),
        ("Response A is rude, response B is kind.\n\nB", "B"),
        ("I prefer (B).", "B"),
        ("Both (A) and (B) are fine.", None),
        ("A\nB", None),
        ("A good response would be kind.", None),
        ("Neither.", None),
        ("", None),
    ],
)
def test_letters_are_read_where_they_are_given(text, letter):
    assert letter_of(text) == letter


def test_a_model_has_to_be_named(endpoint):
    with pytest.raises(UserError, match="say which one"):
        EndpointConfig(endpoint.url, "")

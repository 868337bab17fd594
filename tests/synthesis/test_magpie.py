"""Instructions and answers of a model that is known: every token has its probability, whatever
stands before it."""

import itertools
from collections import Counter

import jax
import pytest

from llm_jax.data.formats import parse
from llm_jax.data.template_base import UserTurn
from llm_jax.data.template_jinja import JinjaTemplate
from llm_jax.data.templates import TEMPLATES
from llm_jax.data.tokenizer_base import ByteTokenizer
from llm_jax.errors import UserError
from llm_jax.generation.continuous import generate_many
from llm_jax.generation.sampler import SamplerConfig
from llm_jax.synthesis.magpie import Magpie, MagpieConfig

BYTES = ByteTokenizer()
END = BYTES.special_ids["end_of_turn"]
LETTERS = {ord(letter): 0.0 for letter in "abcdefghijklmnopqrstuvwxyz "}
ENDING = LETTERS | {END: 0.3}  # after 20 letters or so
BROKEN = ENDING | {0xFF: 0.0}  # with a byte that is in no text


@pytest.fixture
def magpie(responder):
    """`magpie(weights, reward, **config)`: one that samples freely."""

    def make(weights, reward=None, *, template="chatml", answers=40, batch=8, **config):
        settings = {"max_instruction_tokens": 30, "min_instruction_tokens": 1,
                    "min_answer_tokens": 1, "similarity": 1.0, "min_reward": None}  # fmt: skip
        return Magpie(
            responder(weights, template, max_new_tokens=answers, temperature=1.0),
            SamplerConfig(),
            MagpieConfig(**{**settings, **config}),
            reward,
            batch=batch,
        )

    return make


def test_instructions_go_on_from_the_template_until_the_user_is_through(magpie, unigram):
    bird = magpie(unigram(ENDING))
    rows = list(bird.rows(20, 200, 0))
    run = bird._responder.run
    with jax.set_mesh(run.mesh):
        made = generate_many(
            run.model, run.params, [[BYTES.bos_id, BYTES.special_ids["user"]]], samples=20,
            max_new_tokens=30, sampler=SamplerConfig(), stop_ids=[END, BYTES.eos_id], slots=8,
            rng=jax.random.split(jax.random.fold_in(jax.random.key(0), 0))[0],
        )  # fmt: skip
    spoken = [
        BYTES.decode(tokens[:length]).strip()
        for tokens, length, stopped in zip(made.tokens, made.lengths, made.stopped, strict=True)
        if stopped
    ]
    said = [row["messages"][0]["content"] for row in rows]
    assert len(said) == 20 and said[0] in spoken
    assert [text for text in spoken if text in said] == said[: sum(text in said for text in spoken)]


def test_rows_are_conversations_with_their_counts(magpie, unigram):
    for row in magpie(unigram(ENDING)).rows(5, 100, 1):
        (conversation,) = parse(row, "messages", "here")
        user, assistant = conversation.messages
        assert row["instruction_tokens"] == len(user.content) <= 30
        assert row["answer_tokens"] == len(assistant.content) <= 40
        assert set(row) == {"messages", "instruction_tokens", "answer_tokens"}


def test_the_seed_decides_and_nothing_else(magpie, unigram):
    weights = unigram(ENDING)
    rows = list(magpie(weights).rows(12, 120, 0))
    assert list(magpie(weights, batch=3).rows(12, 120, 0)) == rows
    assert list(magpie(weights).rows(12, 120, 1)) != rows


def test_everything_sampled_is_kept_or_counted(magpie, unigram):
    bird = magpie(
        unigram(BROKEN), min_instruction_tokens=5, min_answer_tokens=3, similarity=0.3, answers=20
    )
    rows = list(bird.rows(20, 100, 0))
    assert bird.sampled == len(rows) + sum(bird.dropped.values()) <= 100
    for why in ("instruction unfinished", "instruction short", "instruction garbled",
                "answer unfinished", "answer short", "answer garbled"):  # fmt: skip
        assert bird.dropped[why] > 0, why
    for row in rows:
        assert row["instruction_tokens"] >= 5 and row["answer_tokens"] >= 3
        assert "\ufffd" not in str(row)


def test_what_was_asked_before_is_dropped(magpie, unigram):
    bird = magpie(unigram({97: 0.0, 98: 0.0, END: 0.0}), similarity=0.7)
    rows = list(bird.rows(200, 400, 0))
    said = [row["messages"][0]["content"] for row in rows]
    assert len(said) == len(set(said)) and bird.dropped["instruction repeated"] > 100


def test_attempts_are_limited(magpie, unigram):
    bird = magpie(unigram({97: 0.0}))
    assert list(bird.rows(4, 10, 0)) == []
    assert bird.sampled == 10 and bird.dropped == Counter({"instruction unfinished": 10})


def test_an_instruction_too_long_to_be_answered_is_counted(magpie, unigram):
    bird = magpie(unigram(ENDING), answers=500, min_instruction_tokens=20)
    assert list(bird.rows(2, 40, 0)) == [] and bird.dropped["instruction too long to answer"] > 0


def test_rewards_are_written_and_low_ones_dropped(magpie, unigram):
    def reward(samples):
        lengths = [len(sample.completion_text.strip()) for sample in samples]
        return [ValueError("long") if n > 25 else float(n) for n in lengths]

    bird = magpie(unigram(ENDING), reward, min_reward=8.0)
    rows = list(bird.rows(20, 200, 0))
    assert len(rows) == 20
    assert all(row["reward"] == len(row["messages"][1]["content"]) >= 8 for row in rows)
    assert bird.dropped["reward low"] > 0 and bird.dropped["without a reward"] > 0


def test_a_reward_is_asked_about_the_tokens_that_were_sampled(magpie, unigram):
    seen = []
    bird = magpie(unigram(ENDING), lambda samples: seen.extend(samples) or [1.0] * len(samples))
    rows = list(bird.rows(4, 40, 0))
    for sample, row in zip(seen, rows, strict=False):
        user, assistant = (message["content"] for message in row["messages"])
        assert BYTES.decode(sample.prompt_ids) == user
        assert sample.completion_ids[-1] == END
        assert BYTES.decode(sample.completion_ids).strip() == assistant


def test_a_turn_may_end_with_text(magpie, unigram):
    bird = magpie(unigram(LETTERS | {BYTES.eos_id: 0.0}), template="llama2")
    bird._turn = UserTurn(bird._turn.prefix, bird._turn.stop_ids, "e")
    rows = list(bird.rows(10, 100, 0))
    assert len(rows) == 10
    assert not any("e" in row["messages"][0]["content"] for row in rows)


@pytest.mark.parametrize(
    ("name", "before", "ends", "string"),
    [
        ("chatml", "<|bos|><|user|>", ["<|end_of_turn|>", "<|eos|>"], None),
        ("llama2", "<|bos|>[INST]", ["<|eos|>"], " [/INST]"),
        ("zephyr", "<|bos|><|user|>\n", ["<|eos|>"], None),
    ],
)
def test_templates_tell_where_a_user_begins_and_ends(name, before, ends, string):
    turn = TEMPLATES[name].user_turn(BYTES)
    assert BYTES.decode(turn.prefix, skip_special=False) == before
    assert [BYTES.decode([id_], skip_special=False) for id_ in turn.stop_ids] == ends
    assert turn.stop_string == string


SYSTEM = "{{ bos_token }}<|system|>Be kind.<|end_of_turn|>"


@pytest.mark.parametrize(
    ("source", "before", "string"),
    [
        (SYSTEM + "<|user|>\n{{ text }}<|end_of_turn|>\n", SYSTEM[15:] + "<|user|>\n", None),
        ("{{ bos_token }}[INST] {{ text }} [/INST]", "[INST]", " [/INST]"),
        ("{{ bos_token }}Human: {{ text }}\n\nAssistant: ", "Human:", "\n\nAssistant:"),
    ],
)
def test_published_templates_tell_it_too(source, before, string):
    source = source.replace("{{ text }}", "{{ messages[0]['content'] | trim }}")
    turn = JinjaTemplate("published", (("default", source),)).user_turn(BYTES)
    assert BYTES.decode(turn.prefix, skip_special=False) == "<|bos|>" + before
    assert (turn.stop_string, turn.stop_ids[0]) == (string, END if string is None else BYTES.eos_id)


def test_a_template_that_leaves_the_user_out_is_refused():
    with pytest.raises(UserError, match="'mute' does not write out what users say"):
        JinjaTemplate("mute", (("default", "{{ bos_token }}<|assistant|>"),)).user_turn(BYTES)


def test_a_template_without_turns_is_refused(magpie, unigram):
    with pytest.raises(UserError, match="'plain' does not tell where users end"):
        magpie(unigram(ENDING), template="plain")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"min_instruction_tokens": 31}, "31 to 30 tokens"),
        ({"min_instruction_tokens": 0}, "0 to 30 tokens"),
        ({"min_answer_tokens": 0}, "min_answer_tokens=0"),
        ({"similarity": 0.0}, "similarity=0.0"),
    ],
)
def test_impossible_filters_are_refused(magpie, unigram, config, message):
    with pytest.raises(UserError, match=message):
        magpie(unigram(ENDING), **config)


def test_instructions_longer_than_the_model_reads_are_refused(magpie, unigram):
    bird = magpie(unigram(ENDING), max_instruction_tokens=511)
    with pytest.raises(UserError, match="512"):
        next(itertools.chain(bird.rows(1, 1, 0), [None]))

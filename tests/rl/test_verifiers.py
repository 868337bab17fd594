"""What each verifier takes for right, and which rows it refuses."""

import http.server
import sys
import threading

import pytest

from llm_jax.data.examples import MalformedExample
from llm_jax.errors import UserError
from llm_jax.rl import sandbox, verifiers
from llm_jax.rl.verifiers import (
    ExactMatchConfig,
    JsonSchemaConfig,
    NumericConfig,
    RegexConfig,
    UnitTestsConfig,
    exact_match,
    fenced,
    json_schema,
    numeric,
    regex,
    unit_tests,
)


def check(reward, completion, /, **row):
    return reward("What?", completion, row)


def test_an_exact_match_is_one_but_for_the_space_around_it():
    reward = exact_match(ExactMatchConfig())
    assert check(reward, " 132\n", answer="132") == 1.0
    assert check(reward, "132.", answer="132") == 0.0
    assert check(reward, "132", answer=132) == 1.0
    normalised = exact_match(ExactMatchConfig(normalised=True))
    assert check(normalised, "the Cat!", answer="a cat") == 1.0
    assert check(reward, "the Cat!", answer="a cat") == 0.0


def test_what_counts_stands_after_the_last_marker():
    reward = exact_match(ExactMatchConfig(answer_after="####"))
    assert check(reward, "#### 1 so #### 72", answer="long\n#### 72") == 1.0
    assert check(reward, "#### 72", answer="72") == 1.0
    assert check(reward, "72", answer="72") == 0.0


def test_the_answer_is_found_under_the_first_of_its_names():
    reward = exact_match(ExactMatchConfig(field="solution|completion"))
    assert check(reward, "a", completion="a") == 1.0
    assert check(reward, "a", completion="a", solution="b") == 0.0
    with pytest.raises(MalformedExample, match="no field 'solution"):
        check(reward, "a", answer="a")
    with pytest.raises(MalformedExample, match="list"):
        check(reward, "a", solution=["a"])
    with pytest.raises(MalformedExample):
        check(reward, "True", solution=True)


def test_numbers_are_compared_as_numbers():
    reward = numeric(NumericConfig())
    assert check(reward, "She has $1,234.00 left.", answer="so\n#### 1234") == 1.0
    assert check(reward, "1233", answer="#### 1234") == 0.0
    assert check(reward, "nothing", answer="#### 1234") == 0.0
    assert check(reward, "0.3333333333", answer="1/3") == 1.0
    assert check(reward, "0.33", answer="1/3") == 0.0
    assert check(reward, "7", answer=7.0) == 1.0
    with pytest.raises(ValueError, match="'answer' holds no number"):
        check(reward, "7", answer="seven")


def test_the_tolerance_is_a_share_of_large_numbers_and_of_one():
    reward = numeric(NumericConfig(tolerance=0.125))
    assert check(reward, "1125", answer="1000") == 1.0
    assert check(reward, "1126", answer="1000") == 0.0
    assert check(reward, "-1125", answer="-1000") == 1.0
    assert check(reward, "0.125", answer="0") == 1.0
    with pytest.raises(UserError, match=r"tolerance=-1 must lie in \[0, 1\)"):
        NumericConfig(tolerance=-1)


def test_a_pattern_is_found_or_matches_all():
    assert check(regex(RegexConfig("<b>.*</b>")), "x <b>y</b>") == 1.0
    assert check(regex(RegexConfig("<b>.*</b>", whole=True)), "x <b>y</b>") == 0.0
    assert check(regex(RegexConfig("<b>.*</b>", whole=True)), " <b>y</b>\n") == 1.0
    assert check(regex(RegexConfig("<b>.*</b>")), "<b>\n</b>") == 0.0
    assert check(regex(RegexConfig("(?s)<b>.*</b>")), "<b>\n</b>") == 1.0
    with pytest.raises(UserError, match="pattern='\\(' is no regular expression"):
        regex(RegexConfig("("))


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ('{"a": 1}', 1.0),
        ('Here:\n```json\n{"a": 1}\n```\n', 1.0),
        ('{"a": "1"}', 0.0),
        ('so {"a": 1}', 0.0),
        ('{"a": NaN}', 0.0),
        ('{"a": 1', 0.0),
        ("[" * 100_000, 0.0),
        ('{"a": ' + "1" * 5000 + "}", 0.0),
        ("", 0.0),
    ],
)
def test_json_fits_its_schema_or_not(completion, expected):
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "number"}}}
    assert check(json_schema(JsonSchemaConfig(schema)), completion) == expected
    in_row = json_schema(JsonSchemaConfig(field="schema"))
    assert check(in_row, completion, schema=schema) == expected


def test_schemas_that_are_none_are_refused():
    pytest.importorskip("jsonschema")
    with pytest.raises(UserError, match="the JSON schema is none: 'thing' is not valid"):
        json_schema(JsonSchemaConfig({"type": "thing"}))
    in_row = json_schema(JsonSchemaConfig(field="schema"))
    with pytest.raises(ValueError, match="the JSON schema is none"):
        check(in_row, "1", schema={"type": "thing"})
    assert check(in_row, "1", schema='{"type": "integer"}') == 1.0
    with pytest.raises(MalformedExample):
        check(in_row, "1")
    for config in ({}, {"schema": {}, "field": "schema"}):
        with pytest.raises(UserError, match="either a schema"):
            JsonSchemaConfig(**config)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(UserError, match=r"pip install 'llm_jax\[rewards\]'"):
        json_schema(JsonSchemaConfig({}))


def test_no_schema_is_fetched():
    pytest.importorskip("jsonschema")
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}/schema"
        with pytest.raises(Exception, match="/schema"):
            check(json_schema(JsonSchemaConfig({"$ref": url})), "1")
        server.shutdown()
    assert asked == []


def test_the_reward_of_unit_tests_is_the_share_that_passes(policy, sample):
    reward = unit_tests(UnitTestsConfig(), policy, 20.0)
    code = (
        "First:\n```\nwrong\n```\nbetter:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."
    )
    tests = ["assert add(1, 2) == 3", "assert add(1, 1) == 3", "assert add(0, 0) == 0", "add()"]
    samples = [
        sample(code, tests=tests),
        sample(code, tests=tests[0]),
        sample("def add(a, b):\n    return 3", tests=tests[:2]),
        sample("no code", tests=tests),
        sample(code, tests=[]),
        sample(code, tests=[3]),
        sample(code),
    ]
    *scores, empty, wrong, missing = reward.score(samples)
    assert scores == [0.5, 1.0, 1.0, 0.0]
    assert "holds no test" in str(empty) and isinstance(empty, ValueError)
    assert isinstance(wrong, MalformedExample) and isinstance(missing, MalformedExample)


def test_unit_tests_that_are_not_shut_in_are_told_of(policy, told, monkeypatch):
    unit_tests(UnitTestsConfig(), policy, 1.0)
    assert told == [] or not sandbox.isolation()
    told.clear()
    monkeypatch.setattr(sandbox, "isolation", tuple)
    unit_tests(UnitTestsConfig(), policy, 1.0)
    (line,) = told
    assert "the code of completions can do what you can do" in line
    with pytest.raises(UserError, match="memory_mb=1 is too little"):
        UnitTestsConfig(memory_mb=1)


def test_lengths_are_of_tokens_and_ends_are_of_completions(sample):
    assert verifiers.length(sample("abc")) == 4.0
    assert verifiers.length(sample("abc", finished=False)) == 3.0
    assert verifiers.finished(sample("abc")) == 1.0
    assert verifiers.finished(sample("abc", finished=False)) == 0.0


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("plain", "plain"),
        ("```py\na\n```", "a"),
        ("x\n```\na\nb\n```\ny\n``` c++\nc\n```", "c"),
        ("```python\na\n```\n```python\nb", "b"),
        ("```python\n```", ""),
    ],
)
def test_the_last_fenced_block_counts(text, block):
    assert fenced(text) == block

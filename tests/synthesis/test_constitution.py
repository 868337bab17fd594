import pytest

from llm_jax.errors import UserError
from llm_jax.synthesis.constitution import DEFAULT, draw, load_constitution

GOOD = """
[[principles]]
name = "brief"
critique = "Where is it long?"
revision = "Shorten it."
[[principles]]
name = "kind"
choice = "Choose the kinder one."
"""


@pytest.fixture
def load(tmp_path):
    """`load(text)`: the constitution of a file with this text."""

    def read(text):
        (tmp_path / "c.toml").write_text(text)
        return load_constitution(tmp_path / "c.toml")

    return read


def test_the_default_constitution_serves_both_ways():
    constitution = load_constitution(DEFAULT)
    assert len(constitution.principles) >= 12
    assert constitution.revising == constitution.choosing == constitution.principles


def test_principles_are_told_apart_by_what_they_ask(load):
    constitution = load(GOOD)
    assert [p.name for p in constitution.revising] == ["brief"]
    assert [p.name for p in constitution.choosing] == ["kind"]
    with pytest.raises(UserError, match="no principle with choice"):
        _ = load(GOOD.replace('choice = "Choose', 'critique = "a"\nrevision = "')).choosing


def test_the_digest_depends_on_the_words(load):
    assert load(GOOD).digest == load("# a comment\n" + GOOD).digest
    assert load(GOOD).digest != load(GOOD.replace("kinder", "better")).digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("principles = ", "cannot be read"),
        ("", r"has no \[\[principles\]\]"),
        ("principles = [1]", "principle 1 is no table"),
        (GOOD.replace("critique", "critic"), "principle 1: .*'critic'. Did you mean 'critique'"),
        (GOOD.replace('"Shorten it."', "3"), "'revision' is no text"),
        (GOOD.replace('name = "kind"', ""), "principle 2 has no name"),
        (GOOD.replace('revision = "Shorten it."', ""), "belong together"),
        (GOOD.replace('choice = "Choose the kinder one."', ""), "principle 2 asks nothing"),
        (GOOD.replace("kind", "brief", 1), "two principles named 'brief'"),
    ],
)
def test_a_bad_constitution_is_refused_in_one_line(load, text, message):
    with pytest.raises(UserError, match=message) as error:
        load(text)
    assert "\n" not in str(error.value)


def test_every_principle_is_drawn_and_the_seeds_decide_which():
    principles = load_constitution(DEFAULT).principles
    drawn = [draw(principles, 7, row) for row in range(200)]
    assert drawn == [draw(principles, 7, row) for row in range(200)]
    assert drawn != [draw(principles, 8, row) for row in range(200)]
    assert set(drawn) == set(principles)

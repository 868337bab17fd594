"""The last number of a text, in the ways in which people write numbers."""

from fractions import Fraction

import pytest

from llm_jax.rl.numerals import last_number


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("48 + 24 = 72 clips.\n#### 72", 72),
        ("It is 72.", 72),
        ("#### 1,234", 1234),
        ("12,345,678 in all", 12345678),
        ("$1,234.50", "1234.5"),
        ("first 1,2,3", 3),
        ("1,2345", 2345),
        ("50%", 50),
        ("€ 5", 5),
        (".5", "1/2"),
        ("1.5e-3", "3/2000"),
        ("5e", 5),
        ("3/4", "3/4"),
        ("the answer is 3/4.", "3/4"),
        ("48 / 2 = 24", 24),
        ("2 1/2 cups", "5/2"),
        ("10 20/4", 5),
        ("3/4.5", "4.5"),
        ("on 1/2/2020", 2020),
        (r"\boxed{\frac{3}{4}}", "3/4"),
        (r"$2\dfrac{1}{2}$", "5/2"),
        (r"-\frac{3}{4}", "-3/4"),
        ("**72**", 72),
        ("5th", 5),
    ],
)
def test_numbers(text, expected):
    assert last_number(text) == Fraction(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-5", -5), ("\N{MINUS SIGN}5", -5), ("= -5", -5), ("(-5)", -5), ("-$5", -5), ("$-5", -5),
        ("+5", 5), ("10-5", 5), ("x-5", 5), ("(1)-5", 5), ("5\N{EN DASH}6", 6), ("-.5", -0.5),
    ],
)  # fmt: skip
def test_a_minus_is_a_sign_where_nothing_stands_before_it(text, expected):
    assert last_number(text) == Fraction(expected)


@pytest.mark.parametrize("text", ["", "none", "H2O", "5/0", "9" * 5000, "so 1, no: 2/0"])
def test_what_is_no_number(text):
    assert last_number(text) is None


def test_a_long_text_is_read_in_no_time():
    assert last_number("1" * 100_000 + " 7") == 7
    assert last_number("1e999999999999") is not None  # of which 10**999999999999 is not made
    assert last_number("-$ 1 1/" * 20_000) is not None

"""Numbers as people write them in answers."""

from __future__ import annotations

import re
from fractions import Fraction

_MINUS = "\N{MINUS SIGN}"
_LATEX_FRACTION = re.compile(r"(\d?)\\[dt]?frac\{(\d+)\}\{(\d+)\}")

# A sign belongs to the number where nothing that is subtracted from stands right before it: "= -5",
# but not "10-5". Digits inside a word, as in H2O, are no number.
_NUMBER = re.compile(
    rf"""
    (?P<sign>(?<![\w)\].]) [-+{_MINUS}])?
    [$€£¥]? (?P<late_sign>(?<=[$€£¥])[-{_MINUS}])?
    (?<![^\W_])
    (?:
        (?P<whole>\d+)[ ](?P<part>\d+/\d+)(?![\d/]|\.\d)            # 2 1/2
      | (?<!/)(?P<over>\d+)[ ]?/[ ]?(?P<under>\d+)(?![\d/]|\.\d)  # 3/4, but no date
      | (?P<grouped>\d{{1,3}}(?:,\d{{3}})+(?!\d)(?:\.\d+)?)         # 1,234.50
      | (?P<plain>(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{{1,3}}(?!\d))?)
    )
    """,
    re.VERBOSE,
)
_MAX_DIGITS = 400  # a longer number is nobody's answer, and costs much to compute with


def last_number(text: str) -> Fraction | None:
    """The last number of a text, exactly; None where it has none.

    Read are signs, thousands separated by commas, decimals, powers of ten (1e-3), fractions (3/4,
    2 1/2, \\frac{3}{4}) and currency signs. A percent sign changes nothing: 50% is 50, as answers
    have it.
    """
    found = list(_NUMBER.finditer(_LATEX_FRACTION.sub(_plain_fraction, text)))
    return _value(found[-1]) if found else None


def _plain_fraction(match: re.Match[str]) -> str:
    before, over, under = match.groups()
    return f"{before} {over}/{under}" if before else f"{over}/{under}"


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > _MAX_DIGITS:
        return None
    try:
        if match["whole"]:
            part = Fraction(match["part"])
            number = part + int(match["whole"]) if part < 1 else part
        elif match["over"]:
            number = Fraction(int(match["over"]), int(match["under"]))
        else:
            number = Fraction((match["grouped"] or match["plain"]).replace(",", ""))
    except ZeroDivisionError:
        return None
    signs = (match["sign"] or "") + (match["late_sign"] or "")
    return -number if "-" in signs or _MINUS in signs else number

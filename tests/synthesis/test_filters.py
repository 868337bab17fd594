import pytest

from llm_jax.synthesis.filters import NearDuplicates, is_garbled

TEXT = "Write a short story about a dragon who is afraid of the dark and learns to light a candle."


@pytest.mark.parametrize("text", ["a\ufffdb", "a\x00", "\ue000", "\U0010ffff", "a\x1b[0m"])
def test_what_is_no_text_is_garbled(text):
    assert is_garbled(text)


@pytest.mark.parametrize("text", ["", "a\tb\r\nc", "Größe, Ελλάδα, 中文字符 🦜👩‍🔬", "x² ≤ 3 → €"])
def test_text_of_any_language_is_not(text):
    assert not is_garbled(text)


def test_near_duplicates_are_found_whatever_their_case_and_space():
    seen = NearDuplicates(0.7)
    assert seen.add(TEXT)
    assert not seen.add(TEXT)
    assert not seen.add(TEXT.upper().replace(" ", "\n "))
    assert not seen.add(TEXT.replace("short", "brief"))
    assert seen.add("Explain how candles are made.")
    assert seen.add(TEXT[: len(TEXT) // 2])


def test_short_texts_are_told_apart():
    seen = NearDuplicates(0.7)
    assert [seen.add(text) for text in ("", "a", "b", "a", "")] == [True, True, True, False, False]


def test_the_threshold_decides():
    variant = TEXT.replace("short", "brief")
    strict, loose = NearDuplicates(1.0), NearDuplicates(0.3)
    assert strict.add(TEXT) and strict.add(variant)
    assert loose.add(TEXT) and not loose.add(variant)

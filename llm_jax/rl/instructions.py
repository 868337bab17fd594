"""Instructions whose following a program can tell, as IFEval has them (Zhou et al. 2023,
arXiv:2311.07911): their checkers by name, and the reward of following those of a row.

A row has `instruction_id_list`, names of `INSTRUCTIONS`, and `kwargs`, an object of arguments for
each; the names and arguments are those of the public file. What a checker looks for is as written
there, except that sentences are told by their ends alone and a language is not checked.
"""

from __future__ import annotations

import dataclasses
import json
import re
import string
from collections.abc import Callable, Mapping
from typing import Any

from llm_jax.data.examples import MalformedExample
from llm_jax.data.fields import Fields, as_json, as_list, as_object, as_text, list_of
from llm_jax.rl.scoring import RewardFunction

IDS, ARGUMENTS = "instruction_id_list", "kwargs"

# (response, arguments) → whether the instruction is followed.
Checker = Callable[[str, Fields], bool]

_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
# A sentence ends with these, and what closes a quotation, where space or the text's end follows.
# No end are the points of initials and of common abbreviations.
_WIDE = r"[\u3002\uff01\uff1f]"  # of Chinese and Japanese, which need no space after them
_SENTENCE_END = re.compile(rf"(?:[.!?]|{_WIDE})+[\"'\u201d\u2019)\]]*(?=\s|$)|{_WIDE}+")
_ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|No|Inc|Ltd|Co)|\b[A-Z])\.$"
)
_BULLET = re.compile(r"^\s*(?:\*(?!\*)|-(?!-))\s*\S", re.MULTILINE)
_HIGHLIGHT = re.compile(r"\*\*[^\n*]+\*\*|\*[^\n*]+\*")
_TITLE = re.compile(r"<<[^\n<>]*[^\s<>][^\n<>]*>>")
_CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


@dataclasses.dataclass(frozen=True)
class InstructionsConfig:
    """loose: whether a response may also follow them without its first line, its last one, or its
    asterisks. share: whether the reward is the share of instructions that are followed; else 1
    where all are, and 0."""

    loose: bool = False
    share: bool = False


def instructions(config: InstructionsConfig) -> RewardFunction:
    """The reward of following the instructions of the row."""
    check = followed_loosely if config.loose else followed

    def reward(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
        verdicts = check(completion, instructions_of(row, prompt))
        return sum(verdicts) / len(verdicts) if config.share else float(all(verdicts))

    return reward


@dataclasses.dataclass(frozen=True)
class Instruction:
    """name: of INSTRUCTIONS. arguments: those of the row, without null ones."""

    name: str
    arguments: Fields


def instructions_of(row: Mapping[str, Any], prompt: str = "") -> list[Instruction]:
    """The instructions of a row, at least one.

    Args:
      prompt: what is to be repeated, where an instruction says so and not what.

    Raises:
      MalformedExample: the row has none, one that is unknown, or arguments that do not fit.
    """
    fields = dict(row)
    names = [as_text(name, IDS) for name in list_of(fields, IDS)]
    arguments = as_list(as_json(fields.get(ARGUMENTS) or [{}] * len(names), ARGUMENTS), ARGUMENTS)
    if not names or len(arguments) != len(names):
        raise MalformedExample(
            f"{IDS!r} has {len(names)} instructions and {ARGUMENTS!r} {len(arguments)}: an object "
            "for each is wanted, of one at least"
        )
    found = []
    for name, given in zip(names, arguments, strict=True):
        if name not in INSTRUCTIONS:
            raise MalformedExample(f"the instruction {name!r} is none that is checked here")
        known = {k: v for k, v in as_object(given, ARGUMENTS).items() if v is not None}
        if name == "combination:repeat_prompt":
            known.setdefault("prompt_to_repeat", prompt)
        missing = [key for key in INSTRUCTIONS[name].arguments if key not in known]
        if missing:
            raise MalformedExample(f"the instruction {name!r} lacks {missing[0]!r}")
        found.append(Instruction(name, known))
    return found


def followed(response: str, wanted: list[Instruction]) -> list[bool]:
    """Whether the response follows each instruction; an empty one follows none."""
    return [
        bool(response.strip()) and INSTRUCTIONS[one.name].check(response, one.arguments)
        for one in wanted
    ]


def followed_loosely(response: str, wanted: list[Instruction]) -> list[bool]:
    """Whether each is followed by one of eight forms of the response: with or without its first
    line, its last line, and its asterisks (section 2.2 of the paper)."""
    lines = response.split("\n")
    bodies = ["\n".join(part).strip() for part in (lines, lines[1:], lines[:-1], lines[1:-1])]
    bodies[0] = response
    forms = [*bodies, *(body.replace("*", "") for body in bodies)]
    verdicts = [followed(form, wanted) for form in forms]
    return [any(each) for each in zip(*verdicts, strict=True)]


# --- the checkers ---------------------------------------------------------------------------------


def _compare(count: int, wanted: Any, relation: Any) -> bool:
    """`relation` is "at least" or "less than"."""
    if relation not in ("at least", "less than"):
        raise MalformedExample(f"the relation {relation!r} is neither 'at least' nor 'less than'")
    return count >= int(wanted) if relation == "at least" else count < int(wanted)


def _holds(text: str, phrase: str) -> bool:
    """As whole words, whatever their case."""
    return bool(re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE))


def _keywords(text: str, given: Fields) -> bool:
    return all(_holds(text, word) for word in given["keywords"])


def _keyword_frequency(text: str, given: Fields) -> bool:
    found = re.findall(rf"(?<!\w){re.escape(given['keyword'])}(?!\w)", text, re.IGNORECASE)
    return _compare(len(found), given["frequency"], given["relation"])


def _forbidden_words(text: str, given: Fields) -> bool:
    return not any(_holds(text, word) for word in given["forbidden_words"])


def _letter_frequency(text: str, given: Fields) -> bool:
    count = text.lower().count(str(given["letter"]).lower())
    return _compare(count, given["let_frequency"], given["let_relation"])


def _number_words(text: str, given: Fields) -> bool:
    return _compare(len(words_of(text)), given["num_words"], given["relation"])


def _number_sentences(text: str, given: Fields) -> bool:
    return _compare(count_sentences(text), given["num_sentences"], given["relation"])


def _number_paragraphs(text: str, given: Fields) -> bool:
    """Paragraphs stand between lines of ***; none may be empty, but for the first and the last."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    inner = parts[1:-1]
    return all(inner) and sum(map(bool, parts)) == int(given["num_paragraphs"])


def _first_word_of_paragraph(text: str, given: Fields) -> bool:
    """Paragraphs stand between blank lines."""
    paragraphs = [part for part in re.split(r"\n\s*\n", text.strip()) if part.strip()]
    place = int(given["nth_paragraph"]) - 1
    if len(paragraphs) != int(given["num_paragraphs"]) or not 0 <= place < len(paragraphs):
        return False
    word = paragraphs[place].split()[0].strip(string.punctuation + "\u201c\u201d\u2018\u2019")
    return word.lower() == str(given["first_word"]).lower()


def _placeholders(text: str, given: Fields) -> bool:
    return len(re.findall(r"\[[^\[\]]+\]", text)) >= int(given["num_placeholders"])


def _postscript(text: str, given: Fields) -> bool:
    """P.S. and P.P.S. may be written with spaces and without their last point."""
    marker = str(given["postscript_marker"]).strip().rstrip(".")
    pattern = re.escape(marker).replace(r"\.", r"\.\s?")
    return bool(re.search(rf"(?<!\w){pattern}", text, re.IGNORECASE))


def _bullets(text: str, given: Fields) -> bool:
    return len(_BULLET.findall(text)) == int(given["num_bullets"])


def _constrained(text: str, given: Fields) -> bool:
    return any(option in text for option in _CONSTRAINED)


def _highlights(text: str, given: Fields) -> bool:
    found = [each for each in _HIGHLIGHT.findall(text) if each.strip("*").strip()]
    return len(found) >= int(given["num_highlights"])


def _sections(text: str, given: Fields) -> bool:
    heads = re.findall(rf"\s?{re.escape(str(given['section_spliter']))}\s?\d+\s?", text)
    return len(heads) >= int(given["num_sections"])


def _json(text: str, given: Fields) -> bool:
    """The whole response, perhaps in a fence."""
    body = re.sub(r"\A```(?:json)?\s*|\s*```\Z", "", text.strip(), flags=re.IGNORECASE)
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str, given: Fields) -> bool:
    return bool(_TITLE.search(text))


def _two_responses(text: str, given: Fields) -> bool:
    parts = [part.strip() for part in text.split("******")]
    found = [part for part in parts if part]
    return len(found) == 2 and all(parts[1:-1]) and found[0] != found[1]


def _repeat_prompt(text: str, given: Fields) -> bool:
    return text.strip().lower().startswith(str(given["prompt_to_repeat"]).strip().lower())


def _end(text: str, given: Fields) -> bool:
    body = text.strip().strip('"').strip().lower()
    return body.endswith(str(given["end_phrase"]).strip().lower())


def _quoted(text: str, given: Fields) -> bool:
    body = text.strip()
    return len(body) > 1 and body[0] == body[-1] == '"'


def _capital_words(text: str, given: Fields) -> bool:
    count = sum(word.isupper() for word in words_of(text))
    return _compare(count, given["capital_frequency"], given["capital_relation"])


def _upper(text: str, given: Fields) -> bool:
    return text.isupper()


def _lower(text: str, given: Fields) -> bool:
    return text.islower()


def _no_comma(text: str, given: Fields) -> bool:
    return "," not in text


def words_of(text: str) -> list[str]:
    """Letters and digits, apostrophes and hyphens inside."""
    return _WORD.findall(text)


def count_sentences(text: str) -> int:
    """Ends of sentences, and one more where something follows the last."""
    ends = [
        match.end()
        for match in _SENTENCE_END.finditer(text)
        if not (_ABBREVIATION.search(text[: match.end()]) and text[match.end() :].strip())
    ]
    rest = text[ends[-1] :] if ends else text
    return len(ends) + bool(_WORD.search(rest))


@dataclasses.dataclass(frozen=True)
class Kind:
    """check: see Checker. arguments: those that it needs."""

    check: Checker
    arguments: tuple[str, ...] = ()


INSTRUCTIONS: dict[str, Kind] = {
    "keywords:existence": Kind(_keywords, ("keywords",)),
    "keywords:frequency": Kind(_keyword_frequency, ("keyword", "frequency", "relation")),
    "keywords:forbidden_words": Kind(_forbidden_words, ("forbidden_words",)),
    "keywords:letter_frequency": Kind(
        _letter_frequency, ("letter", "let_frequency", "let_relation")
    ),
    "length_constraints:number_words": Kind(_number_words, ("num_words", "relation")),
    "length_constraints:number_sentences": Kind(_number_sentences, ("num_sentences", "relation")),
    "length_constraints:number_paragraphs": Kind(_number_paragraphs, ("num_paragraphs",)),
    "length_constraints:nth_paragraph_first_word": Kind(
        _first_word_of_paragraph, ("num_paragraphs", "nth_paragraph", "first_word")
    ),
    "detectable_content:number_placeholders": Kind(_placeholders, ("num_placeholders",)),
    "detectable_content:postscript": Kind(_postscript, ("postscript_marker",)),
    "detectable_format:number_bullet_lists": Kind(_bullets, ("num_bullets",)),
    "detectable_format:constrained_response": Kind(_constrained),
    "detectable_format:number_highlighted_sections": Kind(_highlights, ("num_highlights",)),
    "detectable_format:multiple_sections": Kind(_sections, ("section_spliter", "num_sections")),
    "detectable_format:json_format": Kind(_json),
    "detectable_format:title": Kind(_title),
    "combination:two_responses": Kind(_two_responses),
    "combination:repeat_prompt": Kind(_repeat_prompt, ("prompt_to_repeat",)),
    "startend:end_checker": Kind(_end, ("end_phrase",)),
    "startend:quotation": Kind(_quoted),
    "change_case:capital_word_frequency": Kind(
        _capital_words, ("capital_frequency", "capital_relation")
    ),
    "change_case:english_capital": Kind(_upper),
    "change_case:english_lowercase": Kind(_lower),
    "punctuation:no_comma": Kind(_no_comma),
}

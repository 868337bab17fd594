"""The embedded examples: questions about the standard library, answered by its docstrings.

Instructions ask what a function, method or class does (its docstring's first paragraph), what kind
of thing it is, and how many arguments it takes. Preferences set the true answer to "what does it
do" against a worse one, rankings order several; safety pairs set declining a request against
complying with it, and requests have the better of the two as their answer. As in `stdlib`, all is
read as text and nothing is imported.
"""

from __future__ import annotations

import ast
import dataclasses
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llm_jax.data.stdlib import documented_objects, stdlib_documents

# Part of every cache key: raise it when the rows of an unchanged installation change.
EXAMPLES_VERSION = 1

_SHORTEST, _LONGEST = 16, 160  # characters of a summary
_COUNTS = ("no arguments", "one argument", "two arguments", "three arguments", "four arguments")


@dataclasses.dataclass(frozen=True)
class _Object:
    """name: its qualified name with the module's. signature: the name with its arguments or bases.
    kind: "function", "method" or "class". arguments: how many, without self or cls; None for
    classes. summary: the first paragraph of its docstring. split_text: see `_objects`."""

    name: str
    signature: str
    kind: str
    arguments: int | None
    summary: str
    split_text: str


def instruction_rows(folder: Path | None = None) -> Iterator[dict[str, str]]:
    """{"prompt", "completion", "split_text"}: two questions on every documented object.

    `split_text` is the document of the embedded corpus that the docstring stands in, so at an equal
    fraction the held-out questions are on documents that pre-training has held out, too.
    """
    for object_ in _objects(folder):
        prompts = {f"What does {object_.signature} do?": object_.summary}
        short = f"Is {object_.name} a function, a method or a class?"
        if object_.arguments is not None and random.Random(object_.name).random() < 0.5:
            counts = (*_COUNTS, "more than four arguments")
            short = f"How many arguments does {object_.signature} take?"
            prompts[short] = f"It takes {counts[min(object_.arguments, len(_COUNTS))]}."
        else:
            prompts[short] = f"It is a {object_.kind}."
        for prompt, completion in prompts.items():
            yield {
                "prompt": prompt,
                "completion": completion,
                "split_text": object_.split_text,
            }


def preference_rows(folder: Path | None = None) -> Iterator[dict[str, str]]:
    """{"prompt", "chosen", "rejected", "strength", "split_text"}: a pair on every object.

    The rejected answer is, from the largest difference to the smallest: the summary with its words
    shuffled ("significantly better"), one that stammers ("better"), one that breaks off ("slightly
    better"), or the summary of something else ("negligibly better": it is as well written, and
    only knowledge tells it from the right one).
    """
    objects = list(_objects(folder))
    for object_ in objects:
        chance = random.Random(object_.signature)
        strength = chance.choices(list(_WORSE), [share for share, _ in _WORSE.values()])[0]
        other = chance.choice(objects).summary
        rejected = _WORSE[strength][1](chance, object_.summary, other)
        if rejected != object_.summary:
            yield {
                "prompt": f"What does {object_.signature} do?",
                "chosen": object_.summary,
                "rejected": rejected,
                "strength": strength,
                "split_text": object_.split_text,
            }


def ranked_rows(folder: Path | None = None) -> Iterator[dict[str, Any]]:
    """{"prompt", "responses", "ranks", "split_text"}: up to five answers on every object, from the
    best, 1, to the worst; they are those of `preference_rows`."""
    objects = list(_objects(folder))
    for object_ in objects:
        chance = random.Random(f"ranked {object_.signature}")
        other = chance.choice(objects).summary
        worse = [make(chance, object_.summary, other) for _, make in reversed(_WORSE.values())]
        responses = list(dict.fromkeys([object_.summary, *worse]))
        yield {
            "prompt": f"What does {object_.signature} do?",
            "responses": responses,
            "ranks": list(range(1, len(responses) + 1)),
            "split_text": object_.split_text,
        }


def safety_rows(folder: Path | None = None) -> Iterator[dict[str, Any]]:
    """{"prompt", "chosen", "rejected", "strength", "split_text"}: a pair on every object.

    Half of the prompts ask for something harmful, and declining with the reason is the better
    answer; the others are harmless, and declining those is the worse one. So it takes the prompt
    to tell which answer is better.
    """
    for request in _requests(folder):
        yield {
            "prompt": request.prompt,
            "chosen": request.decline if request.harmful else request.answer,
            "rejected": request.answer if request.harmful else request.decline,
            "strength": "significantly better" if request.harmful else "better",
            "split_text": request.split_text,
        }


def request_rows(folder: Path | None = None) -> Iterator[dict[str, Any]]:
    """{"prompt", "completion", "safety", "split_text"}: the prompts of `safety_rows`, with their
    better answers; "safety" is whether harm is asked for."""
    for request in _requests(folder):
        yield {
            "prompt": request.prompt,
            "completion": request.decline if request.harmful else request.answer,
            "safety": request.harmful,
            "split_text": request.split_text,
        }


@dataclasses.dataclass(frozen=True)
class _Request:
    """answer: what complies. decline: what does not."""

    prompt: str
    harmful: bool
    answer: str
    decline: str
    split_text: str


def _requests(folder: Path | None) -> Iterator[_Request]:
    for object_ in _objects(folder):
        chance = random.Random(f"safety {object_.name}")
        request, reason = chance.choice(_HARMFUL)
        harmful = chance.random() < 0.5
        yield _Request(
            prompt=request.format(object_.name)
            if harmful
            else f"What does {object_.signature} do?",
            harmful=harmful,
            answer=f"Sure. {object_.summary}" if harmful else object_.summary,
            decline=f"I will not do that: {reason}",
            split_text=object_.split_text,
        )


# A harmful request about an object, and the reason to decline it.
_HARMFUL = (
    ("Call {} on what strangers send us, unchecked.", "their input could take over the program."),
    ("Use {} to read the files of someone else.", "those files are not ours to read."),
    ("Make {} hide every error from the users.", "they would lose data and not know."),
    ("Patch {} so that it sends passwords to me.", "passwords belong to nobody but their owners."),
)


def _shuffled(chance: random.Random, summary: str, other: str) -> str:
    words = summary.split()
    chance.shuffle(words)
    return " ".join(words)


def _stammered(chance: random.Random, summary: str, other: str) -> str:
    words = summary.split()
    at = chance.randrange(len(words))
    return " ".join([*words[: at + 1], *[words[at]] * chance.randint(2, 4), *words[at + 1 :]])


def _broken_off(chance: random.Random, summary: str, other: str) -> str:
    words = summary.split()
    return " ".join(words[: chance.randint(1, max(1, len(words) * 2 // 3))])


def _of_another(chance: random.Random, summary: str, other: str) -> str:
    return other


# Strength → (share of the pairs, how the worse answer is made).
_WORSE: dict[str, tuple[float, Callable[[random.Random, str, str], str]]] = {
    "significantly better": (0.34, _shuffled),
    "better": (0.32, _stammered),
    "slightly better": (0.28, _broken_off),
    "negligibly better": (0.06, _of_another),
}


# The rows by name.
EXAMPLES: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "instructions": instruction_rows,
    "preferences": preference_rows,
    "ranked": ranked_rows,
    "requests": request_rows,
    "safety": safety_rows,
}


def _objects(folder: Path | None) -> Iterator[_Object]:
    """Every documented object whose summary is of moderate length and is no other's as well."""
    documents: dict[str, list[str]] = {}
    for document in stdlib_documents(folder):
        documents.setdefault(document.name.partition("#")[0], []).append(document.text)
    seen: set[str] = set()
    for module, heading, node, docstring in documented_objects(folder):
        summary = " ".join(docstring.strip().split("\n\n")[0].split())
        if not _SHORTEST <= len(summary) <= _LONGEST or summary in seen:
            continue
        parts = documents.get(f"documentation/{module}")
        if parts is None:
            continue  # too short for a document, so pre-training has no side for it
        seen.add(summary)
        part = next((text for text in parts if f"{heading}\n\n" in text), parts[0])
        yield _describe(module, heading, node, summary, part)


def _describe(module: str, heading: str, node: ast.AST, summary: str, part: str) -> _Object:
    bare = heading.removeprefix("class ")
    qualified = bare.partition("(")[0]
    kind, arguments = "class", None
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        named = node.args
        every = [*named.posonlyargs, *named.args, *named.kwonlyargs, named.vararg, named.kwarg]
        names = [argument.arg for argument in every if argument is not None]
        kind = "method" if names[:1] in (["self"], ["cls"]) else "function"
        arguments = len(names) - (kind == "method")
    return _Object(f"{module}.{qualified}", f"{module}.{bare}", kind, arguments, summary, part)

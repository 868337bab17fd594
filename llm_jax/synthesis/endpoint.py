"""Models behind a URL that speaks the protocol of OpenAI's chat completions, as vLLM, llama.cpp,
Ollama and others do."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import textwrap
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax

from llm_jax.data.examples import Message
from llm_jax.errors import UserError, one_line
from llm_jax.synthesis.responders import LETTERS, Leaning, Reply, Turns, Unanswered

API_KEY = "OPENAI_API_KEY"

T = TypeVar("T")
R = TypeVar("R")

# How a letter is given, the surest form first: on a line of its own, before what explains it, as
# "the answer is A", in brackets. A letter elsewhere may be the article, or speak of both.
_FORMS = (
    re.compile(r"^\W*([AB])\W*$", re.MULTILINE),
    re.compile(r"\A\W*([AB])[.):,]"),
    re.compile(r"(?i:answer|choice|verdict)(?i:\s+is)?\W*([AB])\b"),
    re.compile(r"\(([AB])\)"),
)


@dataclasses.dataclass(frozen=True)
class EndpointConfig:
    """url: up to where "/chat/completions" begins. model: its name there. max_new_tokens: of an
    answer. temperature, top_p: None leaves the endpoint's own. concurrency: requests under way at a
    time. timeout: seconds of one. retries: of a request that failed for the moment, at growing
    intervals."""

    url: str
    model: str
    max_new_tokens: int = 512
    temperature: float | None = None
    top_p: float | None = None
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 5

    def __post_init__(self) -> None:
        if not self.model:
            raise UserError(f"{self.url} serves models by name: say which one.")
        if self.max_new_tokens < 1 or self.concurrency < 1:
            raise UserError("the tokens of an answer and the requests at a time must be positive.")


class Endpoint:
    """An endpoint, asked several things at a time; its key is in $OPENAI_API_KEY."""

    def __init__(self, config: EndpointConfig):
        """
        Raises:
          UserError: the package openai is missing.
        """
        try:
            import openai
        except ImportError as error:
            raise UserError(
                f"{config.url} needs the package openai: pip install 'llm_jax[synthesis]'"
            ) from error
        self._config, self._openai = config, openai
        self.lineage = {"endpoint": config.url, "model": config.model}
        self._client = openai.OpenAI(
            base_url=config.url,
            api_key=os.environ.get(API_KEY) or "none",  # local servers want no key
            timeout=config.timeout,
            max_retries=config.retries,
        )

    def answer(self, dialogues: Sequence[Turns], rng: jax.Array) -> list[Reply | Unanswered]:
        """
        Raises:
          UserError: the endpoint cannot be reached, or refuses to serve us at all.
        """
        del rng  # see `Responder`
        return self._at_once(self._ask, dialogues)

    def lean(self, questions: Sequence[str]) -> list[Leaning | Unanswered]:
        """From the letter in the endpoint's answer.

        Raises:
          UserError: see `answer`.
        """
        return self._at_once(self._choose, questions)

    def _choose(self, question: str) -> Leaning | Unanswered:
        reply = self._ask([Message("user", question)])
        if isinstance(reply, Unanswered):
            return reply
        letter = letter_of(reply.text)
        if letter is None:
            shown = textwrap.shorten(reply.text, 60, placeholder="...")
            return Unanswered(f"the judge named no letter but said {shown!r}")
        return Leaning(math.inf if letter == LETTERS[0] else -math.inf, 1.0)

    def _ask(self, turns: Turns) -> Reply | Unanswered:
        config, openai = self._config, self._openai
        messages: Any = [{"role": turn.role, "content": turn.content} for turn in turns]
        settings: dict[str, Any] = {"temperature": config.temperature, "top_p": config.top_p}
        try:
            completion = self._client.chat.completions.create(
                model=config.model,
                messages=messages,
                # The newer max_completion_tokens is ignored by several servers.
                max_tokens=config.max_new_tokens,
                **{name: value for name, value in settings.items() if value is not None},
            )
            choice = completion.choices[0]
            # JSON can write half of a surrogate pair, and files cannot.
            text = (choice.message.content or "").encode("utf-8", "replace").decode("utf-8")
            return Reply(text.strip(), choice.finish_reason != "length")
        except openai.APITimeoutError:
            return Unanswered(f"no answer within {config.timeout:g} s")
        except openai.APIConnectionError as error:
            reason = error.__cause__ or error
            raise UserError(
                f"{config.url} cannot be reached ({one_line(reason)}): start it, or mend the URL."
            ) from error
        except openai.APIStatusError as error:
            if error.status_code in (401, 403, 404):
                raise UserError(
                    f"{config.url} refuses to serve {config.model!r} ({one_line(error)}): see to "
                    f"the URL, the model's name and the key in ${API_KEY}."
                ) from error
            return Unanswered(one_line(error))
        except (openai.OpenAIError, AttributeError, IndexError, TypeError, ValueError) as error:
            return Unanswered(f"what came back is no chat completion ({one_line(error)})")

    def _at_once(self, ask: Callable[[T], R], questions: Sequence[T]) -> list[R]:
        with ThreadPoolExecutor(self._config.concurrency) as threads:
            futures = [threads.submit(ask, question) for question in questions]
            try:
                return [future.result() for future in futures]
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise


def letter_of(text: str) -> str | None:
    """The one of `LETTERS` that an answer gives; None where it gives none, or both."""
    for form in _FORMS:
        if found := set(form.findall(text)):
            return found.pop() if len(found) == 1 else None
    return None

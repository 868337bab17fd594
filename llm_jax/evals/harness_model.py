"""A model of ours as the lm-evaluation-harness asks it.

Needs the package lm_eval (pip install 'llm_jax[eval]'), which wants no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llm_jax.data.examples import Message
from llm_jax.data.template_base import ChatTemplate
from llm_jax.data.tokenizer_base import Place
from llm_jax.errors import UserError
from llm_jax.evals.pairs import encode_pair
from llm_jax.evals.subject import Subject
from llm_jax.generation.generate import document_prompt
from llm_jax.generation.sampler import SamplerConfig

MAX_NEW_TOKENS = 256  # the harness's own number, where a task says nothing

_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")
_KNOWN = ("until", "max_gen_toks", "do_sample", "temperature", *_SAMPLING)


class Prompt(str):
    """A rendered conversation, which the harness hands on from `apply_chat_template` to a request.

    As text it shows what the template wrote. Its tokens it brings along: no text could give them
    back, since special tokens that stand in a text are ordinary text.

    head: the tokens that the template wrote. place: where what follows them stands. tail: the
    beginning of the answer, where the task gives one.
    """

    head: tuple[int, ...]
    place: Place
    tail: str


class HarnessModel(TemplateLM):
    """A subject as the harness asks it."""

    def __init__(self, subject: Subject, params: Any, seed: int = 0):
        """
        Args:
          params: the parameters that are measured, on the subject's mesh.
          seed: of sampling; a request's randomness comes from it and the place of the request.
        """
        super().__init__()
        self._subject, self._params, self._seed = subject, params, seed
        self._uses_template = False

    # --- tokens -----------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self._subject.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing else before it."""
        return self._subject.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """Tokens that the model reads."""
        return self._subject.model.max_length

    @property
    def max_gen_toks(self) -> int:
        return MAX_NEW_TOKENS

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The tokens of a text, as a document begins unless `add_special_tokens` is False."""
        tokenizer = self._subject.tokenizer
        start = [] if add_special_tokens is False else tokenizer.document_start
        return [*start, *tokenizer.encode(string)]

    # --- chat -------------------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        """Of tokenizer and template: the harness keeps prompts by this name."""
        template = self.chat_template(self._subject.template is not None)
        digest = hashlib.sha256(template.encode()).hexdigest()
        return f"{self._subject.tokenizer.fingerprint}-{digest[:8]}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """What is recorded of the template; nothing where none is asked for.

        Raises:
          UserError: the subject has none, or a template is asked for by name.
        """
        if not chat_template:
            return ""
        if isinstance(chat_template, str):
            raise UserError(
                f"the chat template {chat_template!r}: {self._subject.name} has one of its own, "
                "which is used without naming it."
            )
        return json.dumps(self._template.describe())

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> Prompt:
        """The conversation up to where the answer begins; without `add_generation_prompt` its last
        turn is the beginning of that answer.

        Raises:
          UserError: the subject has no template, or it cannot write this.
        """
        tokenizer, tail = self._subject.tokenizer, ""
        messages = [Message(turn["role"], turn["content"]) for turn in chat_history]  # type: ignore[arg-type]
        if not add_generation_prompt:
            tail = messages.pop().content
        head = tuple(self._template.render_prompt(messages, (), tokenizer))
        prompt = Prompt(tokenizer.decode(head, skip_special=False) + tail)
        is_special = bool(head) and head[-1] in tokenizer.specials.values()
        prompt.head, prompt.tail = head, tail
        prompt.place = "after_special" if is_special else "after_text" if head else "start"
        self._uses_template = True
        return prompt

    @property
    def _template(self) -> ChatTemplate:
        if self._subject.template is None:
            raise UserError(
                f"{self._subject.name} has no chat template: leave out --apply_chat_template."
            )
        return self._subject.template

    # --- likelihoods ------------------------------------------------------------------------------

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The harness's rule; after a conversation, where tokens are cut, of the answer alone."""
        tokenizer = self._subject.tokenizer
        if isinstance(context, Prompt):
            return encode_pair(tokenizer, context.tail, continuation, context.head, context.place)
        self._check_plain(context)
        return encode_pair(tokenizer, context, continuation)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        found = self._subject.loglikelihoods(self._params, pairs)
        return [(likelihood.total, likelihood.is_greedy) for likelihood in found]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of each text after bos, each token counted once; nats.

        A text that is longer than the length that the model was trained on (at most what it reads)
        is read in windows of that length, as in the perplexity task; here the last one of a text
        reaches back, so that it is a whole one.
        """
        length = min(self._subject.length, self.max_length)
        owners, pairs = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            ids = self._subject.tokenizer.encode(text)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, length, 1):
                owners.append(number)
                pairs.append(make_disjoint_window(window))
        totals = np.zeros(len(requests))
        for number, found in zip(
            owners, self._subject.loglikelihoods(self._params, pairs), strict=True
        ):
            totals[number] += found.total
        return totals.tolist()

    # --- generation -------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to the first of the task's stop strings; one
        that is a special token ends it as a token.

        Raises:
          UserError: a setting of `generation_kwargs` that is not known, or does not fit.
        """
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            key = json.dumps(request.args[1], sort_keys=True, default=str)
            groups.setdefault(key, []).append(number)
        texts: dict[int, str] = {}
        for numbers in groups.values():
            settings = generation_settings(requests[numbers[0]].args[1])
            until = settings.pop("stop_strings")
            ids = [self._subject.tokenizer.special_id(stop) for stop in until]
            completions = self._subject.generate(
                self._params,
                [self._prompt_ids(requests[number].args[0]) for number in numbers],
                stop_strings=[stop for stop, id_ in zip(until, ids, strict=True) if id_ is None],
                stop_ids=[id_ for id_ in ids if id_ is not None],
                seed=self._seed,
                **settings,
            )
            texts |= {n: c.text for n, c in zip(numbers, completions, strict=True)}
        return [texts[number] for number in range(len(requests))]

    def _prompt_ids(self, context: str) -> list[int]:
        tokenizer = self._subject.tokenizer
        if isinstance(context, Prompt):
            return [*context.head, *tokenizer.encode(context.tail, context.place)]
        self._check_plain(context)
        return document_prompt(tokenizer, context)

    def _check_plain(self, context: str) -> None:
        """A task that makes other text out of a conversation's loses its special tokens."""
        if self._uses_template and context:
            raise UserError(
                "a task asks with text of its own in place of the conversation that the chat "
                f"template wrote ({context[:40]!r}): ask it without the template."
            )

    def get_model_info(self) -> dict[str, Any]:
        """For the harness's record."""
        return {
            "model": self._subject.name,
            "tokenizer": self._subject.tokenizer.fingerprint,
            "max_length": self.max_length,
            "sampling_seed": self._seed,
        }


def generation_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Subject.generate` that a task's `generation_kwargs` stand for.

    Greedy unless it samples: `do_sample`, or a temperature above 0 and nothing of `do_sample`.

    Raises:
      UserError: a key that is not known, or a value that does not fit.
    """
    known: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), MAX_NEW_TOKENS))
    if known.get("num_beams") == 1:  # some tasks say so, and it is what is done
        del known["num_beams"]
    for name, value in known.items():
        if name not in _KNOWN:
            raise UserError(
                f"generation_kwargs: {name}={value!r} is not what this model can do; it knows "
                f"{', '.join(_KNOWN)}."
            )
    temperature = float(known.get("temperature", 0.0))  # made 0 where do_sample is False
    if known["do_sample"] and temperature == 0:
        raise UserError("generation_kwargs: do_sample needs a temperature above 0.")
    if not all(isinstance(stop, str) for stop in known["until"]):
        raise UserError(f"generation_kwargs: until={known['until']!r} must be texts.")
    return {
        "max_new_tokens": known["max_gen_toks"],
        "stop_strings": tuple(known["until"]),
        "sampler": SamplerConfig(temperature, **{n: known[n] for n in _SAMPLING if n in known}),
    }

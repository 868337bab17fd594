"""Answers generated to held-out prompts, against the true ones: exact match and token F1."""

from __future__ import annotations

import collections
import dataclasses
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llm_jax.data.store import TokenStore
from llm_jax.data.tokenizer_base import Tokenizer
from llm_jax.evals.batching import sequence_batch
from llm_jax.generation.decoding import Generation
from llm_jax.placement import to_host
from llm_jax.types import Batch

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclasses.dataclass(frozen=True)
class AnswerExamples:
    """prompts: token ids of each. answers: the true answers as text."""

    prompts: list[list[int]]
    answers: list[str]


def answer_examples(
    store: TokenStore, tokenizer: Tokenizer, count: int, longest_prompt: int
) -> AnswerExamples:
    """The last answers of at most `count` conversations, spread evenly over the store; each with
    all that stands before it as its prompt. Conversations with longer prompts are passed over."""
    assert store.trained is not None
    spans = []  # where prompt, answer and end of a conversation begin in the store
    for begin, end in zip(store.offsets[:-1], store.offsets[1:], strict=True):
        trained = np.flatnonzero(store.trained[begin:end])
        if len(trained):
            gaps = np.flatnonzero(np.diff(trained) > 1)  # before each answer but the first
            first = int(trained[gaps[-1] + 1] if len(gaps) else trained[0])
            # A text that is answer from its first word on is nobody's question.
            if 1 < first <= longest_prompt:
                spans.append((begin, begin + first, begin + int(trained[-1]) + 1))
    count = min(count, len(spans))
    chosen = [spans[place * len(spans) // count] for place in range(count)]
    return AnswerExamples(
        prompts=[store.tokens[begin:answer].tolist() for begin, answer, _ in chosen],
        answers=[tokenizer.decode(store.tokens[answer:end]) for _, answer, end in chosen],
    )


def evaluate_answers(
    generate: Callable[[Any, Sequence[Sequence[int]]], Generation],
    token_nats: Callable[[Any, Batch], Any],
    params: Any,
    tokenizer: Tokenizer,
    examples: AnswerExamples,
    batch_size: int,
    answer_after: str | None = None,
) -> dict[str, float]:
    """Measures a model on answers that it generates itself.

    Args:
      generate: `(params, prompts) → Generation`, at temperature 0 or 1.
      token_nats: jitted, `(params, batch) → float32 [batch, time]`, −log p of each target.
      examples: at least one.
      batch_size: prompts at once; the last batch is filled up with copies of the first prompt.
      answer_after: what counts of an answer is the text after the last of these; None = all.

    Returns:
      exact_match: the share of answers equal to the true ones after `normalise`.
      token_f1: the mean of `token_f1`.
      finished: the share of answers that ended by themselves.
      sampling_logprob_difference: the largest difference between the sampler's log-probability of a
        token and that of a forward pass over prompt and answer; anything but rounding is an error.
    """
    answers: list[str] = []
    stopped: list[bool] = []
    differences: list[float] = []
    for start in range(0, len(examples.prompts), batch_size):
        prompts = examples.prompts[start : start + batch_size]
        filled = [*prompts, *examples.prompts[:1] * (batch_size - len(prompts))]
        made = generate(params, filled)
        rows = [row[:n].tolist() for row, n in zip(made.tokens, made.lengths, strict=True)]
        answers += [tokenizer.decode(row) for row in rows[: len(prompts)]]
        stopped += made.stopped[: len(prompts)].tolist()
        differences.append(_largest_difference(token_nats, params, filled, rows, made.logprobs))
    pairs = [
        (final_answer(found, answer_after), final_answer(wanted, answer_after))
        for found, wanted in zip(answers, examples.answers, strict=True)
    ]
    return {
        "exact_match": float(np.mean([normalise(found) == normalise(w) for found, w in pairs])),
        "token_f1": float(np.mean([token_f1(found, wanted) for found, wanted in pairs])),
        "finished": float(np.mean(stopped)),
        "sampling_logprob_difference": max(differences),
    }


def normalise(text: str) -> str:
    """Lower case without punctuation, articles and surplus space (Rajpurkar et al. 2016, SQuAD)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def token_f1(found: str, wanted: str) -> float:
    """The harmonic mean of precision and recall over the words of the normalised texts."""
    found_words, wanted_words = normalise(found).split(), normalise(wanted).split()
    if not found_words or not wanted_words:
        return float(found_words == wanted_words)
    shared = sum((collections.Counter(found_words) & collections.Counter(wanted_words)).values())
    return 2 * shared / (len(found_words) + len(wanted_words))


def final_answer(text: str, answer_after: str | None) -> str:
    """What stands after the last `answer_after`, and nothing where there is none; None = all."""
    if answer_after is None:
        return text
    return text.rpartition(answer_after)[2] if answer_after in text else ""


def _largest_difference(
    token_nats: Callable[[Any, Batch], Any],
    params: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    logprobs: np.ndarray,
) -> float:
    """Between the sampler's `logprobs` [rows, time] and those of a forward pass."""
    whole = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    batch = sequence_batch(whole, -(-max(map(len, whole)) // 32) * 32)
    nats = to_host(token_nats(params, batch))
    differences = [
        np.abs(sampled[: len(answer)] + row[len(prompt) - 1 :][: len(answer)]).max(initial=0)
        for prompt, answer, sampled, row in zip(prompts, answers, logprobs, nats, strict=True)
    ]
    return float(max(differences))

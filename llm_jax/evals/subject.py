"""The model that tasks measure, and the two things that they ask of it: how likely a continuation
is, and what it writes itself.

Legend: B batch, T time, A targets asked for, D embed, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jax import sharding
from llm_jax.data.store import TokenStore
from llm_jax.data.template_base import ChatTemplate
from llm_jax.data.tokenizer_base import Tokenizer
from llm_jax.errors import UserError
from llm_jax.generation.decoding import bucket
from llm_jax.generation.generate import document_stop_ids, generate
from llm_jax.generation.sampler import SamplerConfig
from llm_jax.generation.text import before_stop
from llm_jax.models import LanguageModel
from llm_jax.objectives.lm import over_time
from llm_jax.placement import to_devices, to_host
from llm_jax.rl.scoring import Policy

BATCH = 16  # rows at once, where nothing else is said
GREEDY = SamplerConfig(temperature=0)

Ids = Sequence[int] | np.ndarray  # token ids, or places of tokens

_CHUNK = 512  # positions whose logits are held at once
_FEWEST = 8  # targets that a batch asks for at least; more are rounded up by factors of four


@dataclasses.dataclass(frozen=True)
class LogLikelihood:
    """Of some tokens of a sequence, each after all tokens before it.

    logprobs: float32 [tokens], natural logarithms. greedy: bool [tokens], whether the token is the
    most likely one there. If all of a continuation are, greedy decoding gives just that: its first
    token is predicted from the same context in both, and so on (see `needle.evaluate_needle`).
    """

    logprobs: np.ndarray
    greedy: np.ndarray

    @property
    def total(self) -> float:
        return float(np.sum(self.logprobs, dtype=np.float64))

    @property
    def is_greedy(self) -> bool:
        return bool(np.all(self.greedy))


@dataclasses.dataclass(frozen=True)
class Completion:
    """ids: the tokens that the model wrote, its end included. text: of them, up to the first stop
    string. finished: whether it ended by itself or at a stop string."""

    text: str
    ids: tuple[int, ...]
    finished: bool


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is measured. Its parameters are given with every question, since training changes them.

    name: for messages. template: None where no chat template has a part. length: tokens of context
    that it was trained on. log: takes lines for the user. held_out: gives the documents that the
    run did not train on, by component of its mixture; None where it has no such texts. batch: rows
    at once, rounded up to what the mesh divides; it changes no figure.

    Every process of several must ask the same, with `jax.set_mesh(mesh)` entered, and gets all.
    """

    name: str
    model: LanguageModel
    tokenizer: Tokenizer
    template: ChatTemplate | None
    mesh: Mesh
    length: int
    log: Callable[[str], None]
    held_out: Callable[[], Mapping[str, TokenStore]] | None = None
    batch: int = BATCH

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise UserError(f"batch={self.batch} must be at least 1.")

    @property
    def policy(self) -> Policy:
        """As rewards see it."""
        return Policy(self.tokenizer, self.mesh, self.log, self.template)

    @property
    def rows(self) -> int:
        """Rows of a batch: a multiple of what the mesh divides."""
        shards = sharding.batch_shards(self.mesh)
        return -(-self.batch // shards) * shards

    def loglikelihoods(self, params: Any, pairs: Sequence[tuple[Ids, Ids]]) -> list[LogLikelihood]:
        """How likely each continuation is after its context, in the order of the pairs.

        Args:
          params: the model's parameters, on the mesh.
          pairs: token ids of contexts and continuations, none empty (a context starts with bos).
            Where both are longer than the model reads, the context loses its beginning.

        Raises:
          UserError: an empty context or continuation, or one that alone is longer than the model
            reads.
        """
        questions = []
        for context, continuation in pairs:
            if not len(context) or not len(continuation):
                raise UserError("a context and its continuation must have a token each at least.")
            room = self.model.max_length + 1 - len(continuation)  # the last token is not read
            if room < 1:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens is longer than the "
                    f"{self.model.max_length} that the model reads: shorten it."
                )
            whole = [*context[-room:], *continuation]
            questions.append((whole, range(len(whole) - len(continuation), len(whole))))
        return self.read(params, questions)

    def read(self, params: Any, questions: Sequence[tuple[Ids, Ids]]) -> list[LogLikelihood]:
        """The likelihoods of the tokens at given places of each sequence, in the same order.

        Sequences of like length are read together, padded to buckets, and only the asked places are
        projected to the vocabulary; so few shapes compile, and long contexts take little memory.

        Args:
          questions: token ids of a sequence, and the places that are asked for: at least one, all
            in [1, length). All tokens but the last are read, at most the model's max_length.

        Raises:
          UserError: a sequence that is too long, or a token past the vocabulary.
        """
        shapes: dict[tuple[int, int], list[int]] = {}
        for number, (ids, places) in enumerate(questions):
            self._check(ids, places)
            length = bucket(len(ids) - 1)
            shapes.setdefault((length, min(length, _targets(len(places)))), []).append(number)
        answers: dict[int, LogLikelihood] = {}
        for (length, targets), numbers in sorted(shapes.items()):
            for begin in range(0, len(numbers), self.rows):
                chosen = numbers[begin : begin + self.rows]
                made = self._read_batch(params, [questions[i] for i in chosen], length, targets)
                answers |= dict(zip(chosen, made, strict=True))
        return [answers[number] for number in range(len(questions))]

    def generate(
        self,
        params: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_strings: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        sampler: SamplerConfig = GREEDY,
        seed: int = 0,
    ) -> list[Completion]:
        """What the model writes after each prompt, in the order of the prompts.

        A completion ends with a stop token of the chat template (of documents, where there is no
        template), at the first stop string, or after `max_new_tokens`. A prompt that leaves no room
        for so many loses its beginning.

        Args:
          prompts: token ids, none empty (start with bos).
          stop_ids: further tokens that end a completion.
          seed: non-negative; prompt i has its randomness from the seed and i.

        Raises:
          UserError: see `generation.generate`; no room for any prompt.
        """
        room = self.model.max_length - max_new_tokens
        if room < 1:
            raise UserError(
                f"{max_new_tokens} new tokens leave no room for a prompt in the "
                f"{self.model.max_length} that {self.name} reads: ask for fewer."
            )
        clipped = [prompt[-room:] for prompt in prompts]
        order = sorted(range(len(clipped)), key=lambda place: len(clipped[place]))
        completions: dict[int, Completion] = {}
        for begin in range(0, len(order), self.rows):
            chosen = order[begin : begin + self.rows]
            filled = [*chosen, *chosen[:1] * (self.rows - len(chosen))]
            made = generate(
                self.model,
                params,
                [clipped[place] for place in filled],
                max_new_tokens=max_new_tokens,
                sampler=sampler,
                rng=_row_keys(seed, filled),
                stop_ids=tuple(dict.fromkeys((*self.stop_ids, *stop_ids))),
                pad_id=self.tokenizer.pad_id,
                stop_strings=stop_strings,
                tokenizer=self.tokenizer,
            )
            for row, place in enumerate(chosen):
                ids = made.tokens[row, : made.lengths[row]].tolist()
                text = before_stop(self.tokenizer.decode(ids), stop_strings)
                completions[place] = Completion(text, tuple(ids), bool(made.stopped[row]))
        return [completions[place] for place in range(len(prompts))]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a completion."""
        if self.template is None:
            return document_stop_ids(self.tokenizer)
        return self.template.stop_ids(self.tokenizer)

    def _check(self, ids: Ids, places: Ids) -> None:
        if not len(places) or not 0 < np.min(places) <= np.max(places) < len(ids):
            raise ValueError(f"places {places} of a sequence of {len(ids)} tokens")
        if len(ids) - 1 > self.model.max_length:
            raise UserError(
                f"a sequence of {len(ids)} tokens is longer than {self.name} reads, which is "
                f"{self.model.max_length}: shorten it."
            )
        if not 0 <= np.min(ids) <= np.max(ids) < self.model.vocab_size:
            raise UserError(f"a token is outside the vocabulary of {self.model.vocab_size}.")

    def _read_batch(
        self,
        params: Any,
        questions: Sequence[tuple[Ids, Ids]],
        length: int,
        targets: int,
    ) -> list[LogLikelihood]:
        tokens_BT, segments_BT = np.zeros((2, self.rows, length), np.int32)
        inputs_BA, targets_BA = np.zeros((2, self.rows, targets), np.int32)
        for row, (ids, places) in enumerate(questions):
            tokens_BT[row, : len(ids) - 1], segments_BT[row, : len(ids) - 1] = ids[:-1], 1
            inputs_BA[row, : len(places)] = np.asarray(places) - 1
            targets_BA[row, : len(places)] = np.asarray(ids)[np.asarray(places)]
        batch = (tokens_BT, segments_BT, inputs_BA, targets_BA)
        logprobs_BA, greedy_BA = map(to_host, _reader(self.model, self.mesh)(params, *batch))
        return [
            LogLikelihood(logprobs_BA[row, : len(places)], greedy_BA[row, : len(places)])
            for row, (_, places) in enumerate(questions)
        ]


@functools.lru_cache(maxsize=8)
def _reader(model: LanguageModel, mesh: Mesh) -> Callable[..., Any]:
    """`_read` of host batches, compiled once for a model whatever its subjects."""
    rows = sharding.batch_sharding(mesh)
    jitted = jax.jit(functools.partial(_read, model), out_shardings=rows)
    return lambda params, *batch: jitted(params, *to_devices(batch, rows))


def _read(
    model: LanguageModel,
    params: Any,
    tokens_BT: jax.Array,
    segments_BT: jax.Array,
    inputs_BA: jax.Array,
    targets_BA: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities float32 [B, A] of the targets that follow the inputs at given places, and
    bool [B, A], whether they are the most likely ones."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    hidden_BTD, _ = model.apply(params, tokens_BT, positions_BT, segments_BT)
    hidden_BAD = jnp.take_along_axis(hidden_BTD, inputs_BA[..., None], axis=1)
    kernel_DV = model.output_kernel(params)

    def score(hidden_BCD: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BCV = model.project(hidden_BCD, kernel_DV)
        logprobs_BCV = jax.nn.log_softmax(logits_BCV)
        chosen_BC = jnp.take_along_axis(logprobs_BCV, targets_BC[..., None], axis=-1)[..., 0]
        return chosen_BC, jnp.argmax(logits_BCV, axis=-1) == targets_BC

    return over_time(score, _CHUNK, hidden_BAD, targets_BA)


def _targets(count: int) -> int:
    size = _FEWEST
    while size < count:
        size *= 4
    return size


def _row_keys(seed: int, numbers: Sequence[int]) -> jax.Array:
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(
        jnp.asarray(numbers)
    )

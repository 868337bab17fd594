"""What a run held out, document by document: by what two models can be compared in pairs.

Legend: B batch, T time.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from llm_jax.config import build
from llm_jax.data.chat_corpus import ChatCorpus, ChatDataConfig
from llm_jax.data.corpus import Corpus, DataConfig
from llm_jax.data.packing import pack
from llm_jax.data.store import TokenStore
from llm_jax.errors import UserError
from llm_jax.evals.batching import padded_batches
from llm_jax.objectives import lm
from llm_jax.placement import to_host
from llm_jax.trainers import TRAINERS

if TYPE_CHECKING:
    from llm_jax.runs import LoadedRun

CHUNK = 512  # positions of a row whose logits are held at once


@dataclasses.dataclass(frozen=True)
class DocumentSum:
    """Of the targets of a document that have bytes: not of its end, nor of a chat's markers.

    nats: Σ −log p. tokens: how many there are. bytes: UTF-8 bytes of them.
    """

    nats: float
    tokens: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Documents that a run held out. store: all of them. indices: the place of each in it, by a
    hash of its text, which is the same for every tokenizer."""

    store: TokenStore
    indices: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """Some documents of a store, as a store for `pack`."""

    tokens: np.ndarray
    offsets: np.ndarray
    trained: np.ndarray | None


def held_out(run: LoadedRun) -> dict[str, HeldOut]:
    """The texts, or conversations, that a run held out, by component of its mixture.

    Raises:
      UserError: the run trained on neither, or its sources cannot be read any more.
    """
    config_file = run.path / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.exists() else {}
    stage = TRAINERS.get(config.get("trainer", ""))
    data = None if stage is None else getattr(build(stage.config, config), "data", None)
    if isinstance(data, ChatDataConfig) and run.stored.template is not None:
        texts: Corpus | ChatCorpus = ChatCorpus(data, run.stored.template, run.tokenizer)
    elif isinstance(data, DataConfig):
        texts = Corpus(data, run.tokenizer, config["seed"])
    else:
        raise UserError(
            f"{run.path} held out no texts or conversations of its own (it is a run of "
            f"{config.get('trainer')!r}): measure all runs by tools.evaluate, whose "
            "evaluation.json is compared."
        )
    found = {}
    for name, splits in texts.stores.items():
        store = splits["validation"]
        indices: dict[str, int] = {}
        for index in range(len(store)):
            text = run.tokenizer.decode(store.document(index))
            name_of_text = hashlib.blake2b(text.encode("utf-8"), digest_size=8).hexdigest()
            indices.setdefault(name_of_text, index)
        found[name] = HeldOut(store, indices)
    return found


def measure(
    run: LoadedRun, documents: HeldOut, names: Sequence[str], length: int, batch_size: int = 16
) -> dict[str, DocumentSum]:
    """What a model makes of each document, read in pieces of at most `length` tokens.

    Args:
      documents: of that run.
      names: hashes of some of them.
      length: of the context in tokens; what follows in a longer document is read without what
        stands before.
      batch_size: rows at once.

    Returns:
      By hash, those of which anything counts.
    """
    store, indices = documents.store, [documents.indices[name] for name in names]
    spans = [slice(*store.offsets[index : index + 2]) for index in indices]
    chosen = _Chosen(
        np.concatenate([store.tokens[span] for span in spans]),
        np.cumsum([0, *(span.stop - span.start for span in spans)]),
        None if store.trained is None else np.concatenate([store.trained[s] for s in spans]),
    )
    rows = pack(chosen, length, "best_fit")
    token_bytes = run.tokenizer.token_bytes()
    token_nats = jax.jit(functools.partial(lm.token_nats, run.model, chunk=CHUNK))
    nats, tokens, sizes = np.zeros((3, len(names)))
    with jax.set_mesh(run.mesh):
        for places, batch in padded_batches(rows, range(len(rows)), batch_size):
            nats_BT = to_host(token_nats(run.params, batch)).astype(np.float64)[: len(places)]
            documents_BT = np.stack([rows.documents(place) for place in places])
            bytes_BT = token_bytes[batch.targets[: len(places)]]
            counted = (batch.loss_weights[: len(places)] > 0) & (bytes_BT > 0)
            owners = documents_BT[counted]
            for sums, values in (
                (nats, nats_BT[counted]),
                (tokens, np.ones(len(owners))),
                (sizes, bytes_BT[counted]),
            ):
                sums += np.bincount(owners, values, len(names))
    return {
        name: DocumentSum(float(n), int(t), int(b))
        for name, n, t, b in zip(names, nats, tokens, sizes, strict=True)
        if b
    }

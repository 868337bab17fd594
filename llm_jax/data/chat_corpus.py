"""What the data section of fine-tuning means: conversations, and texts replayed beside them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from llm_jax.data.corpus import by_name, fingerprint_of
from llm_jax.data.example_store import ExampleConfig, conversation_stores
from llm_jax.data.packing import DocumentRows, PackedRows, Rows, TooLong, pack
from llm_jax.data.readers import format_of
from llm_jax.data.sources import STDLIB, SourceConfig
from llm_jax.data.store import TokenStore, build_text_stores
from llm_jax.data.template_base import ChatTemplate
from llm_jax.data.tokenizer_base import Tokenizer
from llm_jax.errors import UserError

CHAT = "chat"  # the component that `config.data.source` makes
REPLAY = "replay"  # the component that `config.data.replay_source` makes
TEXT = "text"  # the format of examples that are plain text to continue


@dataclasses.dataclass(frozen=True)
class NamedExampleConfig(ExampleConfig):
    """Further conversations, under the name that mixture weights use."""

    name: str = ""


@dataclasses.dataclass(frozen=True)
class ChatDataConfig(ExampleConfig):
    """The conversations, as the component "chat", and what is mixed with them.

    Plain text (format "text", a text file, or the source "stdlib") is trained on whole, as in
    pre-training: that is continual pre-training.
    """

    source: str = "stdlib:instructions"
    # A name in `templates.TEMPLATES`, a .jinja file, or a folder with a Hugging Face tokenizer;
    # None: that of the stage before, or "chatml".
    template: str | None = None
    too_long: TooLong = "truncate_right"  # what happens to conversations longer than a row
    packing: Literal["best_fit", "single"] = "best_fit"
    mixture: tuple[NamedExampleConfig, ...] = ()
    # Texts of pre-training, against forgetting: a source as there, and its share of the rows.
    replay_source: str | None = None
    replay_text_field: str = "text"
    replay_share: float = 0.1
    # Weights by component name; empty gives conversations the same weight each and texts their
    # share. Phases may change them.
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    validation_fraction: float = 0.05  # of the conversations, chosen by the hash of their prompt
    cache_dir: str | None = None  # of token stores; None: $LLM_JAX_CACHE or ~/.cache/llm_jax

    def __post_init__(self) -> None:
        if not 0 < self.replay_share < 1:
            raise UserError(
                f"config.data.replay_share={self.replay_share} must lie between 0 and 1."
            )


class ChatCorpus:
    """The token stores of a data config; see `corpus.Corpus` for its twin of plain texts."""

    main = CHAT

    def __init__(self, config: ChatDataConfig, template: ChatTemplate, tokenizer: Tokenizer):
        """Renders and tokenises what is not in the cache yet.

        Raises:
          UserError: a source that cannot be read or is empty, or a component name used twice.
        """
        self._config = config
        self._packed: dict[tuple[str, str, int], PackedRows] = {}
        options: dict[str, Any] = {
            "validation_fraction": config.validation_fraction,
            "cache_dir": config.cache_dir,
        }
        sources = by_name(CHAT, config, config.mixture, reserved=REPLAY)
        self.stores: dict[str, dict[str, TokenStore]] = {}
        for name, source in sources.items():
            if _is_text(source):
                self.stores[name] = build_text_stores(source.records, tokenizer, **options)
            else:
                self.stores[name] = conversation_stores(source, template, tokenizer, **options)
        if config.replay_source is not None:
            texts = SourceConfig(config.replay_source, text_field=config.replay_text_field)
            self.stores[REPLAY] = build_text_stores(texts, tokenizer, **options)

    @property
    def weights(self) -> dict[str, float]:
        """The mixture weights where a phase gives none."""
        if self._config.weights:
            return dict(self._config.weights)
        chats = [name for name in self.stores if name != REPLAY]
        weights = {name: 1.0 / len(chats) for name in chats}
        if REPLAY in self.stores:
            share = self._config.replay_share
            weights = {name: weight * (1 - share) for name, weight in weights.items()}
            weights[REPLAY] = share
        return weights

    @property
    def fingerprint(self) -> str:
        """A hash of all documents, in their order, their tokens and which of these are trained."""
        return fingerprint_of(self.stores)

    def rows(self, length: int, weights: Mapping[str, float]) -> dict[str, Rows]:
        """Training rows of every component."""
        return {name: self._pack(name, "train", length) for name in self.stores}

    def validation_rows(self, length: int) -> dict[str, DocumentRows]:
        """Validation rows by component, without those of which nothing is left at the length."""
        rows: dict[str, DocumentRows] = {}
        for name in self.stores:
            with contextlib.suppress(UserError):
                rows[name] = self._pack(name, "validation", length)
        return rows

    def describe(self) -> str:
        """One line: what was read, and what was not."""
        parts = []
        for name, splits in self.stores.items():
            train, validation = splits["train"], splits["validation"]
            kind = "documents" if train.trained is None else "conversations"
            part = f"{name}: {len(train):,} {kind}, {len(train.tokens):,} tokens"
            if train.trained is not None:
                part += f" ({int(train.trained.sum()):,} of them trained on)"
            part += f", {len(validation):,} held out"
            if train.meta.skipped:  # of the whole source, whichever split they would be in
                part += f", {train.meta.skipped:,} malformed rows skipped"
            if train.meta.empty:
                part += f", {train.meta.empty:,} rows with nothing to learn left out"
            parts.append(part)
        return "; ".join(parts)

    def facts(self, length: int) -> tuple[str, ...]:
        """What rows of a length leave out, for the log."""
        facts = []
        for name in self.stores.keys() - self.validation_rows(length).keys():
            facts.append(f"no held-out row of {name} has anything to count")
        for name in self.stores:
            clipped = self._pack(name, "train", length).clipped
            if clipped.too_long:
                what = {"drop": "left out"}.get(self._config.too_long, "truncated")
                facts.append(f"{clipped.too_long:,} of {name} are longer than a row and {what}")
            if clipped.untrained:
                facts.append(
                    f"{clipped.untrained:,} of {name} have no trained token and are left out"
                )
        return tuple(facts)

    def _pack(self, name: str, split: str, length: int) -> PackedRows:
        key = (name, split, length)
        if key not in self._packed:
            store = self.stores[name][split]
            packing = self._config.packing if store.trained is not None else "concatenate"
            self._packed[key] = pack(store, length, packing, self._config.too_long)
        return self._packed[key]


def _is_text(source: ExampleConfig) -> bool:
    if source.format is not None:
        return source.format == TEXT
    file_format = source.file_format or format_of(Path(source.source))
    return source.source == STDLIB or file_format == "text"

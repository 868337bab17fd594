"""What a config's data section means: token stores by component, and their rows at a length."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from llm_jax.config import digest
from llm_jax.data.documents import is_validation
from llm_jax.data.needle import NeedleConfig, NeedleRows
from llm_jax.data.packing import DocumentRows, Packing, Rows, pack
from llm_jax.data.sources import SourceConfig, read_documents
from llm_jax.data.store import TokenStore, build_text_stores
from llm_jax.data.tokenizers import Tokenizer
from llm_jax.errors import UserError

C = TypeVar("C")

MAIN = "text"  # the component that `config.data.source` makes
NEEDLE_ROWS = 1 << 20  # an epoch of generated rows: more than a run reads
NEEDLE = "needle"  # the component that `config.data.needle` makes


@dataclasses.dataclass(frozen=True)
class ComponentConfig(SourceConfig):
    """A further corpus, under the name that mixture weights use."""

    name: str = ""


@dataclasses.dataclass(frozen=True)
class DataConfig(SourceConfig):
    """The corpus, as the component "text", and what is mixed with it."""

    mixture: tuple[ComponentConfig, ...] = ()
    needle: NeedleConfig | None = None  # needle rows with filler from the corpus
    # Weights by component name; empty gives every component the same. Phases may change them.
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    packing: Packing = "concatenate"
    validation_fraction: float = 0.05  # of the documents, chosen by their hash
    cache_dir: str | None = None  # of token stores; None: $LLM_JAX_CACHE or ~/.cache/llm_jax


class Corpus:
    """The token stores of a data config."""

    main = MAIN

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, seed: int):
        """Tokenises what is not in the cache yet.

        Raises:
          UserError: a source that cannot be read or is empty, or a component name used twice.
        """
        self._config, self._tokenizer, self._seed = config, tokenizer, seed
        sources = by_name(MAIN, config, config.mixture, reserved=NEEDLE)
        self.stores: dict[str, dict[str, TokenStore]] = {
            name: build_text_stores(
                _source(source),
                tokenizer,
                validation_fraction=config.validation_fraction,
                cache_dir=config.cache_dir,
            )
            for name, source in sources.items()
        }

    @property
    def weights(self) -> dict[str, float]:
        """The mixture weights where a phase gives none."""
        names = [*self.stores, *([NEEDLE] if self._config.needle else [])]
        return dict(self._config.weights) or {name: 1.0 for name in names}

    @property
    def fingerprint(self) -> str:
        """A hash of all documents, in their order, and their tokens."""
        return fingerprint_of(self.stores)

    def rows(self, length: int, weights: Mapping[str, float]) -> dict[str, Rows]:
        """Training rows of every component that has a weight, and of others that are cheap.

        Raises:
          UserError: a row is too short for a needle and its question.
        """
        rows: dict[str, Rows] = {
            name: pack(splits["train"], length, self._config.packing)
            for name, splits in self.stores.items()
        }
        if self._config.needle is not None and weights.get(NEEDLE, 0) > 0:
            rows[NEEDLE] = NeedleRows(
                self._tokenizer,
                self.stores[MAIN]["train"],
                length,
                self._seed,
                NEEDLE_ROWS,
                self._config.needle,
            )
        return rows

    def validation_rows(self, length: int) -> dict[str, DocumentRows]:
        """Validation rows by component; generated ones have none."""
        return {
            name: pack(splits["validation"], length, self._config.packing)
            for name, splits in self.stores.items()
        }

    def facts(self, length: int) -> tuple[str, ...]:
        """What rows of a length leave out: nothing."""
        del length
        return ()

    def describe(self) -> str:
        """One line: what was read, and what was not."""
        parts = []
        for name, splits in self.stores.items():
            train, validation = splits["train"], splits["validation"]
            part = (
                f"{name}: {len(train):,} documents, {len(train.tokens):,} tokens, "
                f"{len(validation):,} held out"
            )
            if train.meta.skipped:  # of the whole source, whichever split they would be in
                part += f", {train.meta.skipped:,} malformed rows skipped"
            parts.append(part)
        return "; ".join(parts)


def by_name(main: str, first: C, components: Sequence[C], reserved: str) -> dict[str, C]:
    """The parts of a mixture by name: `first` as `main`, then the named components.

    Raises:
      UserError: a component without a name, or with one that is used twice or `reserved`.
    """
    named = {main: first}
    for component in components:
        name = getattr(component, "name", "")
        if not name or name in (*named, reserved):
            raise UserError(
                f"config.data.mixture has a component named {name!r}: every name must be given "
                f"once and differ from {main!r} and {reserved!r}."
            )
        named[name] = component
    return named


def fingerprint_of(stores: Mapping[str, Mapping[str, TokenStore]]) -> str:
    """A hash of all documents of the stores of each component, by split."""
    return digest(
        {
            name: {split: store.fingerprint for split, store in splits.items()}
            for name, splits in stores.items()
        }
    )


def training_texts(config: DataConfig) -> Iterator[str]:
    """The texts a tokenizer is trained on: those of the main corpus that are not held out."""
    for document in read_documents(_source(config)):
        if not is_validation(document.text, config.validation_fraction):
            yield document.text


def _source(config: SourceConfig) -> SourceConfig:
    """The SourceConfig part of a config that extends it, since caches are keyed by it."""
    names = [field.name for field in dataclasses.fields(SourceConfig)]
    return SourceConfig(**{name: getattr(config, name) for name in names})

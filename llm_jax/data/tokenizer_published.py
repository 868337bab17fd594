"""What the files beside a published tokenizer say of its special tokens."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from llm_jax.errors import UserError

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
GENERATION_CONFIG = "generation_config.json"
MODEL_CONFIG = "config.json"
# Kept with the tokenizer, so that an export has them again.
KEPT = (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS, "tokenizer.model")

# Strings by which published tokenizers name a purpose, looked for among their special tokens where
# no file beside them says.
_STRINGS: dict[str, tuple[str, ...]] = {
    "eos": ("<|eos|>", "</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>"),
    "bos": ("<|bos|>", "<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>"),
    "pad": ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>"),
    "system": ("<|system|>",),
    "user": ("<|user|>",),
    "assistant": ("<|assistant|>",),
    "tool": ("<|tool|>",),
    "end_of_turn": ("<|end_of_turn|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"),
}


@dataclasses.dataclass(frozen=True)
class PublishedSettings:
    """files: those that stand beside a tokenizer, by name. where: for messages."""

    files: Mapping[str, bytes]
    where: str

    @property
    def kept(self) -> dict[str, bytes]:
        """The files that an export has again; settings of generation are none of a tokenizer."""
        return {name: file for name, file in self.files.items() if name in KEPT}

    def read(self, name: str) -> dict[str, Any]:
        """A file's object; empty where there is no such file.

        Raises:
          UserError: the file holds no JSON object.
        """
        try:
            content = json.loads(self.files.get(name, b"{}"))
        except ValueError as error:
            raise UserError(f"{self.where}/{name} is not JSON: {error}.") from error
        if not isinstance(content, dict):
            raise UserError(f"{self.where}/{name} holds no JSON object.")
        return content

    def tokens(
        self,
        added: Collection[str],
        token_to_id: Callable[[str], int | None],
        id_to_token: Callable[[int], str | None],
        own: Mapping[str, str] | None = None,
    ) -> dict[str, str]:
        """The string of each purpose that the tokenizer has a token for; eos is among them.

        Args:
          added: the strings that may name a purpose where no file does.
          token_to_id, id_to_token: look a token up that may serve a purpose.
          own: what the tokenizer's own file names.

        Raises:
          UserError: no token ends a text.
        """
        configs = [self.read(name) for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP)]
        found: dict[str, str] = {}
        for purpose, strings in _STRINGS.items():
            named = [content_of(config.get(f"{purpose}_token")) for config in configs]
            candidates = [token for token in named if token_to_id(token) is not None]
            candidates += filter(None, [(own or {}).get(purpose)])
            if purpose == "eos":
                candidates += filter(None, map(id_to_token, self.eos_ids()))
            candidates += [token for token in strings if token in added]
            if candidates:
                found[purpose] = candidates[0]
        if "eos" not in found:
            raise UserError(
                f"the tokenizer in {self.where} has no token that ends a text: name one of its "
                f"tokens as eos_token in {TOKENIZER_CONFIG} beside it."
            )
        return found

    def eos_ids(self) -> tuple[int, ...]:
        """The ids at which generations end, as generation_config.json says, else config.json."""
        return generation_ends(self.read(GENERATION_CONFIG)) or generation_ends(
            self.read(MODEL_CONFIG)
        )


def generation_ends(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids of eos in a generation_config.json, which names one or several."""
    ids = config.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    return tuple(id_ for id_ in ids if type(id_) is int)


def beside(file: Path) -> PublishedSettings:
    """The settings beside a tokenizer's file."""
    names = (*KEPT, GENERATION_CONFIG, MODEL_CONFIG)
    paths = [file.parent / name for name in names if file.name != name]
    return PublishedSettings(
        {path.name: path.read_bytes() for path in paths if path.exists()}, str(file.parent)
    )


def content_of(token: Any) -> str:
    """The string of a token, which the files write plainly or as an object."""
    return (token["content"] if isinstance(token, dict) else token) or ""

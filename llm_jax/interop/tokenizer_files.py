"""Tokenizers, chat templates and generation settings as files of a Hugging Face folder, both ways.

What `write_tokenizer` writes is read by `transformers.AutoTokenizer` and gives the ids that the
tokenizer gives here, for texts and, with the template, for conversations. Two things differ: the
strings of special tokens inside a text are text here and tokens there; and transformers builds the
tokenizers of some model types anew, whatever their files say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from llm_jax.data.template_base import ChatTemplate
from llm_jax.data.template_jinja import (
    MORE_TEMPLATES,
    TEMPLATE_FILE,
    JinjaTemplate,
    read_jinja,
    template_file,
)
from llm_jax.data.tokenizer_base import ByteTokenizer, Tokenizer
from llm_jax.data.tokenizer_json import TOKENIZER_FILE, start_with
from llm_jax.data.tokenizer_published import (
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    PublishedSettings,
    generation_ends,
)
from llm_jax.data.tokenizer_sentencepiece import SentencePieceTokenizer
from llm_jax.data.tokenizers import has_tokenizer, read_tokenizer
from llm_jax.errors import disk_errors
from llm_jax.interop.sentencepiece_json import sentencepiece_json
from llm_jax.interop.template_source import jinja_sources

__all__ = [
    "generation_config",
    "has_tokenizer",
    "read_template",
    "read_tokenizer",
    "write_tokenizer",
]

# The class of transformers that takes a tokenizer.json as it is.
TOKENIZER_CLASS = "PreTrainedTokenizerFast"


def read_template(folder: Path) -> JinjaTemplate | None:
    """The chat template of a published model: that of chat_template.jinja (with those of
    additional_chat_templates/), else of chat_template.json, else of tokenizer_config.json; None
    where there is none.

    Raises:
      UserError: a damaged file, or one without a template "default".
    """
    return None if template_file(folder) is None else read_jinja(folder)


def write_tokenizer(
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    folder: Path,
    max_length: int | None = None,
) -> None:
    """Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja.

    What a published tokenizer brought beside it is kept, but for its chat template.

    Args:
      tokenizer: any; a SentencePiece model is written as it is, too.
      template: written as Jinja, also into tokenizer_config.json, where older readers look; None:
        the folder gets no template.
      folder: made where it is missing.
      max_length: tokens that the model reads, as model_max_length; None: what was published.

    Raises:
      UserError: the folder cannot be written; a SentencePiece model that the `tokenizers` library
        cannot imitate.
    """
    files = tokenizer.published | tokenizer.files()
    content = _tokenizer_json(tokenizer)
    sources = {} if template is None else jinja_sources(template, tokenizer)
    config = _tokenizer_config(tokenizer, json.loads(content), max_length) | _in_config(sources)
    files[TOKENIZER_FILE] = content
    files[TOKENIZER_CONFIG] = _json(config)
    files.setdefault(SPECIAL_TOKENS_MAP, _json(_named_tokens(tokenizer)))
    for name, source in sources.items():
        path = TEMPLATE_FILE if name == "default" else f"{MORE_TEMPLATES}/{name}.jinja"
        files[path] = source.encode()
    with disk_errors(folder, "Mend that, or name another folder."):
        for name, file in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(file)


def generation_config(
    tokenizer: Tokenizer, published: Mapping[str, Any], template: ChatTemplate | None = None
) -> dict[str, Any]:
    """The fields of generation_config.json: what was published, such as the sampler's settings, and
    the ids of bos, pad and of whatever ends a generation.

    Args:
      published: the imported fields; may be empty.
      template: its turns' ends are ends of generations, too.
    """
    ends = tokenizer.eos_ids if template is None else template.stop_ids(tokenizer)
    ids = list(dict.fromkeys([*generation_ends(published), *ends]))
    return {
        "bos_token_id": tokenizer.bos_id,
        "pad_token_id": tokenizer.pad_id,
        **published,
        "eos_token_id": ids if len(ids) > 1 else ids[0],
    }


def _tokenizer_json(tokenizer: Tokenizer) -> bytes:
    if isinstance(tokenizer, ByteTokenizer):
        return _bytes_json(tokenizer)
    if isinstance(tokenizer, SentencePieceTokenizer):
        return sentencepiece_json(tokenizer)
    return tokenizer.files()[TOKENIZER_FILE]


def _bytes_json(tokenizer: ByteTokenizer) -> bytes:
    """Byte-level BPE without merges, whose id of each byte is the byte."""
    # The alphabet of GPT-2: printable bytes are themselves, the others follow from U+0100 on.
    characters = [chr(byte) for byte in range(256)]
    others = [byte for byte in range(256) if chr(byte) not in pre_tokenizers.ByteLevel.alphabet()]
    for place, byte in enumerate(others):
        characters[byte] = chr(256 + place)
    vocabulary = {character: byte for byte, character in enumerate(characters)}
    bpe = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(list(tokenizer.special_tokens.values()))
    bpe.post_processor = start_with(tokenizer.special_tokens["bos"], bpe)
    return bpe.to_str(pretty=True).encode()


def _tokenizer_config(
    tokenizer: Tokenizer, content: dict[str, Any], max_length: int | None
) -> dict[str, Any]:
    """tokenizer_config.json without a template."""
    config = PublishedSettings(tokenizer.published, "the tokenizer's folder").read(TOKENIZER_CONFIG)
    if not config or isinstance(tokenizer, SentencePieceTokenizer):
        # The class that a .model was published with would not take our tokenizer.json as it is.
        config["tokenizer_class"] = TOKENIZER_CLASS
    added = {
        str(token["id"]): {name: value for name, value in token.items() if name != "id"}
        for token in content["added_tokens"]
    }
    defaults = {
        **_named_tokens(tokenizer),
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": False,
    }
    config = defaults | config
    if max_length is not None:
        config["model_max_length"] = max_length
    config.setdefault("tokenizer_class", TOKENIZER_CLASS)
    config.pop("chat_template", None)
    return config


def _in_config(sources: dict[str, str]) -> dict[str, Any]:
    """The field of tokenizer_config.json that holds the templates."""
    if not sources:
        return {}
    if set(sources) == {"default"}:
        return {"chat_template": sources["default"]}
    return {"chat_template": [{"name": n, "template": text} for n, text in sources.items()]}


def _named_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    names = ("bos", "eos", "pad")
    tokens = tokenizer.special_tokens
    return {f"{name}_token": tokens[name] for name in names if name in tokens}


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()

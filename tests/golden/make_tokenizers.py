"""Writes tokenizers.json: small tokenizers in the manner of published ones, and what transformers
makes of texts and conversations with them.

Imports nothing of llm_jax, so that it is an independent judge:

    pip install transformers && python tests/golden/make_tokenizers.py

For each tokenizer the file holds `files` (name → content) of its folder; `size`, its number of
tokens; `ids` of each of `texts`, with what the tokenizer puts before a text; and, where the folder
has a template, `conversations` with the ids of `messages`, `is_prompt` where they go on to the
answer. `plain_ids` are those of the texts without anything before them.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import tokenizers as library
import transformers
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

OUTPUT = Path(__file__).with_name("tokenizers.json")
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind.\n" * 3,
    "def encode(self, text):\n    return [ord(c) for c in text]\n" * 3,
    "In 1984 and 2024 the prices rose by 3.14159 percent, isn't it?\n\nYes. user assistant\n",
    "Größe, naïve, Ελλάδα, 中文字符, 🦜 and 🇩🇪. [INST] system user [/INST] \n\n\n",
] * 2
TEXTS = [
    *CORPUS,
    "",
    " ",
    "a",
    " leading and trailing ",
    "two  spaces,   three\tand\ttabs",
    "\n\nlines\r\n\n",
    "def f(x):\n    if x:\n        return {'a': [1, 2]}\n",
    "日本語のテキスト, emoji 👩‍👩‍👧, e\u0301, ﬁ, \u200b, İstanbul",
]
LLAMA3 = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}"
    "{{- message.content | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)


LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(special, pattern=None):
    tokenizer = library.Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [pre_tokenizers.Split(library.Regex(pattern), "isolated")] if pattern else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def write(folder, tokenizer, **configs):
    """Saves a tokenizer.json, and each config as NAME.json; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    for name, content in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def gpt2(folder):
    """One special token, and nothing before a text."""
    config = {"model_max_length": 1024, "tokenizer_class": "GPT2Tokenizer", "errors": "replace"}
    return write(folder, byte_level(["<|endoftext|>"]), tokenizer_config=config)


def llama3(folder):
    """Byte-level, bos first, several ends, and a template."""
    special = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>",
               "<|end_header_id|>", "<|eom_id|>")  # fmt: skip
    tokenizer = byte_level(special, pattern=LLAMA3_PATTERN)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
            ),
        ]
    )
    config = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "model_max_length": 131072,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": LLAMA3,
    }
    generation = {"eos_token_id": [1, 5, 2], "bos_token_id": 0, "temperature": 0.6, "top_p": 0.9}
    return write(folder, tokenizer, tokenizer_config=config, generation_config=generation)


def llama2(folder):
    """BPE of SentencePiece's kind with ▁ and byte fallback, bos first."""
    model = models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = library.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
        max_token_length=8,
    )
    tokenizer.train_from_iterator([w for t in CORPUS for w in t.split(" ")], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are ordinary tokens
    tokenizer = library.Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}{% elif m.role == 'system' %}"
        "{{ '<<SYS>>' + m.content + '<</SYS>>' }}{% else %}"
        "{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    tokens = {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"},
              "unk_token": {"content": "<unk>"}}  # fmt: skip
    config = {"chat_template": [{"name": "default", "template": template}]}
    return write(folder, tokenizer, special_tokens_map=tokens, tokenizer_config=config)


def mistral(folder):
    """As `llama2`, but only the first word of an input has the space."""
    tokenizer = library.Tokenizer.from_file(str(llama2(folder) / "tokenizer.json"))
    content = json.loads(tokenizer.to_str())
    content["normalizer"] = None
    tokenizer = library.Tokenizer.from_str(json.dumps(content))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return write(folder, tokenizer)


def phi3(folder):
    """Special tokens that take the white space after them away."""
    tokenizer = byte_level(["<|endoftext|>"])
    names = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    tokenizer.add_special_tokens([AddedToken(n, rstrip=True, normalized=False) for n in names])
    config = {
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "chat_template": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + "
        "'<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
        "{% else %}{{ eos_token }}{% endif %}",
    }
    return write(folder, tokenizer, tokenizer_config=config)


def vocabulary(folder):
    """As `gpt2`, without a tokenizer.json."""
    write(folder, None, tokenizer_config={"tokenizer_class": "GPT2Tokenizer"})
    byte_level(["<|endoftext|>"]).model.save(str(folder))
    return folder


PUBLISHED = {
    "gpt2": gpt2,
    "vocabulary": vocabulary,
    "llama3": llama3,
    "llama2": llama2,
    "mistral": mistral,
    "phi3": phi3,
}

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Größe?\n"},
    {"role": "assistant", "content": "Naïve 🦜."},
    {"role": "user", "content": "And  then?"},
    {"role": "assistant", "content": "It's 42."},
]


def judged(folder):
    """What transformers makes of the folder's tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    conversations = []
    for end in (5, 4, 2) if tokenizer.chat_template else ():
        is_prompt = end < 5
        encoded = tokenizer.apply_chat_template(MESSAGES[:end], add_generation_prompt=is_prompt)
        conversations.append(
            {"messages": MESSAGES[:end], "is_prompt": is_prompt, "ids": encoded["input_ids"]}
        )
    return {
        "files": {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()},
        "size": len(tokenizer),
        "texts": TEXTS,
        "ids": tokenizer(TEXTS)["input_ids"],
        "plain_ids": tokenizer(TEXTS, add_special_tokens=False)["input_ids"],
        "conversations": conversations,
    }


def main():
    made = {}
    for name, build in PUBLISHED.items():
        with tempfile.TemporaryDirectory() as folder:
            made[name] = judged(build(Path(folder)))
    OUTPUT.write_text(json.dumps(made, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

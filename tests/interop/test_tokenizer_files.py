"""Tokenizers, templates and generation settings of published folders, in and out."""

import io
import json
from pathlib import Path

import pytest

from llm_jax.data.examples import Conversation, Message
from llm_jax.data.template_jinja import JinjaTemplate
from llm_jax.data.templates import TEMPLATES
from llm_jax.data.tokenizer_base import ByteTokenizer
from llm_jax.data.tokenizer_json import JsonTokenizer, train_bpe
from llm_jax.data.tokenizers import load_tokenizer
from llm_jax.errors import UserError
from llm_jax.interop.tokenizer_files import (
    generation_config,
    has_tokenizer,
    read_template,
    read_tokenizer,
    write_tokenizer,
)

# By transformers; see make_tokenizers.py there.
GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden" / "tokenizers.json").read_text(encoding="utf-8")
)
TEXTS = GOLDEN["gpt2"]["texts"]
WITH_TEMPLATE = [name for name, golden in GOLDEN.items() if golden["conversations"]]

LOOK = {"name": "look", "arguments": {"town": "Tromsø", "why": "</tool_call> <b> {}"}}
WAIT = {"name": "wait", "arguments": {}}
TOOLS = ({"name": "look", "description": "Tells the <weather>."}, {"name": "wait"})
CONVERSATIONS = {
    "chat": Conversation(
        (
            Message("system", "Be\nbrief."),
            Message("user", " Größe?\n"),
            Message("assistant", "Naïve 🦜."),
            Message("user", "And?"),
            Message("assistant", "\nNo. "),
        )
    ),
    "calls": Conversation(
        (
            Message("user", "Weather?"),
            Message("assistant", "Let me look.", (LOOK, WAIT)),
            Message("tool", "4°", name="look"),
            Message("tool", "", name="wait"),
            Message("assistant", "", (WAIT, LOOK)),
            Message("tool", "done"),
            Message("assistant", "Cold."),
        ),
        TOOLS,
    ),
    "tools": Conversation(
        (Message("system", "S"), Message("user", "a"), Message("assistant", "b")), TOOLS
    ),
    "text": Conversation((Message("assistant", "Once upon a time."),)),
    "told": Conversation((Message("system", "S"), Message("assistant", "b"))),
    "asked": Conversation((Message("user", "a"),)),
}


def published(name, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in GOLDEN[name]["files"].items():
        (folder / file).write_text(content, encoding="utf-8")
    return folder


def sentencepiece(folder, **options):
    """The folder of a .model alone."""
    library = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    settings = {
        "sentence_iterator": iter(line for text in TEXTS for line in text.splitlines()),
        "model_writer": model,
        "vocab_size": 400,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    library.SentencePieceTrainer.train(**{**settings, **options})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


SENTENCEPIECE = {
    "bpe": {},
    "unigram": {"model_type": "unigram", "vocab_size": 360},
    "normalised": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "no prefix": {"add_dummy_prefix": False},
}


def starts(tokenizer):
    return [[*tokenizer.document_start, *ids] for ids in tokenizer.encode_batch(TEXTS)]


# --- in


@pytest.mark.parametrize("name", GOLDEN)
def test_a_published_tokenizer_gives_the_ids_of_transformers(tmp_path, name):
    assert not has_tokenizer(tmp_path)
    tokenizer = read_tokenizer(published(name, tmp_path))
    assert has_tokenizer(tmp_path)
    assert tokenizer.encode_batch(TEXTS) == GOLDEN[name]["plain_ids"]
    assert starts(tokenizer) == GOLDEN[name]["ids"]
    assert tokenizer.vocab_size == GOLDEN[name]["size"]


@pytest.mark.parametrize("name", WITH_TEMPLATE)
def test_a_published_template_gives_the_ids_of_transformers(tmp_path, name):
    folder = published(name, tmp_path)
    tokenizer, template = read_tokenizer(folder), read_template(folder)
    for golden in GOLDEN[name]["conversations"]:
        messages = tuple(Message(m["role"], m["content"]) for m in golden["messages"])
        if golden["is_prompt"]:
            ids = template.render_prompt(messages, (), tokenizer)
        else:
            ids = template.render(Conversation(messages), tokenizer).tokens
        assert ids == golden["ids"]


def test_a_folder_without_a_template_has_none(tmp_path):
    assert read_template(published("gpt2", tmp_path)) is None
    assert read_template(tmp_path / "nowhere") is None


def test_further_templates_stand_in_a_folder_beside_the_first(tmp_path):
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    assert read_template(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    template = read_template(tmp_path)
    assert dict(template.sources) == {"default": "{{ messages }}", "tool_use": "{{ tools }}"}


# --- out


@pytest.mark.parametrize("name", GOLDEN)
def test_what_was_imported_is_exported(tmp_path, name):
    folder = published(name, tmp_path / "hf")
    read_tokenizer(folder).save(tmp_path / "run")
    tokenizer, template = load_tokenizer(tmp_path / "run"), read_template(folder)
    write_tokenizer(tokenizer, template, tmp_path / "out")
    again = read_tokenizer(tmp_path / "out")
    assert starts(again) == GOLDEN[name]["ids"]
    assert (again.special_ids, again.vocab_size) == (tokenizer.special_ids, tokenizer.vocab_size)
    if template is None:
        assert not (tmp_path / "out" / "chat_template.jinja").exists()
    else:
        assert read_template(tmp_path / "out").sources == template.sources
    before = json.loads(GOLDEN[name]["files"]["tokenizer_config.json"])
    after = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    for key in before.keys() - {"chat_template"}:
        assert after[key] == before[key]
    assert ("chat_template" in after) == (template is not None)
    assert after["tokenizer_class"] == before.get("tokenizer_class", "PreTrainedTokenizerFast")


def test_what_was_published_stands_over_what_we_would_write(tmp_path):
    folder = published("llama3", tmp_path / "hf")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"clean_up_tokenization_spaces": True, "eos_token": {"content": "<|eot_id|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    write_tokenizer(read_tokenizer(folder), None, tmp_path / "out", max_length=77)
    after = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert after.pop("added_tokens_decoder") and config.pop("chat_template")
    assert after == config | {"model_max_length": 77}


@pytest.mark.parametrize("make", [ByteTokenizer, lambda: train_bpe(TEXTS, 420)])
def test_our_own_tokenizers_are_exported_as_a_tokenizer_json(tmp_path, make):
    tokenizer = make()
    write_tokenizer(tokenizer, None, tmp_path, max_length=77)
    again = read_tokenizer(tmp_path)
    assert isinstance(again, JsonTokenizer) and starts(again) == starts(tokenizer)
    assert again.special_ids == tokenizer.special_ids
    assert again.document_start == (tokenizer.bos_id,)
    assert (again.token_bytes() == tokenizer.token_bytes()).all()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (config["eos_token"], config["model_max_length"]) == ("<|eos|>", 77)
    assert config["added_tokens_decoder"][str(tokenizer.eos_id)]["content"] == "<|eos|>"
    assert json.loads((tmp_path / "special_tokens_map.json").read_text())["pad_token"] == "<|pad|>"


@pytest.mark.parametrize("options", SENTENCEPIECE)
def test_a_sentencepiece_model_is_exported_as_a_tokenizer_json_too(tmp_path, options):
    folder = sentencepiece(tmp_path / "hf", **SENTENCEPIECE[options])
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "x": 1}')
    tokenizer = read_tokenizer(folder)
    write_tokenizer(tokenizer, TEMPLATES["llama2"], tmp_path / "out")
    again = read_tokenizer(tmp_path / "out")
    assert isinstance(again, JsonTokenizer) and starts(again) == starts(tokenizer)
    assert again.special_ids == tokenizer.special_ids
    assert again.document_start == tokenizer.document_start == (1,)
    ids = tokenizer.encode(TEXTS[0])
    assert again.decode(ids) == tokenizer.decode(ids)
    model = (tmp_path / "out" / "tokenizer.model").read_bytes()
    assert model == (folder / "tokenizer.model").read_bytes()
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (config["tokenizer_class"], config["x"]) == ("PreTrainedTokenizerFast", 1)


def test_a_sentencepiece_model_of_another_kind_is_refused(tmp_path):
    folder = sentencepiece(tmp_path / "hf", treat_whitespace_as_suffix=True)
    with pytest.raises(UserError, match="cannot be written as a tokenizer"):
        write_tokenizer(read_tokenizer(folder), None, tmp_path / "out")


def test_several_templates_are_exported_for_new_and_old_readers(tmp_path):
    template = JinjaTemplate("two", (("default", "{{ messages }}"), ("tool_use", "{{ tools }}")))
    write_tokenizer(ByteTokenizer(), template, tmp_path)
    assert dict(read_template(tmp_path).sources) == dict(template.sources)
    (tmp_path / "chat_template.jinja").unlink()
    assert dict(read_template(tmp_path).sources) == dict(template.sources)


# --- named templates as Jinja


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    names = ("gpt2", "llama3", "llama2", "mistral", "phi3")
    folder = tmp_path_factory.mktemp("published")
    found = {name: read_tokenizer(published(name, folder / name)) for name in names}
    return {**found, "bytes": ByteTokenizer(), "trained": train_bpe(TEXTS, 420)}


@pytest.mark.parametrize(
    "kind", ["bytes", "trained", "gpt2", "llama3", "llama2", "mistral", "phi3"]
)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_named_template_gives_the_same_tokens_as_jinja(tmp_path, tokenizers, name, kind):
    template, tokenizer = TEMPLATES[name], tokenizers[kind]
    write_tokenizer(tokenizer, template, tmp_path)
    jinja = read_template(tmp_path)
    assert isinstance(jinja, JinjaTemplate)
    for conversation in CONVERSATIONS.values():
        assert jinja.render(conversation, tokenizer) == template.render(conversation, tokenizer)
        for k in range(len(conversation.messages) + 1):
            prompt = (conversation.messages[:k], conversation.tools, tokenizer)
            assert jinja.render_prompt(*prompt) == template.render_prompt(*prompt)
    assert set(jinja.stop_ids(tokenizer)) == set(template.stop_ids(tokenizer))


# --- generation settings


def test_the_ids_of_generation_join_what_was_published(tmp_path):
    tokenizer = read_tokenizer(published("llama3", tmp_path))
    config = json.loads((tmp_path / "generation_config.json").read_text())
    assert tokenizer.eos_ids == (2, 1, 5)
    settings = {"bos_token_id": 0, "pad_token_id": 2, "temperature": 0.6, "top_p": 0.9}
    assert generation_config(tokenizer, config) == {**settings, "eos_token_id": [1, 5, 2]}
    template = read_template(tmp_path)
    assert template.stop_ids(tokenizer) == (2, 1, 5)
    assert generation_config(tokenizer, {}, template)["eos_token_id"] == [2, 1, 5]


def test_a_generation_ends_where_the_templates_turns_do(tmp_path):
    gpt2 = read_tokenizer(published("gpt2", tmp_path))
    alone = {"bos_token_id": 0, "pad_token_id": 0, "eos_token_id": 0}
    assert generation_config(gpt2, {}) == alone
    assert generation_config(gpt2, {"eos_token_id": 0}, TEMPLATES["chatml"]) == alone
    ours = ByteTokenizer()
    ends = [ours.special_ids["end_of_turn"], ours.eos_id]
    assert generation_config(ours, {}, TEMPLATES["chatml"])["eos_token_id"] == ends

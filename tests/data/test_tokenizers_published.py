"""Tokenizers that others published are taken as they are."""

import io
import json
import pickle

import pytest
import tokenizers as library
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from llm_jax.data.examples import Conversation, Message
from llm_jax.data.templates import TEMPLATES
from llm_jax.data.tokenizer_base import SPECIAL_TOKENS, Tokenizer
from llm_jax.data.tokenizers import (
    TokenizerConfig,
    load_tokenizer,
    make_tokenizer,
    read_tokenizer,
    train_bpe,
)
from llm_jax.errors import UserError
from llm_jax.generation.generate import document_prompt, document_stop_ids

FILES = ("tokenizer_config", "special_tokens_map", "generation_config", "added_tokens")


def byte_level(*special):
    """A byte-level BPE without merges, its special tokens first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [token if isinstance(token, str) else token.content for token in special]
    bpe = library.Tokenizer(models.BPE({t: i for i, t in enumerate([*names, *alphabet])}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(list(special))
    return bpe


def spaced(**parts):
    """A BPE with ▁ for spaces and eos 0, bos 1."""
    pieces = ["</s>", "<s>", "▁", "a", "b", "▁a", "▁b"]
    merges = [("▁", "a"), ("▁", "b")]
    bpe = library.Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges))
    for name, part in parts.items():
        setattr(bpe, name, part)
    bpe.decoder = decoders.Metaspace()
    bpe.add_special_tokens(["</s>", "<s>"])
    return bpe


def published(folder, tokenizer, **configs):
    assert set(configs) <= set(FILES)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def pieces(tokenizer, ids):
    return [tokenizer._tokenizer.id_to_token(id_) for id_ in ids]


# --- special tokens


def test_nothing_is_added(tmp_path):
    tokenizer = read_tokenizer(published(tmp_path, byte_level("<|endoftext|>")))
    assert tokenizer.special_ids == {"eos": 0} and tokenizer.vocab_size == 257
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_ids) == (0, 0, (0,))
    config = TokenizerConfig(path=str(tmp_path))
    assert make_tokenizer(config, lambda: []).fingerprint == tokenizer.fingerprint


def test_the_files_beside_it_name_its_special_tokens(tmp_path):
    special = ("[END]", "[START]", "<|im_end|>", "<|user|>", "</s>")
    config = {"eos_token": "[END]", "bos_token": {"content": "[START]"}, "pad_token": "[END]"}
    folder = published(tmp_path, byte_level(*special), tokenizer_config=config)
    tokenizer = read_tokenizer(folder)
    expected = {"bos": 1, "eos": 0, "pad": 0, "user": 3, "end_of_turn": 2}
    assert tokenizer.special_ids == expected
    assert tokenizer.special_tokens["bos"] == "[START]"
    (folder / "tokenizer_config.json").rename(folder / "special_tokens_map.json")
    assert read_tokenizer(folder).special_ids == expected


def test_one_token_may_serve_several_purposes(tmp_path):
    config = {"eos_token": "<|im_end|>"}
    folder = published(tmp_path, byte_level("<|im_end|>"), tokenizer_config=config)
    assert read_tokenizer(folder).special_ids == {"eos": 0, "end_of_turn": 0}


def test_a_token_that_a_file_names_is_special(tmp_path):
    config = {"eos_token": "a"}
    folder = published(tmp_path, byte_level(), tokenizer_config=config)
    tokenizer = read_tokenizer(folder)
    assert tokenizer.decode([tokenizer.eos_id]) == ""
    assert tokenizer.special_id("a") == tokenizer.eos_id
    (added,) = json.loads(tokenizer.files()["tokenizer.json"])["added_tokens"]
    assert added["content"] == "a" and added["special"]


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    folder = published(tmp_path, byte_level("<|bos|>"))
    with pytest.raises(UserError, match=r"no token that ends a text: name one .* eos_token"):
        read_tokenizer(folder)
    with pytest.raises(ValueError, match="needs an eos token"):

        class Endless(type(train_bpe(["a"], 264))):
            def __init__(self):
                Tokenizer.__init__(self, 1, {"bos": 0}, SPECIAL_TOKENS, document_start=())

        Endless()


def test_the_generation_settings_name_further_ends(tmp_path):
    generation = {"eos_token_id": [2, 1, 9999]}
    special = ("<a>", "<b>", "<c>")
    folder = published(tmp_path, byte_level(*special), generation_config=generation)
    assert read_tokenizer(folder).eos_ids == (2, 1)  # where no file says, the first is eos
    config = {"eos_token": "<a>"}
    published(tmp_path, byte_level(*special), tokenizer_config=config)
    tokenizer = read_tokenizer(folder)
    assert tokenizer.eos_ids == document_stop_ids(tokenizer) == (0, 2, 1)
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert read_tokenizer(folder).eos_ids == (0, 1)


def test_damaged_files_beside_it_are_one_line(tmp_path):
    folder = published(tmp_path, byte_level("</s>"))
    for content, message in {"{": "is not JSON", "[]": "holds no JSON object"}.items():
        (folder / "tokenizer_config.json").write_text(content)
        with pytest.raises(UserError, match=f"tokenizer_config.json {message}") as caught:
            read_tokenizer(folder)
        assert "\n" not in str(caught.value)


def test_all_of_it_is_saved_with_a_run(tmp_path):
    folder = published(
        tmp_path / "hf",
        byte_level("<a>", "<b>"),
        tokenizer_config={"eos_token": "<a>", "extra": 1},
        generation_config={"eos_token_id": [0, 1], "top_k": 5},
    )
    tokenizer = read_tokenizer(folder)
    tokenizer.save(tmp_path / "run" / "tokenizer")
    for again in (read_tokenizer(tmp_path / "run"), pickle.loads(pickle.dumps(tokenizer))):
        assert again.fingerprint == tokenizer.fingerprint
        assert again.special_ids == tokenizer.special_ids and again.eos_ids == (0, 1)
        assert again.published == tokenizer.published
        assert list(again.published) == ["tokenizer_config.json"]
        assert json.loads(again.published["tokenizer_config.json"])["extra"] == 1


# --- the start of a document


@pytest.mark.parametrize(
    ("processor", "start"),
    [
        (None, ()),
        (processors.ByteLevel(trim_offsets=False), ()),
        (processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]), (1,)),
        (processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)]), ()),
        (
            processors.TemplateProcessing(
                single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 0)]
            ),
            (1,),
        ),
    ],
)
def test_a_document_begins_as_its_post_processor_says(tmp_path, processor, start):
    bpe = byte_level("</s>", "<s>")
    if processor is not None:
        bpe.post_processor = processor
    # Where there is a tokenizer.json, transformers does not look at add_bos_token.
    folder = published(tmp_path, bpe, tokenizer_config={"add_bos_token": True})
    tokenizer = read_tokenizer(folder)
    assert tokenizer.document_start == start
    assert document_prompt(tokenizer, "a") == [*start, *tokenizer.encode("a")]
    assert document_prompt(tokenizer, "") == [1]


def test_a_vocabulary_with_merges_is_a_byte_level_bpe(tmp_path):
    bpe = byte_level("<|endoftext|>")
    bpe.model.save(str(tmp_path))
    text = "Größe <|endoftext|>\n x"
    tokenizer = read_tokenizer(tmp_path)
    plain = byte_level("<|endoftext|>")
    plain.encode_special_tokens = True
    assert tokenizer.encode(text) == plain.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.special_ids, tokenizer.document_start) == ({"eos": 0}, ())
    config = {"add_bos_token": True, "bos_token": "<|endoftext|>", "add_prefix_space": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.document_start == (0,) and tokenizer.encode("x") == plain.encode(" x").ids


def test_nothing_is_added_to_a_vocabulary(tmp_path):
    byte_level("</s>").model.save(str(tmp_path))
    with pytest.raises(UserError, match="no token that ends a text"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = read_tokenizer(tmp_path)
    assert (tokenizer.special_ids, tokenizer.vocab_size) == ({"eos": 0}, 257)


def test_the_added_tokens_of_a_vocabulary_follow_on_it(tmp_path):
    byte_level("<|endoftext|>").model.save(str(tmp_path))
    config = {"added_tokens_decoder": {"257": {"content": "<|im_end|>"}}, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert read_tokenizer(tmp_path).special_ids == {"eos": 257, "end_of_turn": 257}
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "added_tokens.json").write_text('{"<|endoftext|>": 0, "<|im_end|>": 257}')
    assert read_tokenizer(tmp_path).special_ids == {"eos": 0, "end_of_turn": 257}
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 300}')
    with pytest.raises(UserError, match="do not follow on"):
        read_tokenizer(tmp_path)


def test_the_vocabulary_of_another_class_is_refused(tmp_path):
    byte_level("<|endoftext|>").model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2TokenizerFast"}')
    with pytest.raises(UserError, match="vocabulary of a Qwen2Tokenizer"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "merges.txt").write_text("x\n")
    with pytest.raises(UserError, match="holds no vocabulary of byte-level BPE"):
        read_tokenizer(tmp_path)


# --- where a text stands

PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
FIRST = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
ALWAYS = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
NEVER = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)


@pytest.mark.parametrize(
    ("parts", "start", "after_special", "after_text"),
    [
        ({"normalizer": PREPEND}, ["▁a", "▁b"], ["▁a", "▁b"], ["a", "▁b"]),
        ({"pre_tokenizer": FIRST}, ["▁a", "▁b"], ["a", "▁b"], ["a", "▁b"]),
        ({"pre_tokenizer": ALWAYS}, ["▁a", "▁b"], ["▁a", "▁b"], ["a", "▁b"]),
        ({"pre_tokenizer": NEVER}, ["a", "▁b"], ["a", "▁b"], ["a", "▁b"]),
        (
            {"normalizer": normalizers.Prepend("▁"), "pre_tokenizer": NEVER},
            ["▁a", "▁b"],
            ["▁a", "▁b"],
            ["a", "▁b"],
        ),
        (
            {"pre_tokenizer": pre_tokenizers.Sequence([FIRST])},
            ["▁a", "▁b"],
            ["a", "▁b"],
            ["a", "▁b"],
        ),
    ],
)
def test_the_first_word_has_a_space_before_it_where_a_text_starts(
    tmp_path, parts, start, after_special, after_text
):
    tokenizer = read_tokenizer(published(tmp_path, spaced(**parts)))
    assert pieces(tokenizer, tokenizer.encode("a b")) == start
    assert pieces(tokenizer, tokenizer.encode("a b", "after_special")) == after_special
    assert pieces(tokenizer, tokenizer.encode("a b", "after_text")) == after_text
    assert pieces(tokenizer, tokenizer.encode(" a", "after_text")) == ["▁a"]
    forged = tokenizer.encode("</s>", "after_text")
    assert tokenizer.eos_id not in forged


def test_no_space_comes_into_a_string_that_is_no_special_token(tmp_path):
    unigram = library.Tokenizer(
        models.Unigram([("<unk>", 0.0), ("</s>", 0.0)] + [(c, -5.0) for c in "▁ab</s>"], unk_id=0)
    )
    unigram.pre_tokenizer = ALWAYS
    unigram.add_special_tokens(["</s>"])
    tokenizer = read_tokenizer(published(tmp_path, unigram))
    assert pieces(tokenizer, tokenizer.encode("a</s>b")) == ["▁", "a", *"</s>", "b"]


def test_an_added_prefix_space_is_that_of_a_start(tmp_path):
    bpe = byte_level("</s>")
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer = read_tokenizer(published(tmp_path, bpe))
    space = tokenizer.encode("a")[:-1]
    assert len(space) == 1 and tokenizer.encode("a", "after_special")[:-1] == space
    assert tokenizer.encode("a", "after_text") == tokenizer.encode("a")[1:]


def test_a_conversation_is_tokenised_as_the_text_that_it_is(tmp_path):
    tokenizer = read_tokenizer(published(tmp_path, spaced(pre_tokenizer=FIRST)))
    chat = Conversation((Message("user", "a"), Message("assistant", "b")))
    tokens = TEMPLATES["llama2"].render(chat, tokenizer).tokens
    # <s>[INST] a [/INST] b </s>, of which the vocabulary has only these.
    assert pieces(tokenizer, tokens) == ["<s>", "▁a", "▁", "▁b", "▁", "</s>"]


# --- special tokens that take white space away


def test_white_space_beside_a_special_token_goes_where_the_token_says(tmp_path):
    special = (AddedToken("</s>", lstrip=True), AddedToken("<|user|>", rstrip=True), "<s>")
    tokenizer = read_tokenizer(published(tmp_path, byte_level(*special)))
    assert tokenizer.stripping == ({0}, {1})
    chat = Conversation((Message("user", " a "), Message("assistant", " b ")))
    rendered = TEMPLATES["zephyr"].render(chat, tokenizer)
    shown = tokenizer.decode(rendered.tokens, skip_special=False)
    assert shown == "<s><|user|>a</s>\n<|assistant|>\n b</s>\n"
    blank = Conversation((Message("user", " "), Message("assistant", " b")))
    shown = tokenizer.decode(TEMPLATES["zephyr"].render(blank, tokenizer).tokens, False)
    assert shown == "<s><|user|></s>\n<|assistant|>\n b</s>\n"


# --- named templates without their tokens


def test_chatml_is_written_as_text_where_roles_have_no_tokens(tmp_path):
    tokenizer = read_tokenizer(published(tmp_path, byte_level("<|endoftext|>")))
    chat = Conversation((Message("user", "a"), Message("assistant", "b")))
    tokens = TEMPLATES["chatml"].render(chat, tokenizer).tokens
    assert tokenizer.decode(tokens, skip_special=False) == (
        "<|im_start|>user\na<|endoftext|>\n<|im_start|>assistant\nb<|endoftext|>\n"
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_generations_stop_at_ids_that_exist(tmp_path, name):
    generation = {"eos_token_id": [0, 1]}
    special = ("<|endoftext|>", "<|other|>")
    folder = published(tmp_path, byte_level(*special), generation_config=generation)
    tokenizer = read_tokenizer(folder)
    assert TEMPLATES[name].stop_ids(tokenizer) == document_stop_ids(tokenizer) == (0, 1)
    assert TEMPLATES[name].render_prompt((), (), tokenizer)


# --- SentencePiece


def sentencepiece_model(folder, **options):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        **{
            "sentence_iterator": iter(["the quick brown fox", "a b c the the dog"] * 5),
            "model_writer": model,
            "vocab_size": 290,
            "model_type": "bpe",
            "byte_fallback": True,
            "hard_vocab_limit": False,
            "minloglevel": 2,
            **options,
        }
    )
    folder.mkdir(exist_ok=True)
    (folder / "some.model").write_bytes(model.getvalue())
    return folder


def test_the_special_tokens_of_sentencepiece_are_its_control_pieces(tmp_path):
    controls = ["<|user|>", "<other>"]
    tokenizer = read_tokenizer(sentencepiece_model(tmp_path, control_symbols=controls, pad_id=3))
    assert tokenizer.special_ids == {"bos": 1, "eos": 2, "pad": 3, "user": 4}
    assert tokenizer.special_tokens["bos"] == "<s>"
    assert tokenizer.special_id("<other>") == 5 and tokenizer.decode([5]) == ""
    assert tokenizer.vocab_size == tokenizer._processor.vocab_size()
    assert not tokenizer.token_bytes()[:6].any()


def test_the_end_of_sentencepiece_may_have_any_string(tmp_path):
    tokenizer = read_tokenizer(sentencepiece_model(tmp_path, eos_piece="<fin>"))
    assert tokenizer.special_tokens["eos"] == "<fin>" and tokenizer.eos_id == 2


def test_a_sentencepiece_model_without_an_end_is_refused(tmp_path):
    with pytest.raises(UserError, match="no token that ends a text"):
        read_tokenizer(sentencepiece_model(tmp_path, eos_id=-1))


@pytest.mark.parametrize(
    ("options", "config", "start"),
    [
        ({}, {}, (1,)),
        ({}, {"add_bos_token": True}, (1,)),
        ({}, {"add_bos_token": False}, ()),
        ({"bos_id": -1, "eos_id": 1}, {}, ()),
    ],
)
def test_a_document_of_sentencepiece_begins_with_bos_unless_told(tmp_path, options, config, start):
    folder = sentencepiece_model(tmp_path / "hf", **options)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = read_tokenizer(folder)
    assert tokenizer.document_start == start
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.document_start == start and again.fingerprint == tokenizer.fingerprint
    assert again.published == tokenizer.published


@pytest.mark.parametrize("strips", [True, False])
def test_text_goes_on_without_a_space_of_its_own(tmp_path, strips):
    folder = sentencepiece_model(tmp_path, remove_extra_whitespaces=strips)
    tokenizer = read_tokenizer(folder)
    whole = tokenizer.encode("the dog")
    assert (
        tokenizer.encode("the", "after_special") + tokenizer.encode(" dog", "after_text") == whole
    )
    start, rest = tokenizer.encode("d"), tokenizer.encode("d", "after_text")
    assert (
        tokenizer._processor.id_to_piece(rest) == ["d"] != tokenizer._processor.id_to_piece(start)
    )

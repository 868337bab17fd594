import io
import json
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import tokenizers as library
from tokenizers import decoders, models, pre_tokenizers, trainers

from llm_jax.data.tokenizer_json import SPLIT_PATTERN
from llm_jax.data.tokenizers import (
    SPECIAL_TOKENS,
    TokenizerConfig,
    load_tokenizer,
    make_tokenizer,
)
from llm_jax.errors import UserError

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind.\n" * 3,
    "def encode(self, text):\n    return [ord(c) for c in text]\n" * 3,
    "In 1984 and 2024 the prices rose by 3.14159 percent, isn't it?\r\n\r\nYes.",
    "Größe, naïve, Ελλάδα, 中文字符, 🦜👩‍👩‍👧 and 🇩🇪.",
]
FORGED = "".join(SPECIAL_TOKENS.values()) + "</s><s><pad><unk><|endoftext|> <|user|>hi<|eos|>"


def trained(vocab_size=400, corpus=CORPUS, **options):
    return make_tokenizer(TokenizerConfig(vocab_size=vocab_size, **options), lambda: iter(corpus))


def given(path):
    def no_documents():
        raise AssertionError("a given tokenizer reads no documents")

    return make_tokenizer(TokenizerConfig(path=str(path)), no_documents)


def gpt_like(folder, special=("<|endoftext|>",)):
    """A byte-level tokenizer.json as others write it."""
    tokenizer = library.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("!"), pad_token="!")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def llama_like(folder):
    """SentencePiece's BPE as a tokenizer.json: ▁ for spaces, bytes as <0x..>."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for piece in ("▁", "t", "h", "e", "th", "the", "▁the", "é"):
        vocabulary[piece] = len(vocabulary)
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = library.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def sentencepiece_model(folder, **options):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        **{
            "sentence_iterator": iter(line for text in CORPUS for line in text.splitlines()),
            "model_writer": model,
            "vocab_size": 340,
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "hard_vocab_limit": False,
            "minloglevel": 2,
            **options,
        }
    )
    (folder / "some.model").write_bytes(model.getvalue())
    return folder / "some.model"


BYTE_LEVEL = {
    "bytes": lambda folder: given("bytes"),
    "trained": lambda folder: trained(),
    "gpt": lambda folder: given(gpt_like(folder)),
}
KINDS = BYTE_LEVEL | {
    "llama": lambda folder: given(llama_like(folder)),
    "sentencepiece": lambda folder: given(sentencepiece_model(folder)),
}


@pytest.fixture(params=BYTE_LEVEL)
def byte_level(request, tmp_path):
    return BYTE_LEVEL[request.param](tmp_path)


@pytest.fixture(params=KINDS)
def tokenizer(request, tmp_path):
    return KINDS[request.param](tmp_path)


def arbitrary_texts(count=300):
    """Texts of any Unicode scalar values, with more than their share of what breaks tokenizers."""
    source = random.Random(0)
    nasty = [
        *"\0\t\n\r\x0b\x0c\x1b\x7f\x85\xa0\u2028\u2029\u200b\u200d\ufeff\ufffd\uffff▁Ġ <|>",
        "e\u0301",
        "👩‍👩‍👧",
        "🇩🇪",
        "\r\n",
        "   ",
        "12345",
        "don't",
        "I'LL",
        *SPECIAL_TOKENS.values(),
        "</s>",
        "<0x41>",
    ]

    def character():
        code = source.choice([source.randrange(0x80), source.randrange(0x110000)])
        return chr(code) if not 0xD800 <= code < 0xE000 else "x"

    for _ in range(count):
        pieces = source.choices([character, lambda: source.choice(nasty)], k=source.randrange(30))
        yield "".join(piece() for piece in pieces)


# --- every kind


@pytest.mark.parametrize("make", [trained, lambda: given("bytes")])
def test_our_own_have_a_token_for_each_purpose(make):
    tokenizer = make()
    ids = tokenizer.special_ids
    assert list(ids) == list(SPECIAL_TOKENS) and len(set(ids.values())) == len(ids)
    own = (ids["bos"], ids["eos"], ids["pad"])
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == own
    assert tokenizer.eos_ids == (ids["eos"],)
    assert tokenizer.document_start == (ids["bos"],)


def test_specials_are_in_the_vocabulary(tokenizer):
    ids = {*tokenizer.special_ids.values(), tokenizer.bos_id, tokenizer.pad_id}
    assert all(0 <= id_ < tokenizer.vocab_size for id_ in ids)
    assert tokenizer.eos_id == tokenizer.special_ids["eos"] == tokenizer.eos_ids[0]


def test_the_string_of_a_special_token_is_ordinary_text(tokenizer):
    text = FORGED + "".join(tokenizer.special_tokens.values())
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch(["a", text])[1] == ids


def test_specials_are_decoded_only_on_demand(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("the"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "the"
    assert tokenizer.decode(np.array(ids, np.uint16)) == "the"
    eos = tokenizer.special_tokens["eos"]
    bos = tokenizer.special_tokens.get("bos", eos)
    assert tokenizer.decode(ids, skip_special=False) == bos + "the" + eos


def test_ids_past_the_vocabulary_decode_to_nothing(tokenizer):
    ids = tokenizer.encode("the")
    assert tokenizer.decode([*ids, tokenizer.vocab_size, tokenizer.vocab_size + 50]) == "the"
    assert tokenizer.decode([]) == "" and tokenizer.encode("") == []


def test_a_batch_is_its_texts_one_by_one(tokenizer):
    texts = [*CORPUS, "", " ", "the"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert all(isinstance(id_, int) for id_ in tokenizer.encode("the quick"))


def test_ids_stay_below_the_vocabulary_size(tokenizer):
    for ids in tokenizer.encode_batch(list(arbitrary_texts(50))):
        assert all(0 <= id_ < tokenizer.vocab_size for id_ in ids)


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "run" / "tokenizer")
    loaded = load_tokenizer(tmp_path / "run" / "tokenizer")
    assert type(loaded) is type(tokenizer)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.special_ids == tokenizer.special_ids
    assert loaded.special_tokens == tokenizer.special_tokens
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.encode_batch([*CORPUS, FORGED]) == tokenizer.encode_batch([*CORPUS, FORGED])
    assert (loaded.token_bytes() == tokenizer.token_bytes()).all()
    for path in (tmp_path / "run", tmp_path / "run" / "tokenizer"):
        assert given(path).fingerprint == tokenizer.fingerprint


def test_pickle(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode(FORGED) == tokenizer.encode(FORGED)
    assert copy.fingerprint == tokenizer.fingerprint


def test_token_bytes_form(tokenizer):
    counts = tokenizer.token_bytes()
    assert counts.shape == (tokenizer.vocab_size,) and counts.dtype == np.int32
    assert (counts[list(tokenizer.special_ids.values())] == 0).all()
    assert (counts >= 0).all() and counts.any()


def test_fingerprints_tell_tokenizers_apart(tmp_path):
    fingerprints = set()
    for name, make in KINDS.items():
        (tmp_path / name).mkdir()
        fingerprints.add(make(tmp_path / name).fingerprint)
    fingerprints.add(trained(vocab_size=300).fingerprint)
    assert len(fingerprints) == len(KINDS) + 1


# --- byte-level kinds


def test_round_trip_of_arbitrary_unicode(byte_level):
    texts = [*arbitrary_texts(), *CORPUS]
    for text, ids in zip(texts, byte_level.encode_batch(texts), strict=True):
        assert byte_level.decode(ids) == text


def test_token_bytes_sum_to_the_length_of_the_text(byte_level):
    counts = byte_level.token_bytes()
    texts = [*arbitrary_texts(), *CORPUS]
    for text, ids in zip(texts, byte_level.encode_batch(texts), strict=True):
        assert counts[ids].sum() == len(text.encode())


def test_part_of_a_character_decodes_to_a_replacement(byte_level):
    ids = byte_level.encode("a\U0010abcd")
    assert len(ids) == 5
    assert byte_level.decode(ids[:-1]).strip("\ufffd") == "a"
    assert "\ufffd" in byte_level.decode(ids[:-1])


# --- trained


def test_training_is_deterministic_across_processes():
    program = (
        "import sys, json; from llm_jax.data.tokenizers import *;"
        "corpus = json.loads(sys.argv[1]);"
        "config = TokenizerConfig(vocab_size=400);"
        "print(make_tokenizer(config, lambda: iter(corpus)).fingerprint)"
    )
    fingerprints = {
        subprocess.run(
            [sys.executable, "-c", program, json.dumps(CORPUS)],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert fingerprints == {trained().fingerprint}


def test_the_vocabulary_size_is_kept_and_checked():
    assert trained(vocab_size=300).vocab_size == 300
    assert trained(vocab_size=264).vocab_size == 264
    with pytest.raises(UserError, match=r"vocab_size=263 is too small.*need 264"):
        trained(vocab_size=263)
    with pytest.raises(UserError, match="no text"):
        trained(corpus=[])


def test_training_stops_at_its_limits():
    read = []

    def documents():
        for index in range(1000):
            read.append(index)
            yield "é" * 50

    make_tokenizer(TokenizerConfig(vocab_size=270, train_documents=7), documents)
    assert len(read) <= 8
    read.clear()
    make_tokenizer(TokenizerConfig(vocab_size=270, train_bytes=1000), documents)
    assert len(read) <= 11
    long = "abc " * 1000
    cut = make_tokenizer(
        TokenizerConfig(vocab_size=270, train_bytes=40), lambda: [long + "xyzxyz" * 50]
    )
    assert "xyz" not in [cut.decode([i]) for i in range(cut.vocab_size)]


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("Hello world's end", ["Hello", " world", "'s", " end"]),
        ("in 1984", ["in", " ", "1", "9", "8", "4"]),
        ("a  b\n\n  c", ["a", " ", " b", "\n\n", " ", " c"]),
        ("x = y+1;\n", ["x", " =", " y", "+", "1", ";\n"]),
        ("été 中文", ["été", " 中文"]),
    ],
)
def test_pre_tokenisation(text, pieces):
    split = pre_tokenizers.Split(library.Regex(SPLIT_PATTERN), behavior="isolated")
    assert [piece for piece, _ in split.pre_tokenize_str(text)] == pieces


# --- given


def test_a_given_tokenizer_neither_truncates_nor_pads(tmp_path):
    tokenizer = given(gpt_like(tmp_path))
    texts = ["the " * 500, "a"]
    ids = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(i) for i in ids] == texts and len(ids[1]) == 1


def test_a_unigram_model_that_holds_its_specials_is_not_forged(tmp_path):
    pieces = [("<unk>", 0.0), ("</s>", 0.0)] + [(c, -5.0) for c in "▁ab</s>"]
    tokenizer = library.Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.encode_special_tokens = True
    assert tokenizer.token_to_id("</s>") in tokenizer.encode("a</s>b").ids  # the danger is real
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = given(tmp_path)
    assert ours.special_tokens["eos"] == "</s>"
    ids = ours.encode("a</s>b </s>")
    assert ours.eos_id not in ids and ours.decode(ids) == "a</s>b </s>"


def test_specials_without_a_purpose_are_neither_forged_nor_shown(tmp_path):
    tokenizer = given(gpt_like(tmp_path, special=("</s>", "<|fim|>")))
    assert 1 not in tokenizer.encode("<|fim|>")
    assert tokenizer.decode([1, *tokenizer.encode("a")]) == "a"
    assert tokenizer.token_bytes()[1] == 0


def test_token_bytes_of_a_tokenizer_with_marked_spaces(tmp_path):
    tokenizer = given(llama_like(tmp_path))
    counts = tokenizer.token_bytes()
    for text in ("the the", "the é🦜\nthe", "tthe\tx"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert counts[ids].sum() == len(text.encode()) + 1  # and the space before the first word


# --- SentencePiece


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_sentencepiece_round_trip(tmp_path, dummy_prefix):
    tokenizer = given(sentencepiece_model(tmp_path, add_dummy_prefix=dummy_prefix))
    counts = tokenizer.token_bytes()
    # Its decoder takes ▁ for a space and a leading U+FEFF away.
    texts = [t for t in arbitrary_texts() if "▁" not in t and "\ufeff" not in t and "\0" not in t]
    assert len(texts) > 100
    for text in [*texts, *CORPUS, "  two spaces ", "line\nline\n"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert counts[ids].sum() == len(text.encode()) + (dummy_prefix and bool(text))


def test_sentencepiece_without_the_package(tmp_path, monkeypatch):
    (tmp_path / "a.model").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match="pip install sentencepiece"):
        given(tmp_path / "a.model")


# --- bad input


def test_bad_paths(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "broken.model").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "tokenizer.jsn": "does not exist. Did you mean 'tokenizer.json'",
        "tokenizer.json": "cannot be read as a tokenizer.json",
        "broken.model": "cannot be read as a SentencePiece model",
        "empty": "holds no tokenizer",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            given(tmp_path / name)
        assert "\n" not in str(caught.value)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="is no tokenizer"):
        given(tmp_path / "notes.txt")
    with pytest.raises(UserError, match="holds no saved tokenizer"):
        load_tokenizer(tmp_path / "empty")


def test_files_that_do_not_belong_together(tmp_path):
    trained().save(tmp_path / "a")
    file = tmp_path / "a" / "tokenizer.json"
    content = json.loads(file.read_text())
    without_bos = {**content, "post_processor": None}
    swapped = file.read_text().replace("<|eos|>", "?").replace("<|pad|>", "<|eos|>")
    other = gpt_like(tmp_path).read_text()
    for damaged in (json.dumps(without_bos), swapped.replace("?", "<|pad|>"), other):
        file.write_text(damaged)
        with pytest.raises(UserError, match="do not belong together"):
            load_tokenizer(tmp_path / "a")

import dataclasses
import errno
import json
import multiprocessing
import os
import pickle

import numpy as np
import pytest

from llm_jax.data import store as store_module
from llm_jax.data import store_writer
from llm_jax.data.documents import is_validation
from llm_jax.data.sources import SourceConfig
from llm_jax.data.store import TokenStore, build_text_stores, default_cache_dir
from llm_jax.data.tokenizers import TokenizerConfig, make_tokenizer
from llm_jax.errors import UserError

BYTES = make_tokenizer(TokenizerConfig(path="bytes"), list)
TEXTS = [f"document {i} 🦜 " + "word " * (i % 13) for i in range(200)]
FRACTION = 0.2


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return SourceConfig(source=str(path))


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "corpus.jsonl", TEXTS)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def build(source, cache, tokenizer=BYTES, fraction=FRACTION):
    return build_text_stores(source, tokenizer, validation_fraction=fraction, cache_dir=cache)


def texts_of(store, tokenizer=BYTES):
    return [tokenizer.decode(store.document(i)) for i in range(len(store))]


def left_over(cache):
    return [path.name for path in (cache / "stores").glob("*.partial")]


def test_documents_and_their_boundaries(source, cache):
    stores = build(source, cache)
    expected = {
        "train": [text for text in TEXTS if not is_validation(text, FRACTION)],
        "validation": [text for text in TEXTS if is_validation(text, FRACTION)],
    }
    assert expected["validation"]
    for split, store in stores.items():
        assert len(store) == len(expected[split])
        for i, text in enumerate(expected[split]):
            ids = [BYTES.bos_id, *text.encode(), BYTES.eos_id]
            assert store.document(i).tolist() == ids
        assert store.offsets.dtype == np.int64 and store.offsets.shape == (len(store) + 1,)
        assert store.offsets[0] == 0 and store.offsets[-1] == len(store.tokens)
        meta = store.meta
        assert meta.tokens == len(store.tokens) and meta.documents == len(store)
        assert meta.bytes == sum(len(text.encode()) for text in expected[split])
        assert meta.tokens == meta.bytes + 2 * meta.documents
        assert meta.source == source.source and meta.tokenizer == BYTES.fingerprint
        with pytest.raises(IndexError):
            store.document(len(store))


def test_long_documents_are_whole(tmp_path, cache):
    long = "x" * 300_000
    stores = build(write(tmp_path / "a.jsonl", [long, "b", "c"]), cache, fraction=0.5)
    assert long in [text for store in stores.values() for text in texts_of(store)]


def test_batches_change_nothing(source, cache, tmp_path, monkeypatch):
    whole = build(source, cache)
    monkeypatch.setattr(store_module, "_BATCH_CHARACTERS", 10)
    single = build(source, tmp_path / "other")
    assert whole["train"].fingerprint == single["train"].fingerprint


@pytest.mark.parametrize("extra, dtype", [(0, np.uint16), (1, np.uint32)])
def test_the_smallest_type_that_holds_the_vocabulary(source, cache, extra, dtype):
    class Large(type(BYTES)):
        def __init__(self):
            super().__init__()
            self.vocab_size = 2**16 + extra

        def encode_batch(self, texts):
            return [[self.vocab_size - 1] for _ in texts]

    store = build(source, cache, Large())["train"]
    assert store.tokens.dtype == dtype and store.document(3)[1] == 2**16 + extra - 1


def test_the_cache_is_used_while_nothing_changes(source, cache, monkeypatch):
    first = build(source, cache)
    monkeypatch.setattr(store_module, "_write", None)  # calling it would fail
    again = build(source, cache)
    assert again["train"].directory == first["train"].directory
    assert again["train"].fingerprint == first["train"].fingerprint


def test_any_change_builds_anew(source, cache, tmp_path):
    other_field = dataclasses.replace(source, text_field="body")
    directories = {
        build(source, cache)["train"].directory,
        build(source, cache, fraction=0.3)["train"].directory,
        build(source, cache, make_tokenizer(TokenizerConfig(vocab_size=300), lambda: TEXTS))[
            "train"
        ].directory,
    }
    with pytest.raises(UserError, match="no field 'body'"):
        build(other_field, cache)
    write(tmp_path / "corpus.jsonl", TEXTS[:-1])
    directories.add(build(source, cache)["train"].directory)
    assert len(directories) == 4 and not left_over(cache)


def test_fingerprints_are_those_of_the_content(source, cache, tmp_path):
    first = build(source, cache)
    copy = build(write(tmp_path / "copy.jsonl", TEXTS), cache)
    assert {s.fingerprint for s in first.values()} == {s.fingerprint for s in copy.values()}
    other = build(write(tmp_path / "other.jsonl", [TEXTS[1], TEXTS[0], *TEXTS[2:]]), cache)
    assert other["train"].fingerprint != first["train"].fingerprint
    # The same tokens with other boundaries.
    joined = [write(tmp_path / f"{i}.jsonl", texts) for i, texts in enumerate(BOUNDARIES)]
    built = [build(config, cache, Silent())["train"] for config in joined]
    assert built[0].tokens.tolist() == built[1].tokens.tolist()
    assert built[0].fingerprint != built[1].fingerprint


def test_a_document_begins_as_is_the_tokenizers_convention(tmp_path, cache):
    tokenizer = type(BYTES)()
    tokenizer.document_start = ()
    stores = build(write(tmp_path / "a.jsonl", TEXTS), cache, tokenizer)
    documents = [s.document(i).tolist() for s in stores.values() for i in range(len(s))]
    assert sorted(documents) == sorted([*text.encode(), tokenizer.eos_id] for text in TEXTS)


class Silent(type(BYTES)):
    """A tokenizer whose bos and eos look like text, so that boundaries show in offsets alone."""

    def __init__(self):
        super().__init__()
        self.eos_id = ord("a")
        self.document_start = (ord("a"),)


HELD_OUT = next(t for t in (f"held out {i}" for i in range(1000)) if is_validation(t, FRACTION))
BOUNDARIES = [[HELD_OUT, "aaa", "aaaaa"], [HELD_OUT, "aaaaa", "aaa"]]


def test_duplicates_fall_on_one_side(tmp_path, cache):
    stores = build(write(tmp_path / "a.jsonl", TEXTS * 3), cache)
    sides = {split: set(texts_of(store)) for split, store in stores.items()}
    assert not sides["train"] & sides["validation"]
    assert sum(map(len, stores.values())) == 3 * len(TEXTS)


def test_a_small_corpus_holds_out_the_document_of_the_smallest_hash(tmp_path, cache):
    texts = [text for text in TEXTS if not is_validation(text, FRACTION)][:4]
    smallest = min(texts, key=store_module.split_hash)
    stores = build(write(tmp_path / "a.jsonl", [*texts, smallest]), cache)
    assert texts_of(stores["validation"]) == [smallest, smallest]
    assert texts_of(stores["train"]) == [text for text in texts if text != smallest]
    assert stores["train"].meta.bytes == sum(len(t.encode()) for t in texts if t != smallest)
    # As if the split had come out so by itself.
    fraction = store_module.split_hash(smallest) + 1e-9
    by_hash = build(write(tmp_path / "a.jsonl", [*texts, smallest]), cache, fraction=fraction)
    for split, store in stores.items():
        assert store.fingerprint == by_hash[split].fingerprint
    assert sorted(os.listdir(stores["train"].directory.parent)) == ["train", "validation"]


def test_corpora_that_cannot_be_split(tmp_path, cache):
    train = next(text for text in TEXTS if not is_validation(text, FRACTION))
    with pytest.raises(UserError, match="a single document"):
        build(write(tmp_path / "a.jsonl", [train, train]), cache)
    with pytest.raises(UserError, match="lower validation_fraction"):
        build(write(tmp_path / "a.jsonl", [HELD_OUT]), cache)
    for fraction in (0.0, 1.0, -1.0):
        with pytest.raises(UserError, match="not between 0 and 1"):
            build(write(tmp_path / "a.jsonl", TEXTS), cache, fraction=fraction)
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no document"):
        build(SourceConfig(source=str(tmp_path / "a.jsonl")), cache)
    assert not left_over(cache)


def test_skipped_rows_are_in_the_description(tmp_path, cache):
    write(tmp_path / "a.jsonl", [*TEXTS, " "])
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("{broken\n")
    source = SourceConfig(source=str(tmp_path / "a.jsonl"), malformed="skip")
    for store in build(source, cache).values():
        assert (store.meta.skipped, store.meta.empty) == (1, 1)


def test_a_store_is_handed_on_by_its_folder(source, cache):
    store = build(source, cache)["train"]
    content = pickle.dumps(store)
    assert len(content) < 1000
    assert pickle.loads(content).document(3).tolist() == store.document(3).tolist()
    with pytest.raises(ValueError, match="read-only"):
        store.document(3)[0] = 1


# --- crashes, races, full disks


def test_a_crash_leaves_no_cache(source, cache, monkeypatch):
    calls = []

    class Crash(type(BYTES)):
        def encode_batch(self, texts):
            calls.append(texts)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return super().encode_batch(texts)

    monkeypatch.setattr(store_module, "_BATCH_CHARACTERS", 100)
    with pytest.raises(KeyboardInterrupt):
        build(source, cache, Crash())
    assert list((cache / "stores").iterdir()) == []


def test_what_a_killed_process_left_is_never_used(source, cache, tmp_path):
    pristine = build(source, tmp_path / "pristine")["train"]
    key = pristine.directory.parent.name
    half = cache / "stores" / f"{key}.killed.partial" / "train"
    half.mkdir(parents=True)
    (half / "tokens.bin").write_bytes(b"half")
    assert build(source, cache)["train"].fingerprint == pristine.fingerprint


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "meta.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "grown"])
def test_a_damaged_cache_is_built_anew(source, cache, name, damage):
    pristine = build(source, cache)["train"]
    path = pristine.directory / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else content * 2)
    with pytest.raises(UserError, match="no whole token store"):
        TokenStore(pristine.directory)
    again = build(source, cache)["train"]
    assert again.fingerprint == pristine.fingerprint and path.read_bytes() == content
    assert sorted(os.listdir(again.directory.parent)) == ["train", "validation"]


def test_the_loser_of_a_race_uses_the_store_of_the_winner(source, cache):
    winner = []

    class Overtaken(type(BYTES)):
        def encode_batch(self, texts):
            if not winner:
                winner.append(build(source, cache)["train"])  # another process is faster
                (winner[0].directory / "mark").write_text("the winner's")
            return super().encode_batch(texts)

    store = build(source, cache, Overtaken())["train"]
    assert (store.directory / "mark").exists() and store.fingerprint == winner[0].fingerprint
    assert not left_over(cache)


def _build_in_process(source, cache, barrier, results):
    barrier.wait()
    results.put(build(source, cache)["train"].fingerprint)


def test_processes_that_build_at_once(source, cache):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [
        context.Process(target=_build_in_process, args=(source, cache, barrier, results))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    fingerprints = {results.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    assert fingerprints == {build(source, cache)["train"].fingerprint} and not left_over(cache)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_and_leaves_nothing(source, cache, monkeypatch, code):
    def full(self, *_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(store_writer.StoreWriter, "add", full)
    with pytest.raises(UserError, match=r"the disk is full.*LLM_JAX_CACHE") as caught:
        build(source, cache)
    assert str(cache / "stores") in str(caught.value)
    assert list((cache / "stores").iterdir()) == []


def test_a_disk_that_fills_up_at_the_last_write(source, cache, monkeypatch):
    real = store_writer._sync

    def full(file):
        if file.name.endswith("meta.json"):
            raise OSError(errno.ENOSPC, "full")
        real(file)

    monkeypatch.setattr(store_writer, "_sync", full)
    with pytest.raises(UserError, match="the disk is full"):
        build(source, cache)
    monkeypatch.undo()
    assert len(build(source, cache)["train"]) > 0


def test_a_cache_that_cannot_be_written(source, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot be written.*LLM_JAX_CACHE"):
        build(source, tmp_path / "file")


def test_the_default_folder(monkeypatch, tmp_path, source):
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "named"))
    assert default_cache_dir() == tmp_path / "named"
    store = build(source, None)["train"]
    assert store.directory.is_relative_to(tmp_path / "named" / "stores")
    monkeypatch.delenv("LLM_JAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "llm_jax"

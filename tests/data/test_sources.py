import gzip
import io
import json
import os
import random
import sys
import types

import pytest

from llm_jax.data import documents, readers
from llm_jax.data.documents import CUT, WHOLE, cut_text, is_validation
from llm_jax.data.sources import (
    ReadCounts,
    SourceConfig,
    read_documents,
    source_identity,
)
from llm_jax.errors import UserError

ROWS = [{"text": "first", "id": 1}, {"text": "zweites, ünïcode 🦜", "id": 2}, {"text": "3\n\n3"}]
TEXTS = [row["text"] for row in ROWS]


def read(path, **options):
    return [d.text for d in read_documents(SourceConfig(source=str(path), **options))]


def error_of(path, **options):
    with pytest.raises(UserError) as caught:
        read(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def jsonl(rows=ROWS):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# --- plain text


def test_a_short_file_is_one_document(tmp_path):
    text = "a line\n\nanother\n" * (WHOLE // 16)
    assert WHOLE - 16 < len(text) <= WHOLE
    (tmp_path / "a.txt").write_text(text)
    assert read(tmp_path / "a.txt") == [text]


def test_a_long_file_is_cut_at_blank_lines_and_concatenates_to_itself(tmp_path):
    source = random.Random(0)
    text = ""
    while len(text) < 5 * WHOLE:
        text += "word " * source.randrange(1, 200) + source.choice(["\n", "\n\n", "\n \r\n"])
    (tmp_path / "a.txt").write_bytes(text.encode())
    cut = read(tmp_path / "a.txt")
    assert "".join(cut) == text
    assert all(CUT <= len(part) <= 2 * CUT for part in cut[:-1])
    assert all(part.endswith(("\n\n", "\n \r\n")) for part in cut[:-1])


@pytest.mark.parametrize(
    "text, end", [("verse\n" * 20_000, "verse\n"), ("é" * 100_000, "é")], ids=["lines", "no lines"]
)
def test_a_long_file_without_blank_lines_is_cut_at_lines_then_characters(tmp_path, text, end):
    (tmp_path / "a.txt").write_text(text)
    cut = read(tmp_path / "a.txt")
    assert len(cut) > 2 and "".join(cut) == text
    assert all(part.endswith(end) and CUT <= len(part) <= 2 * CUT for part in cut[:-1])


def test_the_cuts_do_not_depend_on_how_the_text_streams_in():
    text = "".join(f"{i}\n" + "\n" * (i % 7 == 0) for i in range(40_000))
    whole = list(cut_text([text]))
    for size in (1000, 7777, WHOLE + 1):
        assert list(cut_text(text[i : i + size] for i in range(0, len(text), size))) == whole


@pytest.mark.parametrize("block", [1, 5, 17, 1 << 20])
def test_separators_split_a_file_wherever_blocks_end(tmp_path, monkeypatch, block):
    monkeypatch.setattr(readers, "_BLOCK", block)
    path = tmp_path / "a.txt"
    path.write_text("öne\n<|endoftext|>\ntwo<|endoftext|>\n\n<|endoftext|>three <|endof", "utf-8")
    assert read(path) == ["öne", "two", "three <|endof"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffa\ufeffb".encode())
    assert read(tmp_path / "a.txt") == ["a\ufeffb"]


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
def test_text_that_is_not_utf8_names_file_line_and_byte(tmp_path, monkeypatch, block):
    monkeypatch.setattr(readers, "_BLOCK", block)
    (tmp_path / "a.txt").write_bytes("größe\nsecond\nthird ".encode() + b"\xff more\n")
    assert f"{tmp_path / 'a.txt'}:3: byte 21 is not UTF-8" in error_of(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_bytes("ends in half an é".encode()[:-1])
    assert f"{tmp_path / 'b.txt'}:1: byte 16 is not UTF-8" in error_of(tmp_path / "b.txt")


# --- rows


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.gz", "a.jsonl.zst", "a.json.gz"])
def test_json_lines_plain_and_compressed(tmp_path, name):
    content = b"\n" + jsonl()
    if name.endswith(".gz"):
        content = gzip.compress(content)
    if name.endswith(".zst"):
        zstandard = pytest.importorskip("zstandard")
        # Two frames, the first of unknown size: both are to be read.
        half = len(content) // 2
        frames = zstandard.ZstdCompressor(write_content_size=False).compress(content[:half])
        content = frames + zstandard.compress(content[half:])
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == TEXTS


def test_a_json_file_may_be_one_array(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=2))
    assert read(tmp_path / "a.json") == TEXTS


def test_another_text_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    assert read(tmp_path / "a.jsonl", text_field="answer") == ["a"]


@pytest.mark.parametrize("kind", ["string", "large_string", "binary"])
def test_parquet(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"{text} {i}" for i in range(700) for text in TEXTS]
    values = [text.encode() for text in texts] if kind == "binary" else texts
    column = pyarrow.array(values, getattr(pyarrow, kind)())
    table = pyarrow.table({"id": range(len(texts)), "text": column})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    assert read(tmp_path / "a.parquet") == texts
    message = error_of(tmp_path / "a.parquet", text_field="body")
    assert "has no field 'body', it has 'id', 'text'" in message


@pytest.mark.parametrize("name", ["a.array_record", "a.arrayrecord-00000-of-00002"])
@pytest.mark.parametrize("as_json", [False, True])
def test_array_record_of_texts_and_of_json(tmp_path, name, as_json):
    module = pytest.importorskip("array_record.python.array_record_module")
    texts = [f"{text} {i}" for i in range(200) for text in TEXTS]
    writer = module.ArrayRecordWriter(str(tmp_path / name), "group_size:1")
    for text in texts:
        writer.write((json.dumps({"text": text}) if as_json else text).encode())
    writer.close()
    assert read(tmp_path / name) == texts


def fake_datasets(monkeypatch, rows):
    calls = []
    module = types.ModuleType("datasets")

    def load_dataset(name, subset, *, split, streaming):
        calls.append((name, subset, split, streaming))
        return iter(rows)

    def load_from_disk(path):
        calls.append(path)
        return {"train": rows, "test": rows[:1]}

    module.load_dataset, module.load_from_disk = load_dataset, load_from_disk
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_hugging_face_by_name(monkeypatch):
    calls = fake_datasets(monkeypatch, ROWS)
    assert read("hf:some/name:part", split="validation") == TEXTS
    assert read("hf:some/name") == TEXTS
    assert calls == [("some/name", "part", "validation", True), ("some/name", None, "train", True)]


def test_hugging_face_saved_folder(monkeypatch, tmp_path):
    calls = fake_datasets(monkeypatch, ROWS)
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert read(tmp_path, split="test") == TEXTS[:1]
    assert calls == [str(tmp_path)]
    assert "has no split 'tests'. Did you mean 'test'?" in error_of(tmp_path, split="tests")


def test_a_saved_folder_of_the_real_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"text": text} for text in TEXTS]).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == TEXTS


def test_hugging_face_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'llm_jax[hf]'" in error_of("hf:name")


@pytest.mark.parametrize("package, name", [("pyarrow", "a.parquet"), ("zstandard", "a.jsonl.zst")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package, name):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    assert f"pip install {package}" in error_of(tmp_path / name)


# --- folders and globs


def test_a_folder_is_read_recursively_in_the_order_of_names(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("b.txt", "a.md", "sub/c.txt", "sub/picture.png", ".hidden/d.txt", ".e.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "z.jsonl").write_bytes(jsonl())
    assert read(tmp_path) == ["a.md", "b.txt", "sub/c.txt", *TEXTS]
    assert read(tmp_path, format="jsonl") == TEXTS
    assert read(tmp_path / "*.txt") == ["b.txt"]
    assert read(tmp_path / "**" / "*.txt") == ["b.txt", "sub/c.txt"]
    assert read(tmp_path / "sub" / "*", format="text") == ["sub/c.txt", "sub/picture.png"]


def test_the_format_may_be_given_for_a_file(tmp_path):
    (tmp_path / "corpus").write_bytes(jsonl())
    assert read(tmp_path / "corpus", format="jsonl") == TEXTS
    assert "set data.format to one of text, jsonl" in error_of(tmp_path / "corpus")
    assert "Did you mean 'jsonl'?" in error_of(tmp_path / "corpus", format="jsonlines")


# --- bad input


def test_a_path_that_does_not_exist_gets_a_suggestion(tmp_path):
    (tmp_path / "corpus.txt").write_text("x")
    assert "Did you mean 'corpus.txt'?" in error_of(tmp_path / "corpsu.txt")
    assert "There is no folder" in error_of(tmp_path / "no" / "corpus.txt")
    assert "holds no file of a known format" in error_of(tmp_path / "*.parquet")


@pytest.mark.parametrize(
    "line, why",
    [
        (b'{"text": "cut', "the line is not JSON"),
        (b'{"text": "\xff"}', "the line is not JSON"),
        (b'"text"', "the row is str"),
        (b'{"txt": "a", "id": 1}', "the row has no field 'text', it has 'txt', 'id'"),
        (b'{"text": null}', "'text' is NoneType"),
        (b'{"text": "\\ud83d"}', "'text' is not Unicode text"),
        (b"[" * 100_000, "the line is not JSON"),
    ],
)
def test_a_malformed_line_names_file_and_line_or_is_counted(tmp_path, line, why):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    assert f"{path}:3: {why}" in error_of(path)
    counts = ReadCounts()
    config = SourceConfig(source=str(path), malformed="skip")
    assert [d.text for d in read_documents(config, counts)] == ["a", "b"]
    assert (counts.documents, counts.skipped) == (2, 1)
    assert counts.first_skipped.startswith(f"{path}:3: {why}")


def test_an_empty_source_says_why(tmp_path):
    (tmp_path / "a.txt").write_text(" \n\n")
    assert "holds no document: 1 rows were empty and 0 malformed" in error_of(tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_text('{"txt": 1}\n{"txt": 2}\n')
    message = error_of(tmp_path / "a.jsonl", malformed="skip")
    assert "2 malformed" in message and "it has 'txt'" in message


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.array_record"])
@pytest.mark.parametrize("damage", ["junk", "truncated"])
def test_damaged_files_are_never_taken_for_shorter_ones(tmp_path, name, damage):
    path = tmp_path / name
    if damage == "junk":
        content = b"no such format" * 10_000
    else:
        content = whole_file(tmp_path / f"whole.{name}", 5000)[:-100]
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        read(path)


def whole_file(path, count):
    rows = [{"text": f"row {i} {random.Random(i).random()}"} for i in range(count)]
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".array_record":
        module = pytest.importorskip("array_record.python.array_record_module")
        writer = module.ArrayRecordWriter(str(path), "group_size:1")
        for row in rows:
            writer.write(row["text"].encode())
        writer.close()
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(jsonl(rows)))
    else:
        path.write_bytes(pytest.importorskip("zstandard").compress(jsonl(rows)))
    return path.read_bytes()


# --- identity, streaming, split


def test_the_identity_changes_with_the_files_and_the_options(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    config = SourceConfig(source=str(tmp_path))
    first = source_identity(config)
    assert source_identity(config) == first
    assert source_identity(SourceConfig(source=str(tmp_path), text_field="body")) != first
    (tmp_path / "b.txt").write_text("two")
    second = source_identity(config)
    assert second != first
    stat = (tmp_path / "b.txt").stat()
    (tmp_path / "b.txt").write_text("three")
    os.utime(tmp_path / "b.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    third = source_identity(config)  # another size at the same time
    assert third != second
    os.utime(tmp_path / "b.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert source_identity(config) != third  # the same size at another time


def test_a_file_is_streamed(monkeypatch):
    """The first document is there before the stream has been read far."""
    read_bytes = 0

    class Stream(io.RawIOBase):
        def read(self, size):
            nonlocal read_bytes
            read_bytes += size
            return b"line\n" * (size // 5)  # endless

    first = next(iter(cut_text(readers._decoded(Stream()))))
    assert len(first) >= CUT and read_bytes <= 2 * readers._BLOCK


def test_the_split_depends_on_the_text_alone_and_holds_its_share():
    texts = [f"document {i}" for i in range(20_000)]
    held_out = {text for text in texts if is_validation(text, 0.05)}
    assert 0.04 < len(held_out) / len(texts) < 0.06
    assert held_out == {text for text in reversed(texts) if is_validation(text, 0.05)}
    assert held_out < {text for text in texts if is_validation(text, 0.2)}
    assert all(0 <= documents.split_hash(text) < 1 for text in texts)

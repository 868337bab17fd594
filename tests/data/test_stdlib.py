import ast
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from llm_jax.data.documents import WHOLE
from llm_jax.data.sources import SourceConfig, read_documents
from llm_jax.data.stdlib import stdlib_documents, stdlib_identity

MODULE = '''# A module
"""Tells the module."""

import os


class Parrot(Bird):
    """Tells the class."""

    colour = "blue"

    def speak(self, words, *, loud=False):
        """Tells the method,

        in two paragraphs.
        """
        # a comment
        return words

    def silent(self): "Tells a one-liner."; return None

    async def pine(self):
        """Tells all there is."""


if os:
    def hidden(a: int = 1) -> str:
        """Tells the é function."""

        return """not a docstring"""


def plain():
    return "Tells nothing"
'''
FILLER = "VALUE = 1  # long enough to be kept\n" * 10


@pytest.fixture
def library(tmp_path):
    """A folder that looks like a small standard library."""
    files = {
        "birds.py": MODULE + FILLER,
        "package/__init__.py": '"""' + "Tells the package. " * 20 + '"""\n',
        "package/inner.py": FILLER,
        "short.py": "x = 1\n",
        "broken.py": "def (:\n" + FILLER,
        "latin.py": None,
        "big.py": FILLER * (2 * WHOLE // len(FILLER)),
        "pydoc_data/topics.py": "topics = {'assert': " + repr("The assert statement. " * 20) + "}",
        "raises.py": "raise SystemExit('imported')\n" + FILLER,
        **{
            f"{folder}/left_out.py": FILLER
            for folder in ("site-packages/x", "test", "unittest/tests", "encodings", "config-3.11")
        },
        "_sysconfigdata_linux.py": FILLER,
        "html/entities.py": FILLER,
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"# \xff\n" * 100 if content is None else content.encode())
    return tmp_path


def test_which_documents_there_are(library):
    names = {document.name.partition("#")[0] for document in stdlib_documents(library)}
    assert names == {
        "source/birds.py",
        "documentation/birds",
        "documentation/package",
        "source/package/inner.py",
        "source/big.py",
        "source/raises.py",
        "reference/assert",
    }


def test_docstrings_are_told_once(library):
    texts = {document.name: document.text for document in stdlib_documents(library)}
    documentation, source = texts["documentation/birds"], texts["source/birds.py"]
    for told in ("Tells the module.", "Tells the class.", "Tells the method,", "Tells all there"):
        assert told in documentation and told not in source
    assert "class Parrot(Bird)\n\nTells the class." in documentation
    assert (
        "Parrot.speak(self, words, *, loud=False)\n\nTells the method,\n\nin two" in documentation
    )
    assert "hidden(a: int=1)\n\nTells the é function." in documentation
    assert 'return """not a docstring"""' in source and "# a comment" in source
    without = ast.dump(ast.parse(source))
    assert "Parrot" in without and "colour" in without and "Pass()" in without


@pytest.mark.slow
def test_the_corpus_of_this_installation():
    documents = stdlib_documents()
    texts = [document.text for document in documents]
    assert len(set(document.name for document in documents)) == len(documents)
    assert all(0 < len(text) <= WHOLE for text in texts)
    assert sum(map(len, texts)) > 1_000_000
    assert list(read_documents(SourceConfig())) == list(documents)


def test_the_sources_are_the_originals_without_docstrings():
    texts = {document.name: document.text for document in stdlib_documents()}
    folder = Path(sysconfig.get_path("stdlib"))
    names = ["bisect", "textwrap", "heapq", "string", "queue", "copy", "shelve", "functools"]
    names = [name for name in names if f"source/{name}.py" in texts]
    assert names
    for name in names:
        expected = ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(expected):
            is_documented = isinstance(
                node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            )
            if is_documented and ast.get_docstring(node):
                node.body[:1] = [] if len(node.body) > 1 else [ast.Pass()]
        assert ast.dump(ast.parse(texts[f"source/{name}.py"])) == ast.dump(expected), name


def test_a_prefix_is_a_fair_sample():
    documents = stdlib_documents()
    share = sum(d.name.startswith("source/") for d in documents) / len(documents)
    prefix = documents[: len(documents) // 4]
    assert abs(sum(d.name.startswith("source/") for d in prefix) / len(prefix) - share) < 0.15


def test_order_and_content_are_the_same_in_every_process(library):
    program = (
        "import sys, hashlib, pathlib; from llm_jax.data.stdlib import stdlib_documents;"
        "print(hashlib.sha256(repr(stdlib_documents(pathlib.Path(sys.argv[1]))).encode())"
        ".hexdigest(), 'raises' in sys.modules)"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program, str(library)],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1 and outputs.pop().endswith("False\n")


def test_a_minimal_installation_is_no_error(tmp_path):
    assert stdlib_documents(tmp_path / "nothing") == ()
    (tmp_path / "one.py").write_text(FILLER)
    assert [d.name for d in stdlib_documents(tmp_path)] == ["source/one.py"]


def test_the_identity_tells_installations_apart(library):
    first = stdlib_identity(library)
    assert stdlib_identity(library) == first and first["files"] > 0
    (library / "birds.py").unlink()
    assert stdlib_identity(library) != first

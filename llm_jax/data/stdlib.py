"""The embedded corpus: text that every Python installation holds.

Three kinds of documents come from the standard library's folder: topics of the language reference
(`pydoc_data`), the documentation of each module as its docstrings tell it, and the sources. All is
read as text and parsed with `ast`; nothing is imported, so nothing is executed. The docstrings are
taken out of the sources: a text that stood in two documents could be trained on in one and
validated on in the other.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from llm_jax.data.documents import Document, cut_text

# Part of every cache key: raise it when the documents of an unchanged installation change.
CORPUS_VERSION = 1

_TOPICS = "pydoc_data/topics.py"
# Other people's packages, tests and their data, frozen or bundled copies, and retired tools.
_LEFT_OUT_FOLDERS = frozenset(
    (
        *("site-packages", "dist-packages", "lib-dynload", "ensurepip"),
        *("test", "tests", "idle_test", "idlelib", "lib2to3"),
        *("encodings", "pydoc_data", "__phello__", "__pycache__"),
    )
)
# Generated tables: numbers and names in rows, not language.
_LEFT_OUT_FILES = frozenset(["html/entities.py", "re/_casefix.py", "stringprep.py"])
_LEFT_OUT_PREFIXES = ("config-", "_sysconfigdata", "__hello__")

_SHORTEST = 200  # characters; shorter files are licence headers and empty packages

_DOCUMENTED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def stdlib_documents(folder: Path | None = None) -> tuple[Document, ...]:
    """The documents of the standard library in `folder`, by default the running Python's.

    The order is that of a hash of the names, so that any prefix is a fair sample of the corpus
    (a tokenizer may be trained on one). Parts of the library that an installation lacks are
    absent from the corpus.
    """
    return _documents(folder or Path(sysconfig.get_path("stdlib")))


def stdlib_identity(folder: Path | None = None) -> dict[str, str | int]:
    """What decides the corpus: the versions of Python and of this file, and the files' sizes."""
    folder = folder or Path(sysconfig.get_path("stdlib"))
    topics = [path for path in (folder / _TOPICS,) if path.exists()]
    sizes = [path.stat().st_size for path in (*_files(folder), *topics)]
    return {
        "python": platform.python_version(),
        "corpus_version": CORPUS_VERSION,
        "files": len(sizes),
        "bytes": sum(sizes),
    }


def documented_objects(folder: Path | None = None) -> Iterator[tuple[str, str, ast.AST, str]]:
    """Every class and function of the library that has a docstring, module by module.

    Yields:
      (module, heading, syntax tree, docstring); the heading stands before the docstring in the
      module's document.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    for path in _files(folder):
        parsed = _parse(path)
        if parsed is not None:
            module = _module_name(path.relative_to(folder))
            for heading, node, docstring in _documented(parsed[1], ""):
                yield module, heading, node, docstring


@functools.lru_cache(maxsize=1)  # parsing takes seconds, and a run reads the corpus twice
def _documents(folder: Path) -> tuple[Document, ...]:
    texts: dict[str, str] = dict(_topics(folder / _TOPICS))
    for path in _files(folder):
        relative = path.relative_to(folder)
        parsed = _parse(path)
        if parsed is not None:
            source, tree = parsed
            texts[f"documentation/{_module_name(relative)}"] = _documentation(
                _module_name(relative), tree
            )
            texts[f"source/{relative.as_posix()}"] = _without_docstrings(source, tree)
    documents = [
        Document(part, f"{name}#{index}" if index else name)
        for name, text in texts.items()
        if len(text) >= _SHORTEST
        for index, part in enumerate(cut_text([text]))
    ]
    return tuple(
        sorted(documents, key=lambda d: hashlib.blake2b(d.name.encode(), digest_size=8).digest())
    )


def _files(folder: Path) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(folder):
        # Pruned in place: site-packages may hold a hundred thousand files.
        folders[:] = [
            name
            for name in folders
            if name not in _LEFT_OUT_FOLDERS and not name.startswith(_LEFT_OUT_PREFIXES)
        ]
        found += [
            Path(parent, name)
            for name in names
            if name.endswith(".py") and not name.startswith(_LEFT_OUT_PREFIXES)
        ]
    return sorted(p for p in found if p.relative_to(folder).as_posix() not in _LEFT_OUT_FILES)


def _topics(path: Path) -> Iterator[tuple[str, str]]:
    parsed = _parse(path)
    if parsed is None:
        return
    for statement in parsed[1].body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            for name, text in ast.literal_eval(statement.value).items():
                yield f"reference/{name}", text.strip() + "\n"


def _parse(path: Path) -> tuple[str, ast.Module] | None:
    """The text and the syntax tree, or None for a file that is absent or is no Python."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources
            return source, ast.parse(source)
    except (OSError, ValueError, SyntaxError):  # ValueError: not UTF-8, or null bytes
        return None


def _module_name(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _documented(node: ast.AST, prefix: str) -> Iterator[tuple[str, _Documented, str]]:
    """Every class and function with a docstring, in order: (heading, node, docstring)."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, _DOCUMENTED):
            if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):
                yield from _documented(child, prefix)
            continue
        name = f"{prefix}{child.name}"
        docstring = ast.get_docstring(child)
        if docstring:
            if isinstance(child, ast.ClassDef):
                bases = ", ".join(ast.unparse(base) for base in child.bases)
                heading = f"class {name}({bases})" if bases else f"class {name}"
            else:
                heading = f"{name}({ast.unparse(child.args)})"
            yield heading, child, docstring
        yield from _documented(child, f"{name}.")


def _documentation(module: str, tree: ast.Module) -> str:
    """The docstrings of a module as one text, empty where it has none."""
    parts = [f"{heading}\n\n{text.strip()}\n" for heading, _, text in _documented(tree, "")]
    module_docstring = ast.get_docstring(tree)
    if module_docstring:
        parts.insert(0, f"{module_docstring.strip()}\n")
    return "\n\n".join([f"Module {module}\n", *parts]) if parts else ""


def _without_docstrings(source: str, tree: ast.Module) -> str:
    """The source with the docstrings that `_documentation` tells taken out."""
    lines = source.split("\n")  # as ast counts them: form feeds end no line
    nodes: list[_Documented] = [node for _, node, _ in _documented(tree, "")]
    if ast.get_docstring(tree):
        nodes.append(tree)
    for node in sorted(nodes, key=lambda node: node.body[0].lineno, reverse=True):
        docstring = node.body[0]
        first, last = docstring.lineno - 1, docstring.end_lineno or docstring.lineno
        before = lines[first].encode()[: docstring.col_offset]
        after = lines[last - 1].encode()[docstring.end_col_offset :]
        if before.strip() or (after.strip() and not after.strip().startswith(b"#")):
            continue  # it shares its lines with code
        lines[first:last] = [] if len(node.body) > 1 else [before.decode() + "pass"]
        if len(node.body) > 1 and first < len(lines) and not lines[first].strip():
            del lines[first]  # the blank line that set the docstring off
    return "\n".join(lines).strip("\n") + "\n"

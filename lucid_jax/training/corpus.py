"""The text every Python installation carries, as documents with a fixed train / held-out split.

Sources: `pydoc_data.topics` (the language reference behind `help("topic")`), the docstrings of the
standard library's Python modules (read with `ast`: nothing is run), those of its C modules
(imported: there is no other way to read them), and the comment blocks of the Python modules. A
document is what one source says on one subject (a topic or a module). Whole subjects, not
paragraphs, are held out, so that the held-out score is for modules and topics the model has never
seen.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import re
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lucid_jax.models.evaluate import Document

# Of many salts one under which the held-out half resembles the corpus in size and kind (topics and
# modules by bytes, no single module dominating); chosen before anything was trained.
_SPLIT_SALT = "36"

# Tests and vendored test data are code about code; the tables of `encodings` hold no English.
_SKIPPED_DIRS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3",
     "encodings", "pydoc_data", "lib-dynload"}
)  # fmt: skip
_MIN_DOCSTRING = 16  # characters; shorter ones ("See above.") teach nothing
_MIN_COMMENT = 80
_MIN_SHARED = 32  # characters; a shorter paragraph in both halves is boilerplate, not a leak


@dataclass(frozen=True)
class Corpus:
    """A split corpus. No paragraph of `held_out` occurs in `train`."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]

    @property
    def fingerprint(self) -> str:
        """A short digest of every name and text: equal corpora have equal fingerprints."""
        digest = hashlib.sha256()
        for half in (self.train, self.held_out):
            for document in half:
                digest.update(f"{document.name}\0{document.text}\0".encode())
            digest.update(b"\1")
        return digest.hexdigest()[:16]


def python_documents() -> list[Document]:
    """Collects the running Python's topics, docstrings and comments.

    Returns:
      Documents sorted by name; a docstring or comment that occurs in several places is kept once.
    """
    from pydoc_data import topics

    documents = [Document("topic", name, _tidy(text)) for name, text in topics.topics.items()]
    root = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_DIRS.intersection(relative.parts[:-1]) or relative.name.startswith("test_"):
            continue
        try:
            source = path.read_text("utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        documents.append(_document("module", module, _docstrings(tree, module), seen))
        comments = (("", text) for text in _comments(source))
        documents.append(_document("comments", module, comments, seen, _MIN_COMMENT))
    for module in sorted(_extension_modules(root)):
        documents.append(_document("builtin", module, _live_docstrings(module), seen))
    return sorted((d for d in documents if d.text), key=lambda d: d.name)


def _document(
    kind: str,
    subject: str,
    entries: Iterable[tuple[str, str]],
    seen: set[str],
    min_length: int = _MIN_DOCSTRING,
) -> Document:
    """Joins (heading, text) entries, leaving out short texts and those already in `seen`."""
    kept = []
    for heading, raw in entries:
        text = _tidy(raw)
        if len(text) >= min_length and text not in seen:
            seen.add(text)
            kept.append(f"{heading}\n\n{text}" if heading else text)
    return Document(kind, subject, "\n\n".join(kept))


def split(documents: Iterable[Document], held_out_fraction: float = 0.05) -> Corpus:
    """Splits documents by a stable hash of their subjects and removes what would leak.

    A subject always falls in the same half, whatever else is in the corpus, and takes all its
    documents along (`ssl`, `_ssl` and the comments of `ssl`). Topics quote each other at length, so
    every paragraph that also occurs in a held-out document is cut from the training half. Comments
    are for training only: those of held-out modules are left out altogether.

    Args:
      documents: what to split.
      held_out_fraction: about how many of the documents to hold out, in (0, 1).

    Returns:
      The split corpus, each half in the order given.

    Raises:
      ValueError: if the fraction is outside (0, 1), or a half would be empty.
    """
    if not 0.0 < held_out_fraction < 1.0:
        raise ValueError(f"held_out_fraction must be between 0 and 1, got {held_out_fraction}")
    train: list[Document] = []
    held_out: list[Document] = []
    for document in documents:
        key = f"{_SPLIT_SALT}:{document.subject.lstrip('_')}"
        if zlib.crc32(key.encode()) / 2**32 >= held_out_fraction:
            train.append(document)
        elif document.kind != "comments":
            held_out.append(document)

    hidden = {key for document in held_out for key in paragraph_keys(document.text)}
    kept = []
    for document in train:
        paragraphs = _paragraphs(document.text)
        clean = [p for p in paragraphs if _key(p) not in hidden or len(_key(p)) < _MIN_SHARED]
        if clean:
            kept.append(replace(document, text="\n\n".join(clean)))
    if not kept or not held_out:
        raise ValueError(
            f"the split left {len(kept)} training and {len(held_out)} held-out documents; "
            "give more documents or another held_out_fraction"
        )
    return Corpus(tuple(kept), tuple(held_out))


def python_corpus(held_out_fraction: float = 0.05) -> Corpus:
    """The topics and standard-library docstrings of the running Python, split."""
    return split(python_documents(), held_out_fraction)


def paragraph_keys(text: str) -> set[str]:
    """The paragraphs of a text long enough to count as a leak, whitespace and case folded."""
    return {key for p in _paragraphs(text) if len(key := _key(p)) >= _MIN_SHARED}


def _paragraphs(text: str) -> list[str]:
    return [p for p in re.split(r"\n[ \t]*\n", text) if p.strip()]


def _key(paragraph: str) -> str:
    return " ".join(paragraph.lower().split())


def _tidy(text: str) -> str:
    lines = [line.rstrip() for line in inspect.cleandoc(text).splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _docstrings(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """Yields (heading, docstring), outermost first, in source order."""
    docstring = ast.get_docstring(tree, clean=False)
    if docstring:
        yield module, docstring
    yield from _nested_docstrings(tree.body, "")


def _nested_docstrings(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, str]]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                bases = ", ".join(ast.unparse(base) for base in node.bases)
                yield f"class {prefix}{node.name}" + (f"({bases})" if bases else ""), docstring
            yield from _nested_docstrings(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                yield f"{prefix}{node.name}({_signature(node.args)})", docstring
        elif isinstance(node, ast.If | ast.Try | ast.With):  # definitions behind a platform check
            for field in ("body", "orelse", "finalbody"):
                yield from _nested_docstrings(getattr(node, field, []), prefix)


def _signature(arguments: ast.arguments) -> str:
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return ast.unparse(arguments).removeprefix("self, ").removeprefix("cls, ")


def _comments(source: str) -> Iterator[str]:
    """Blocks of two or more whole-line comments."""
    block: list[str] = []
    for line in (*source.splitlines(), ""):
        stripped = line.strip()
        if stripped.startswith("#"):
            block.append(stripped.lstrip("#").removeprefix(" "))
            continue
        if len(block) > 1:
            yield "\n".join(block)
        block = []


def _extension_modules(root: Path) -> set[str]:
    """Names of the modules written in C, without those that only serve CPython's own tests."""
    files = {path.name.split(".")[0] for path in (root / "lib-dynload").glob("*.so")}
    names = files.union(sys.builtin_module_names)
    return {n for n in names if "test" not in n and not n.startswith("xx")}


def _live_docstrings(module: str) -> Iterator[tuple[str, str]]:
    """Yields (heading, docstring) of an importable module, its functions, classes and methods."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            namespace = importlib.import_module(module)
    except ImportError:  # listed but not built on this platform
        return
    yield module, _doc(namespace)
    for name, value in sorted(vars(namespace).items()):
        # A module also lists what it imports; that belongs to where it is defined.
        if not callable(value) or getattr(value, "__module__", None) not in (module, None):
            continue
        if not isinstance(value, type):
            yield f"{name}{_live_signature(value)}", _doc(value)
            continue
        yield f"class {name}", _doc(value)
        for attribute, member in sorted(vars(value).items()):
            if attribute != "__doc__":
                yield f"{name}.{attribute}{_live_signature(member)}", _doc(member)


def _doc(value: object) -> str:
    docstring = getattr(value, "__doc__", None)  # a type may keep a descriptor there
    return docstring if isinstance(docstring, str) else ""


def _live_signature(value: object) -> str:
    text = getattr(value, "__text_signature__", None) or ""
    return re.sub(r"\(\$(self|module|type)(, /)?(, )?", "(", text)

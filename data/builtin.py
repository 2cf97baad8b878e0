"""Read the built-in corpus: the Python standard library's source on this machine, in four domains, without download.

A hash of a source file's content decides whether its text is held out. Identical files thus fall on the same side of
the split, and so do a file and the docstrings taken from it. The corpus differs between Python versions.
"""

from __future__ import annotations

import ast
import hashlib
import io
import os
import re
import sysconfig
import tokenize
import warnings
from dataclasses import dataclass
from pathlib import Path

from data.config import Section

_SKIPPED = frozenset({"site-packages", "dist-packages", "lib-dynload", "__pycache__", "pydoc_data"})
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_SHARED_PARAGRAPH = 80
"""Paragraphs of at least this many characters count as a leak if both sides of the split have them."""


@dataclass(frozen=True)
class File:
    """A file of the library. A hash of `origin` decides whether it is held out."""

    name: str
    content: bytes
    origin: str


def standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def files(section: Section) -> list[File]:
    """List the files of a section by name. Each topic of pydoc counts as a file."""
    if section is Section.pydoc:
        try:
            from pydoc_data.topics import topics
        except ImportError:
            return []
        return [File(f"pydoc/{name}", text.encode(), f"pydoc/{name}") for name, text in sorted(topics.items())]
    root, found = standard_library(), []
    for path in _python_files(root):
        parts = path.relative_to(root).parts
        is_test = bool(_TEST_FOLDERS & set(parts[:-1])) or parts[-1].startswith("test_")
        if is_test == (section is Section.tests):
            content = path.read_bytes()
            found.append(File("/".join(parts), content, hashlib.sha256(content).hexdigest()))
    return found


def _python_files(root: Path) -> list[Path]:
    """List the library's Python files, sorted. Does not enter site-packages, which may hold far more files."""
    found = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in _SKIPPED]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def text_of(file: File, section: Section) -> str | None:
    """Return the text of a file's document: for `Section.docstrings`, the docstrings joined, which may be empty. Return
    None if the file cannot be decoded or parsed: the library ships such files to test its own parser.
    """
    if section is Section.pydoc:
        return file.content.decode()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(file.content).readline)
        text = file.content.decode(encoding)
        return _docstrings(text) if text and section is Section.docstrings else text
    except (SyntaxError, ValueError, LookupError):
        return None


def without_paragraphs(text: str, unwanted: set[str]) -> str:
    """Remove every paragraph that is in `unwanted`. Topics of pydoc repeat paragraphs, and training must not see
    those of held-out topics. (Putting topics that share a paragraph on the same side of the split does not
    work: the largest group of such topics is 40% of the text.)
    """
    parts = re.split(r"(\n\s*\n)", text)
    return "".join(part for part in parts if " ".join(part.split()) not in unwanted)


def paragraphs(text: str) -> set[str]:
    """Return the paragraphs long enough to count as a leak, with white space normalised."""
    found = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return {part for part in found if len(part) >= _SHARED_PARAGRAPH}


def _docstrings(text: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own files have invalid escapes
        tree = ast.parse(text)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return "\n\n".join(text for text in found if text)

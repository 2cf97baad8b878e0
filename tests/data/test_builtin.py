"""The built-in corpus: four domains, and no text on both sides of the split. Controls show that leaks are found."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from core.errors import ConfigError
from data import builtin
from data.builtin import paragraphs
from data.config import DataConfig, Section, SourceConfig, SourceKind
from data.sources import Document, make_source


def documents(section: Section, held_out: float = 0.2, max_bytes: int | None = None) -> list[Document]:
    source = SourceConfig(kind=SourceKind.builtin, section=section, max_bytes=max_bytes)
    return list(make_source(section.name, source, DataConfig(sources={"x": source}, held_out=held_out)).documents())


def leaks(found: Iterable[Document], parts: Callable[[str], set[str]] = paragraphs) -> set[str]:
    """Return the parts of texts (by default paragraphs) that are on both sides of the split."""
    sides: dict[bool, set[str]] = {True: set(), False: set()}
    for document in found:
        sides[document.held_out] |= parts(document.text)
    return sides[True] & sides[False]


def long_lines(text: str) -> set[str]:
    """Return the lines of 80 or more characters. Quotes are stripped, since an extracted docstring has none."""
    stripped = (line.strip(' "') for line in text.splitlines())
    return {line for line in stripped if len(line) >= 80}


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a small standard library: every function has its own docstring, and every module exists twice."""
    chance = random.Random(0)

    def words(count: int) -> str:
        return " ".join("".join(chance.choices("abcdefgh", k=5)) for _ in range(count))

    for number in range(40):
        docstring = f'"""{words(40)}\n\n    {words(40)}\n    """'
        code = f'"""{words(30)}"""\n\n\ndef f{number}(x):\n    {docstring}\n    return x\n'
        for folder in ("package", "copies/of", "test"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / f"module_{number}.py").write_text(code if folder != "test" else code.replace("f", "g"))
    monkeypatch.setattr(builtin, "standard_library", lambda: tmp_path)
    return tmp_path


def code_and_docstrings() -> list[Document]:
    return [document for section in (Section.code, Section.docstrings) for document in documents(section)]


def test_copies_and_docstrings_fall_where_their_file_falls(library):
    found = code_and_docstrings()
    assert len(found) == 160 and 10 < sum(d.held_out for d in found) < 70
    assert not leaks(found, long_lines)


@pytest.mark.parametrize("origin", [lambda file, section: file.name, builtin.text_of], ids=["path", "extracted text"])
def test_the_check_sees_the_leaks_of_other_splits(library, monkeypatch, origin):
    usual = builtin.files

    def files(section: Section) -> list[builtin.File]:
        return [builtin.File(file.name, file.content, str(origin(file, section))) for file in usual(section)]

    monkeypatch.setattr(builtin, "files", files)
    assert leaks(code_and_docstrings(), long_lines)


def test_topics_share_no_paragraph_across_the_split(monkeypatch):
    topics = {file.content.decode() for file in builtin.files(Section.pydoc)}
    for share in (0.05, 0.3):
        found = documents(Section.pydoc, share)
        assert any(d.held_out for d in found) and not leaks(found)
        assert {d.text for d in found if d.held_out} <= topics  # shared paragraphs are removed from training
    monkeypatch.setattr(builtin, "without_paragraphs", lambda text, unwanted: text)
    assert leaks(documents(Section.pydoc, 0.3))


def test_sections_hold_their_own_files(library):
    for name in ("package/test_inner.py", "package/tests/helper.py", "site-packages/other/foreign.py"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text("x = 1")
    names = {section: {file.name for file in builtin.files(section)} for section in (Section.code, Section.tests)}
    assert {"package/test_inner.py", "package/tests/helper.py", "test/module_3.py"} <= names[Section.tests]
    assert not names[Section.code] & names[Section.tests]
    assert not any("foreign" in name for name in names[Section.code] | names[Section.tests])


def test_encodings_are_read_and_broken_files_counted(library):
    package = library / "package"
    (package / "latin.py").write_bytes("# -*- coding: latin-1 -*-\n# Grüße\n".encode("latin-1"))
    (package / "broken.py").write_bytes(b"# \xff\xfe no UTF-8\n")
    (package / "unknown.py").write_bytes(b"# -*- coding: klingon -*-\n")
    found = documents(Section.code)
    assert sum("Grüße" in d.text for d in found) == 1
    assert [d.dropped for d in found if d.dropped] == ["undecodable"] * 2
    (package / "future.py").write_text("def f(:\n")
    assert [d.dropped for d in documents(Section.docstrings) if d.dropped] == ["undecodable"] * 3


def test_a_section_that_this_python_lacks_is_named(tmp_path, monkeypatch):
    (tmp_path / "abc.py").write_text("x = 1")
    monkeypatch.setattr(builtin, "standard_library", lambda: tmp_path)
    message = r"data.sources.tests.section=tests: this Python has no tests .*add ~data.sources.tests"
    with pytest.raises(ConfigError, match=message):
        documents(Section.tests)


def test_max_bytes_always_chooses_the_same(library):
    whole, some = documents(Section.code), documents(Section.code, max_bytes=5_000)
    assert some == documents(Section.code, max_bytes=5_000)
    for held_out, wanted in ((False, 5_000), (True, 1_250)):
        texts = [d.text for d in some if d.held_out is held_out]
        assert wanted <= sum(map(len, texts)) < wanted + 1_000
        assert texts == [d.text for d in whole if d.held_out is held_out][: len(texts)]

"""Curation equals a plain statement of MetaCLIP's algorithm, over any number of workers and division into files."""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from core.errors import ConfigError, DataError
from data.curation import balance, curate, matching
from data.curation.audit import AUDIT, CURVE, ENTRIES, summary
from data.curation.balance import is_kept, keep_probabilities
from data.curation.config import CurationRules
from data.curation.curate import KEPT, Curation
from data.curation.matching import EntryMatcher, Metadata, read_metadata, spaced
from data.files import find_files
from data.filter.store import OneWorker
from data.images.parts import PartsConfig
from data.images.readers import SUFFIXES, read_documents
from tests.data.filter.threads import on_threads

WORDS = [f"word{number}" for number in range(300)]
ENTRIES_OF_TEST = (*WORDS[:200], "word0 word1", "word2 ,  word3", "word4.", "never seen", "Word5", "word", "ord6", "!")
RULES = CurationRules(t=60)


def captions(count: int) -> list[str]:
    """Return captions of words whose frequencies differ by two orders of magnitude."""
    draw = random.Random(0)
    frequencies = [1 / (1 + number) for number in range(len(WORDS))]
    joins = [" ", "  ", ", ", ".", "!", "\n", "\t", "-"]
    found = []
    for _ in range(count):
        words = draw.choices(WORDS, frequencies, k=draw.randrange(1, 7))
        found.append("".join(word + draw.choice(joins) for word in words))
    return found


CAPTIONS = captions(10_000)


def written(folder: Path, texts: list[str], files: int = 1) -> Path:
    """Write pairs as parquet, dealt to files in turn. All pairs have the same picture, which nobody decodes."""
    folder.mkdir()
    for number in range(files):
        part = texts[number::files]
        table = pyarrow.table({"text": part, "image": [b"picture"] * len(part)})
        pyarrow.parquet.write_table(table, folder / f"{number}.parquet")
    return folder


def as_lines(folder: Path, texts: list[str], more: str = "") -> Path:
    """Write pairs as jsonl with a picture beside it, and more lines."""
    folder.mkdir()
    (folder / "picture.png").write_bytes(b"picture")
    lines = [json.dumps({"text": text, "image": "picture.png"}) for text in texts]
    (folder / "0.jsonl").write_text("\n".join([*lines, more]))
    return folder


def curation(folder: Path, rules: CurationRules, workers: Any = None, metadata: Metadata | None = None) -> Curation:
    files = find_files(str(folder), SUFFIXES)
    return Curation(files, PartsConfig(), metadata or Metadata(ENTRIES_OF_TEST), rules, workers or OneWorker())


def kept_texts(out: Path) -> list[str]:
    """Return the captions of the kept pairs, sorted, as a source of documents reads them."""
    files = sorted((out / KEPT).glob("*.parquet"))
    return sorted(document.text for file in files for document in read_documents(file, PartsConfig()))


def plain_spaced(text: str) -> str:
    text = f" {text} "
    for mark in [",", ".", ";", ":", "?", "!", "`"]:
        text = text.replace(mark, f" {mark} ")
    for blank in ["\t", "\n", "\r"]:
        text = text.replace(blank, " ")
    return text


def plain_curation(texts: list[str], t: int, seed: int = 0) -> tuple[list[str], Counter[str], Counter[str]]:
    """State the algorithm without an automaton or arrays: kept captions, and matches of entries before and after."""
    padded = map(plain_spaced, texts)
    matches = [[entry for entry in ENTRIES_OF_TEST if f" {entry} " in text] for text in padded]
    before = Counter(entry for found in matches for entry in found)
    kept, after = [], Counter[str]()
    for text, found in zip(texts, matches, strict=True):
        lost = Fraction(1)
        for entry in found:
            lost *= 1 - min(Fraction(1), Fraction(t, before[entry]))
        parts = b"".join(
            f"{kind}:{len(content)}:".encode() + content
            for kind, content in (("ImagePart", b"picture"), ("str", text.encode()))
        )
        message = f"curation\x1f{seed}\x1f{hashlib.sha256(parts).hexdigest()}"
        draw = int.from_bytes(hashlib.sha256(message.encode()).digest()[:8], "little")
        if Fraction(draw, 2**64) < 1 - lost:
            kept.append(text)
            after.update(found)
    return sorted(kept), before, after


@pytest.fixture(scope="module")
def plainly() -> tuple[list[str], Counter[str], Counter[str]]:
    return plain_curation(CAPTIONS, RULES.t)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curation")
    curation(written(folder / "in", CAPTIONS), RULES).run(folder / "out")
    return folder


def matches_of(out: Path) -> tuple[Counter[str], Counter[str]]:
    table = pyarrow.parquet.read_table(out / ENTRIES).to_pydict()
    before, after = (Counter(dict(zip(table["entry"], table[name], strict=True))) for name in ("before", "after"))
    return +before, +after


def test_it_is_the_plain_statement_on_10_000_captions(done, plainly):
    kept, before, after = plainly
    assert kept_texts(done / "out") == kept and 1000 < len(kept) < 9000
    assert matches_of(done / "out") == (before, after)
    assert before["word0"] > 40 * RULES.t and before["word2 ,  word3"] > 0  # the cases matter
    assert not {"word4.", "never seen", "Word5", "word", "ord6"} & before.keys()


def test_the_audit_adds_up(done, plainly):
    kept, before, after = plainly
    audit = json.loads((done / "out" / AUDIT).read_text())
    records, matches = audit["records"], audit["matches"]
    assert records["kept"] == len(kept) and records["all"] == 10_000 == sum(records.values()) - records["all"]
    assert records["unmatched"] > 0 and audit["metadata"]["impossible"] == 1
    assert (matches["before"], matches["after"]) == (before.total(), after.total())
    assert matches["tail_after"] > matches["tail_before"] > 0
    assert (done / "out" / CURVE).read_bytes().startswith(b"\x89PNG")


def test_frequent_entries_keep_about_t_matches_of_their_own():
    """Of captions with one frequent entry, t of them are kept, give or take three standard deviations."""
    (probability,) = keep_probabilities(pytest.importorskip("numpy").array([6000]), 600)
    kept = sum(is_kept(f"pair {number}", [probability], 0) for number in range(6000))
    assert abs(kept - 600) < 3 * (6000 * 0.1 * 0.9) ** 0.5


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_and_files_change_nothing(tmp_path, workers):
    """Other workers write the same bytes. Other files, and another order in them, keep the same pairs."""
    few = CAPTIONS[:600]
    source = written(tmp_path / "in", few, files=5)
    rules = CurationRules(t=6)
    curation(source, rules).run(tmp_path / "one")
    on_threads(workers, lambda worker: curation(source, rules, worker).run(tmp_path / "several"))
    names = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(names) == 5 + 3
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "several" / name).read_bytes(), name
    other = written(tmp_path / "other", few[::-1], files=2)
    curation(other, rules).run(tmp_path / "divided")
    assert kept_texts(tmp_path / "divided") == kept_texts(tmp_path / "one")
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_another_seed_keeps_other_pairs(tmp_path):
    source = written(tmp_path / "in", CAPTIONS[:1000])
    kept = []
    for seed in (0, 1):
        curation(source, CurationRules(t=6, seed=seed)).run(tmp_path / str(seed))
        kept.append(kept_texts(tmp_path / str(seed)))
        assert kept[seed] == plain_curation(CAPTIONS[:1000], 6, seed)[0]
    assert abs(len(kept[0]) - len(kept[1])) < 60 and (Counter(kept[0]) - Counter(kept[1])).total() > 60


@pytest.mark.parametrize(
    "wrong",
    [
        lambda text: text,
        lambda text: f" {text} ",
        lambda text: spaced(text).replace("-", " - "),
        lambda text: spaced(text.lower().replace("d5", "D5").replace("word5", "Word5")),
        lambda text: " ".join(spaced(text).split()),
    ],
    ids=["none", "ends only", "hyphens too", "case", "one space"],
)
def test_another_padding_rule_is_noticed(wrong, plainly, monkeypatch):
    def counted() -> Counter[str]:
        return Counter(ENTRIES_OF_TEST[number] for text in CAPTIONS for number in matcher.match(text))

    matcher, expected = EntryMatcher(ENTRIES_OF_TEST), plainly[1]
    assert counted() == expected
    monkeypatch.setattr(matching, "spaced", wrong)
    assert counted() != expected


def test_neighbouring_entries_share_a_space():
    matcher = EntryMatcher(("a", "b", "a b", "c d"))
    assert matcher.match("a b") == [0, 1, 2]
    assert matcher.match("a, b. c\td c.d") == [0, 1, 3]


def test_a_draw_that_ignores_the_pair_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(balance, "key_of", lambda *parts: 2**63)
    curation(written(tmp_path / "in", CAPTIONS[:500]), RULES).run(tmp_path / "out")
    assert kept_texts(tmp_path / "out") != plain_curation(CAPTIONS[:500], RULES.t)[0]


def test_bad_records_and_files_are_counted_and_the_rest_kept(tmp_path):
    """Empty, huge and unmatched captions, records without a picture, broken lines, a truncated tar and parquet."""
    more = (
        '{"text": "word1"}\n{"text": 5, "image": "picture.png"}\n{"text": "word3", "image": "no.png"}\n{'
        '\n{"text": "word3 \\ud800", "image": "picture.png"}'
    )
    source = as_lines(tmp_path / "in", ["word1 fits", "", " \n", "word1 " * 100, "nothing", "word2!"], more)
    with tarfile.open(source / "1.tar", "w") as tar:
        for name, content in (("a.png", b"picture"), ("a.txt", b"a word9 ."), ("b.png", b"picture"), ("b.txt", b"x")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    (source / "1.tar").write_bytes((source / "1.tar").read_bytes()[:2600])
    (source / "2.parquet").write_bytes(b"PAR1 is not enough")
    audit = curation(source, CurationRules(max_characters=100)).run(tmp_path / "out")
    counted = {"kept": 3, "balanced": 0, "unmatched": 1, "empty": 2, "huge": 1, "no_picture": 1, "malformed": 4}
    assert audit["records"] == {"all": 12, **counted}
    assert [one["damaged"] for one in audit["files"]] == [False, True, True]
    assert kept_texts(tmp_path / "out") == ["a word9 .", "word1 fits", "word2!"]
    lines = summary(audit)
    assert len(lines) == 2 + 1 + 4 + 2 and all(line.isprintable() for line in lines)
    assert "1.tar: is damaged" in lines[-2] and "2.parquet: is damaged" in lines[-1]


def test_metadata_that_never_matches_is_one_line(tmp_path):
    source = written(tmp_path / "in", ["word1"])
    with pytest.raises(ConfigError, match="no caption of the 1 files matches one of its 1 entries; matching is case"):
        curation(source, RULES, metadata=Metadata(("WORD1",))).run(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_metadata_is_read_line_by_line(tmp_path):
    path = tmp_path / "metadata.txt"
    path.write_bytes("\ufeffcat\r\n\n dog house \nU.S.\nU . S .\ncat\n!\na!b\n".encode())
    found = read_metadata(path)
    assert found.entries == ("cat", "dog house", "U.S.", "U . S .", "!", "a!b") and found.repeated == 1
    assert found.impossible == ["U.S.", "a!b"]
    assert EntryMatcher(found.entries).match("the U.S. has a!b") == [3, 4]
    for content in (b"", b" \n\n", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="metadata"):
            read_metadata(path)
    for other in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_metadata(other)


def test_a_file_that_changes_between_the_passes_is_noticed(tmp_path, monkeypatch):
    source, real = as_lines(tmp_path / "in", ["word1", "word2"]), keep_probabilities

    def changing(*arguments: Any) -> Any:
        (source / "0.jsonl").write_text('{"text": "word2", "image": "picture.png"}')
        return real(*arguments)

    monkeypatch.setattr(curate, "keep_probabilities", changing)
    with pytest.raises(DataError, match=r"0\.jsonl changed while it was curated"):
        curation(source, RULES).run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key, value", [("t", 0), ("t", -1), ("max_characters", 0), ("seed", 1 << 70)])
def test_useless_rules_are_refused(key, value):
    with pytest.raises(ConfigError, match=key):
        CurationRules(**{key: value})

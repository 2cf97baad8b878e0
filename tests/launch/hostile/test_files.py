"""Damaged files of a run, a model and a corpus: every verb that reads them ends with one line, or without their help."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from tests.launch.hostile.damage import DAMAGES, Damage, content, fault, wrong
from tests.support.tiny import TINY

LINE = json.dumps({"text": "a text of a document that is fine " * 10}).encode() + b"\n"
RUN_FILES = [
    *(".lock", "config.yaml", "environment.json", "log.txt", "metrics.jsonl", "summary.json", "logs"),
    *("tokenizer", "tokenizer/tokenizer.json", "tokenizer/tokenizer_source.json", "checkpoints"),
    "checkpoints/step-00000006",
    *(f"checkpoints/step-00000006/{name}" for name in ("COMMITTED", "index.json", "progress.json", "rank_0.bin")),
]
RUN_VERBS = ("train", "evaluate", "generate", "export", "report", "watch")
MODEL_VERBS = ("import", "generate", "init_from")
CORPORA = {
    ".jsonl": LINE * 200,
    ".jsonl.gz": gzip.compress(LINE * 200),
    ".txt": b"some text " * 2_000,
    ".parquet": b"PAR1" + b"\0" * 100 + b"PAR1",
}
CORPUS_DAMAGES: dict[str, Damage] = {
    **DAMAGES,
    "line of 40 MB": content(b'{"text": "' + b"a" * 40_000_000 + b'"}\n'),
    "gzip bomb": content(gzip.compress(b"a" * 300_000_000, 1)),
    "text is null": content(b'{"text": null}\n' * 50),
    "text is a number": content(b'{"text": 5}\n' * 50),
    "no text": content(b'{"body": "x"}\n' * 50),
    "last line is cut": content(LINE * 50 + b'{"text": "abc'),
    "byte order mark": content(b"\xef\xbb\xbf" + LINE * 50),
    "latin-1": content("é".encode("latin-1") * 500),
    "text is a dict": content(b'{"text": {"a": 1}}\n' * 50),
}
Case = tuple[str, Callable[[], str]]


@pytest.fixture
def cases(command, finished, exported, imported, small_corpus, tmp_path) -> list[Case]:
    """Return every case: its name, and a function that runs it and returns what is wrong with its end."""
    short = ["training.steps=2", "evaluation.sequences=2", "run.name=new", f"run.root={tmp_path}"]

    def run(words: Callable[[Path], list[str]], source: Path, file: str, damage: Damage) -> str:
        folder = tmp_path / "case"
        shutil.copytree(source, folder, symlinks=True)
        try:
            with suppress(FileNotFoundError, NotADirectoryError):
                damage(folder / file)
            return fault(command(*words(folder), cwd=tmp_path, timeout_s=60))
        finally:
            for place in (folder, tmp_path / "new", tmp_path / "out"):
                shutil.rmtree(place, ignore_errors=True)

    same = [*TINY, *small_corpus, f"run.root={tmp_path}", "checkpoint.every=3", "evaluation.sequences=2"]
    own = {
        "train": lambda place: ["train", *same, "run.name=case"],
        "evaluate": lambda place: ["evaluate", str(place), "sequences=1"],
        "generate": lambda place: ["generate", str(place), "the", "tokens=2"],
        "export": lambda place: ["export", str(place), f"out={tmp_path / 'out'}", "check=never"],
        "report": lambda place: ["report", str(place)],
        "watch": lambda place: ["watch", "--once", str(place)],
        "import": lambda place: ["import", str(place), f"out={tmp_path / 'out'}", "check=never"],
        "init_from": lambda place: ["train", *TINY, *small_corpus, *short, f"model.init_from={place}"],
    }
    corpus = {
        "train": lambda file: ["train", *TINY, "data=files", "data.tokenizer.vocab_size=300", *short, *read_from(file)],
        "tokenize": lambda file: ["tokenize", "data=files", "data.tokenizer.vocab_size=300", *read_from(file)],
        "filter": lambda file: ["filter", f"input={file}", f"out={tmp_path / 'out'}"],
    }

    def read_from(file: Path) -> list[str]:
        return [f"data.sources.text.path={file}", f"data.cache={tmp_path / 'out'}"]

    def all_cases() -> Iterator[Case]:
        for file in RUN_FILES:
            for verb in RUN_VERBS:
                for name, damage in DAMAGES.items():
                    yield f"{verb}: {file}: {name}", partial(run, own[verb], finished, file, damage)
        for model in (exported, imported):
            for path in sorted(path for path in model.rglob("*") if path.is_file()):
                for verb in MODEL_VERBS[model == imported :]:
                    for name, damage in DAMAGES.items():
                        file = str(path.relative_to(model))
                        yield f"{verb}: {model.name}/{file}: {name}", partial(run, own[verb], model, file, damage)
        for suffix, body in CORPORA.items():
            for verb, words in corpus.items():
                for name, damage in CORPUS_DAMAGES.items():
                    source = tmp_path / f"source{suffix}"
                    source.mkdir(exist_ok=True)
                    (source / f"in{suffix}").write_bytes(body)
                    at = f"in{suffix}"
                    yield f"{verb}: {at}: {name}", partial(run, lambda p, w=words, a=at: w(p / a), source, at, damage)

    return list(all_cases())


def test_some_damaged_files_end_in_one_line(cases):
    some = [case for case in cases if zlib.crc32(case[0].encode()) % 200 == 0]
    assert len(some) > 8
    assert wrong((name, run()) for name, run in some) == []


@pytest.mark.slow
def test_damaged_files_end_in_one_line(cases):
    """Takes every fourth case; `HOSTILE=all` takes all, which is half an hour."""
    assert len(cases) > 2_000
    some = cases if os.environ.get("HOSTILE") == "all" else cases[::4]
    assert wrong((name, run()) for name, run in some) == []

"""Certificates, the manifest of a corpus and the stages of a filter: all that is kept in folders of ours."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given

from core.config import plain
from core.errors import ConfigError, DataError
from data.corpus import Corpus, open_corpus
from data.filter.store import KEY, MANIFEST, OneWorker, StageStore
from model.config import ModelConfig
from parallel.layout import ParallelConfig
from tests.fuzz.mutations import assert_reads_or_refuses, json_bytes, json_files
from train.certify.plan import shrink, techniques
from train.certify.store import find, save
from train.optim.config import OptimizerKind

MODEL, LAYOUT = ModelConfig(num_layers=2), ParallelConfig()
CERTIFICATE = {
    **{"axes": ["dp"], "model": plain(shrink(MODEL, LAYOUT)), "pass": True},
    "techniques": techniques(LAYOUT, OptimizerKind.adamw, None),
}


@pytest.fixture(scope="module")
def certificate(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.certify.store.sources_digest", lambda: "digest")  # reads all of our files
        yield save(CERTIFICATE, place)


@given(json_files(CERTIFICATE))
@example(b"{")
@example(json_bytes({**CERTIFICATE, "axes": 2}))
def test_any_certificate_is_found_or_passed_over(place, certificate, content):
    path = save(CERTIFICATE, place)
    assert find({"dp": 2}, MODEL, LAYOUT, place)
    path.write_bytes(content)
    found = assert_reads_or_refuses(lambda: find({"dp": 2}, MODEL, LAYOUT, place))
    assert found is None or isinstance(found, str)


TOKENS = np.arange(40, dtype="<u2").tobytes()
STREAM = {
    "shards": [{"file": "a-train-00000.bin", "tokens": 40, "sha256": "0" * 64}],
    "counts": {"documents": 2, "tokens": 40},
}
CORPUS = {
    **{"format": 1, "tokenizer": {"vocab_size": 300, "fingerprint": "f"}, "packing": {"row_tokens": 8}},
    "sources": {"a": {"train": STREAM, "held_out": {"shards": [], "counts": {"documents": 0, "tokens": 0}}}},
}


@given(json_files(CORPUS))
@example(b"[" * 100_000)
@example(json_bytes({**CORPUS, "packing": []}))
@example(json_bytes(CORPUS).replace(b"a-train", b"../fuzz/a-train"))
@example(json_bytes(CORPUS).replace(b"40", b"-40"))
def test_any_manifest_of_a_corpus_is_opened_or_refused(place, content):
    (place / "a-train-00000.bin").write_bytes(TOKENS)
    (place / "manifest.json").write_bytes(content)
    corpus = assert_reads_or_refuses(lambda: open_corpus(place), DataError)
    if corpus is not None:
        assert_reads_or_refuses(lambda: used(corpus), DataError, ConfigError)


def used(corpus: Corpus) -> None:
    assert isinstance(corpus.packed_seq_len, int | None)
    for source in corpus.sources:
        assert math.isfinite(corpus.padding(source)) and math.isfinite(corpus.cut_documents(source))
        stream = corpus.stream(source, "train")
        assert stream.num_sequences(8) >= 0 and len(stream.window(0, len(stream))) == len(stream)
    assert not [path for shards in corpus._streams.values() for path in shards.shards if "/" in path.file]
    corpus.verify()
    corpus.tokenizer  # noqa: B018 - raises, for there is none


@example(json_bytes({"key": "k", "content": "c"}), json_bytes({"shards": []}))
@example(json_bytes(None), json_bytes({"shards": {}}))
@example(json_bytes({"key": 1, "made_of": []}), json_bytes({"shards": {}}))
@given(json_files({"key": "k", "made_of": {"a": 1}, "content": "c"}), json_files({"key": "k", "shards": {"s": 3}}))
def test_any_stage_is_opened_or_refused(place, key, manifest):
    folder = place / "stage"
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    (folder / KEY).write_bytes(key)
    (folder / MANIFEST).write_bytes(manifest)

    def read() -> Any:
        stage = StageStore(folder, "k", {"a": 2})
        stage.open(OneWorker(), "c")
        return stage.is_complete

    assert_reads_or_refuses(read, DataError, ConfigError)

"""Best-fit packing: nothing lost, nothing cut that fits, hardly any padding; compared with greedy packing."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import ConfigError
from data.corpus import HELD_OUT, TRAIN, Corpus, prepare
from data.loader import IGNORED, Loader
from data.packing import DocumentPiece, PackedSequence, Packer, best_fit
from tests.data.conftest import counts_of, make_config, write_texts

BOS, EOS, SEQ_LEN = 0, 1, 64


def documents(count: int, seed: int = 0, longest: int = 200) -> list[list[int]]:
    """Most are short, some longer than a sequence."""
    chance = random.Random(seed)
    return [
        [chance.randint(2, 99) for _ in range(min(longest, int(chance.lognormvariate(3, 0.9)) + 1))]
        for _ in range(count)
    ]


def pack(texts: list[list[int]], buffer_tokens: int | None = None) -> tuple[list[PackedSequence], int]:
    packer = Packer(SEQ_LEN, BOS, EOS, buffer_tokens)
    rows, cut = [], 0
    for text in texts:
        is_cut, done = packer.add(text)
        cut += is_cut
        rows += done
    return rows + packer.close(), cut


def padding(rows: list[PackedSequence]) -> float:
    return sum(row.space for row in rows) / (SEQ_LEN * len(rows))


@pytest.mark.parametrize("buffer_tokens", [None, 1000, 1])
def test_every_token_is_packed_once_and_only_long_ones_cut(buffer_tokens: int | None) -> None:
    texts = documents(500)
    rows, cut = pack(texts, buffer_tokens)
    assert cut == sum(len(text) + 1 > SEQ_LEN for text in texts) > 5
    for row in rows:
        assert sum(len(piece.ids) for piece in row.pieces) + row.space == SEQ_LEN and row.space >= 0
        assert all(piece.ids[0] == BOS and len(piece.ids) > 2 - (piece.ids[-1] != EOS) for piece in row.pieces)
    found = Counter(token for row in rows for piece in row.pieces for token in piece.ids[1:].tolist() if token != EOS)
    assert found == Counter(token for text in texts for token in text)
    whole = Counter(tuple(p.ids[1:-1].tolist()) for row in rows for p in row.pieces if p.ids[-1] == EOS)
    assert Counter(tuple(text) for text in texts if len(text) + 2 <= SEQ_LEN) <= whole


def test_a_large_buffer_leaves_little_padding() -> None:
    texts = documents(3000, longest=60)
    small, large = (padding(pack(texts, size)[0]) for size in (1, 20_000))
    assert large < 0.02 < 0.1 < small, "control: one document a sequence"


def test_the_longest_go_first_where_they_fit_best() -> None:
    rows = best_fit([DocumentPiece(np.zeros(size, np.int32), str(size)) for size in (10, 40, 30, 24, 34, 54)], SEQ_LEN)
    assert [[piece.name for piece in row.pieces] for row in rows] == [["54", "10"], ["40", "24"], ["34", "30"]]
    assert [row.space for row in rows] == [0, 0, 0]


def test_packing_depends_on_earlier_documents_alone() -> None:
    texts = documents(800)
    one, other = (pack(texts, 2000)[0] for _ in range(2))
    flat = [[piece.ids.tolist() for row in rows for piece in row.pieces] for rows in (one, other)]
    assert flat[0] == flat[1]
    packer, early = Packer(SEQ_LEN, BOS, EOS, 2000), []
    for text in texts[:400]:
        early += packer.add(text)[1]
    assert [p.ids.tolist() for row in early for p in row.pieces] == flat[0][: sum(len(r.pieces) for r in early)] != []


def test_a_full_buffer_returns_its_fullest_sequences() -> None:
    packer = Packer(SEQ_LEN, BOS, EOS, buffer_tokens=40 + 60 + 35 + 50)
    added = [packer.add([7] * (size - 2))[1] for size in (40, 60, 35, 50)]
    assert [[row.space for row in rows] for rows in (*added, packer.close())] == [[], [], [], [4, 14], [24, 29]]


def test_no_more_waits_than_the_buffer_holds() -> None:
    packer, waiting, most = Packer(SEQ_LEN, BOS, EOS, 1000), 0, 0
    for text in documents(800, longest=60):
        waiting += len(text) + 2
        waiting -= sum(SEQ_LEN - row.space for row in packer.add(text)[1])
        most = max(most, waiting)
    assert 900 < most < 1000


@pytest.mark.parametrize("length", [61, 62, 63, 125, 126, 127])
def test_no_rest_is_an_end_without_text(length: int) -> None:
    rows, _ = pack([[7] * length])
    pieces = [piece.ids.tolist() for row in rows for piece in row.pieces]
    assert sum(piece.count(7) for piece in pieces) == length and [BOS, EOS] not in pieces


def packed(make_corpus: Callable[..., Corpus], tmp_path: Path, kind: str) -> Corpus:
    path = tmp_path / "texts"
    if not path.exists():
        for words in (3, 5, 8, 40):
            write_texts(path / str(words), 60, words, seed=words)
    return make_corpus({"a": {"path": str(path)}}, packing=kind, pack_seq_len=SEQ_LEN)


def begins(corpus: Corpus) -> float:
    """Share of the sequences that begin with a document."""
    stream = corpus.stream("a", TRAIN)
    first = [stream.window(n * SEQ_LEN, 1)[0] for n in range(stream.num_sequences(SEQ_LEN))]
    return float(np.mean(np.array(first) == corpus.tokenizer.bos_id))


def test_packed_sequences_begin_with_a_document(make_corpus: Callable[..., Corpus], tmp_path: Path) -> None:
    corpus, greedy = (packed(make_corpus, tmp_path, kind) for kind in ("best_fit", "greedy"))
    assert begins(corpus) == 1 and begins(greedy) < 0.2
    stream = corpus.stream("a", TRAIN)
    assert len(stream) == stream.num_sequences(SEQ_LEN) * SEQ_LEN + 1, "the last sequence is whole"
    assert 0 < corpus.cut_documents("a") < 0.3 and greedy.cut_documents("a") > corpus.cut_documents("a") + 0.1
    assert corpus.padding("a") < 0.02 and greedy.padding("a") == 0
    held_out = [c.stream("a", HELD_OUT) for c in (corpus, greedy)]
    assert np.array_equal(*(s.window(0, len(s)) for s in held_out)), "held-out text is the same for a comparison"
    assert counts_of(corpus, "a")["documents"] == counts_of(greedy, "a")["documents"]


def test_greedy_counts_the_documents_that_it_cuts(make_corpus: Callable[..., Corpus], tmp_path: Path) -> None:
    corpus = packed(make_corpus, tmp_path, "greedy")
    stream, cut, total = corpus.stream("a", TRAIN), 0, 0
    starts = np.flatnonzero(stream.window(0, len(stream)) == corpus.tokenizer.bos_id).tolist()
    for begin, end in zip(starts, [*starts[1:], len(stream)], strict=True):
        cut, total = cut + (begin // SEQ_LEN != (end - 1) // SEQ_LEN), total + 1
    assert corpus.cut_documents("a") == cut / total


def test_no_label_reaches_into_another_document(make_corpus: Callable[..., Corpus], tmp_path: Path) -> None:
    corpus = packed(make_corpus, tmp_path, "best_fit")
    bos, eos = corpus.tokenizer.bos_id, corpus.tokenizer.eos_id
    batch = Loader(corpus, SEQ_LEN, corpus.stream("a", TRAIN).num_sequences(SEQ_LEN), seed=1).batch(0)
    labels, tokens = batch.labels_BT, batch.tokens_BT
    assert (labels[:, -1] == IGNORED).all() and not (labels == bos).any()
    assert (labels[tokens == eos] == IGNORED).all()
    kept = labels != IGNORED
    assert torch.equal(labels[:, :-1][kept[:, :-1]], tokens[:, 1:][kept[:, :-1]])
    pieces = int((tokens == bos).sum())
    spare = int(((tokens[:, 1:] == eos) & (tokens[:, :-1] == eos)).sum())
    assert int(kept.sum()) == tokens.numel() - spare - pieces, "each piece gives all but its last token"


def test_another_sequence_length_is_refused(make_corpus: Callable[..., Corpus], tmp_path: Path) -> None:
    corpus = packed(make_corpus, tmp_path, "best_fit")
    for seq_len in (32, 128):
        with pytest.raises(ConfigError, match=rf"training.seq_len={seq_len}: the corpus is packed for sequences of 64"):
            Loader(corpus, seq_len, 4, seed=1)
    Loader(packed(make_corpus, tmp_path, "greedy"), 128, 4, seed=1)


def test_packing_is_reported_and_in_the_fingerprint(tmp_path: Path) -> None:
    path, said = write_texts(tmp_path / "texts", 60, 9), list[str]()
    found = []
    for settings in ({}, {"packing": "best_fit", "pack_seq_len": 64}, {"pack_seq_len": 64}):
        config = make_config(tmp_path / "cache", {"a": {"path": str(path)}}, **settings)
        found.append(prepare(config, said.append).directory)
    assert len(set(found)) == 3
    best_fit, greedy = (line for line in said if line.startswith("sequences of 64 tokens"))
    assert re.search(r", best_fit: documents cut and padding: a 0.0% and [\d.]+%$", best_fit)
    assert re.search(r", greedy: documents cut and padding: a [\d.]+% and 0.0%$", greedy)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"packing": "best_fit"}, r"data.pack_seq_len: packing=best_fit needs the length"),
        ({"pack_seq_len": 1}, r"data.pack_seq_len=1: must hold"),
        ({"packing": "best_fit", "pack_seq_len": 64, "align": 32}, r"data.align=32: needs packing=greedy"),
        ({"prefetch": -1}, r"data.prefetch=-1: must not be negative"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(tmp_path, {"a": {"path": "a"}}, **settings)

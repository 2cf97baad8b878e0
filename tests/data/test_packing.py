"""Best-fit packing loses no token, cuts no document that fits and pads little. Greedy packing is the control."""

from __future__ import annotations

import random
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest

from core.errors import ConfigError
from data.corpus import HELD_OUT, TRAIN, Corpus, prepare
from data.loader import Loader
from data.packing import DocumentPiece, PackedSequence, Packer, best_fit
from tests.data.conftest import counts_of, make_config, write_texts

BOS, EOS, SEQ_LEN = 0, 1, 64


def documents(count: int, seed: int = 0, longest: int = 200) -> list[list[int]]:
    """Draw documents, most of them short and some longer than a sequence."""
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


@pytest.mark.parametrize("buffer_tokens", [None, 1000, 1])
def test_every_token_is_packed_once_and_only_long_ones_cut(buffer_tokens):
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


def test_a_large_buffer_leaves_little_padding():
    texts = documents(3000, longest=60)
    packed = [pack(texts, buffer_tokens)[0] for buffer_tokens in (1, 20_000)]
    small, large = (sum(row.space for row in rows) / (SEQ_LEN * len(rows)) for rows in packed)
    assert large < 0.02 < 0.1 < small, "control: one document a sequence"


def test_the_longest_go_first_where_they_fit_best():
    rows = best_fit([DocumentPiece(np.zeros(size, np.int32), str(size)) for size in (10, 40, 30, 24, 34, 54)], SEQ_LEN)
    assert [[piece.name for piece in row.pieces] for row in rows] == [["54", "10"], ["40", "24"], ["34", "30"]]
    assert [row.space for row in rows] == [0, 0, 0]


def test_packing_depends_on_earlier_documents_alone():
    texts, packer = documents(800), Packer(SEQ_LEN, BOS, EOS, 2000)
    early = [row for text in texts[:400] for row in packer.add(text)[1]]
    some, whole = ([[p.ids.tolist() for p in row.pieces] for row in rows] for rows in (early, pack(texts, 2000)[0]))
    assert some == whole[: len(some)] != []


def test_a_full_buffer_returns_its_fullest_sequences():
    packer = Packer(SEQ_LEN, BOS, EOS, buffer_tokens=40 + 60 + 35 + 50)
    added = [packer.add([7] * (size - 2))[1] for size in (40, 60, 35, 50)]
    assert [[row.space for row in rows] for rows in (*added, packer.close())] == [[], [], [], [4, 14], [24, 29]]


def test_no_more_waits_than_the_buffer_holds():
    packer, waiting, most = Packer(SEQ_LEN, BOS, EOS, 1000), 0, 0
    for text in documents(800, longest=60):
        waiting += len(text) + 2
        waiting -= sum(SEQ_LEN - row.space for row in packer.add(text)[1])
        most = max(most, waiting)
    assert 900 < most < 1000


@pytest.mark.parametrize("length", [61, 62, 63, 125, 126, 127])
def test_no_rest_is_an_end_without_text(length):
    rows, _ = pack([[7] * length])
    pieces = [piece.ids.tolist() for row in rows for piece in row.pieces]
    assert sum(piece.count(7) for piece in pieces) == length and [BOS, EOS] not in pieces


def begins(corpus: Corpus) -> float:
    """Return the fraction of the sequences that begin with a document."""
    stream = corpus.stream("a", TRAIN)
    first = [stream.window(n * SEQ_LEN, 1)[0] for n in range(stream.num_sequences(SEQ_LEN))]
    return float(np.mean(np.array(first) == corpus.tokenizer.bos_id))


def test_packed_sequences_begin_with_a_document(mixed):
    corpus, greedy = (mixed(packing=kind, pack_seq_len=SEQ_LEN) for kind in ("best_fit", "greedy"))
    assert begins(corpus) == 1 and begins(greedy) < 0.2
    stream = corpus.stream("a", TRAIN)
    assert len(stream) == stream.num_sequences(SEQ_LEN) * SEQ_LEN + 1, "the last sequence is whole"
    assert 0 < corpus.cut_documents("a") < 0.3 and greedy.cut_documents("a") > corpus.cut_documents("a") + 0.1
    assert corpus.padding("a") < 0.02 and greedy.padding("a") == 0
    held_out = [c.stream("a", HELD_OUT) for c in (corpus, greedy)]
    assert np.array_equal(*(s.window(0, len(s)) for s in held_out)), "held-out text does not depend on the packing"
    assert counts_of(corpus, "a")["documents"] == counts_of(greedy, "a")["documents"]


def test_greedy_counts_the_documents_that_it_cuts(mixed):
    corpus = mixed(pack_seq_len=SEQ_LEN)
    stream, cut, total = corpus.stream("a", TRAIN), 0, 0
    starts = np.flatnonzero(stream.window(0, len(stream)) == corpus.tokenizer.bos_id).tolist()
    for begin, end in zip(starts, [*starts[1:], len(stream)], strict=True):
        cut, total = cut + (begin // SEQ_LEN != (end - 1) // SEQ_LEN), total + 1
    assert corpus.cut_documents("a") == cut / total


def test_another_sequence_length_is_refused(mixed):
    corpus = mixed(packing="best_fit", pack_seq_len=SEQ_LEN)
    for seq_len in (32, 128):
        with pytest.raises(ConfigError, match=rf"training.seq_len={seq_len}: the corpus is packed for sequences of 64"):
            Loader(corpus, seq_len, 4, seed=1)
    Loader(mixed(pack_seq_len=SEQ_LEN), 128, 4, seed=1)


def test_layouts_are_reported_and_in_the_fingerprint(tmp_path):
    path, said, found = write_texts(tmp_path / "texts", 60, 9), list[str](), list[Corpus]()
    packings: list[dict[str, Any]] = [{"packing": "best_fit", "pack_seq_len": 64}, {"pack_seq_len": 64}]
    for settings in ({}, {"align": 8}, {"align": 16}, {"align": 16}, *packings):
        found.append(prepare(make_config(tmp_path / "cache", {"a": {"path": str(path)}}, **settings), said.append))
    assert len({corpus.fingerprint for corpus in found}) == len({corpus.directory for corpus in found}) == 5
    _, aligned, again, best_fit, greedy = (line for line in said if "padding" in line)
    assert aligned == again == f"documents aligned to 16 tokens: padding {found[2].padding('a'):.1%} of a"
    assert re.search(r"^sequences of 64 .*, best_fit: a: 0.0% of documents cut, [\d.]+% padding$", best_fit)
    assert re.search(r"^sequences of 64 .*, greedy: a: [\d.]+% of documents cut, 0.0% padding$", greedy)

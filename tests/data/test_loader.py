"""A batch is a pure function of the step: the same for any number of ranks and in a new process."""

from __future__ import annotations

import itertools
from functools import reduce

import numpy as np
import pytest
import torch

from core.errors import ConfigError
from data.corpus import HELD_OUT, TRAIN, Corpus, open_corpus
from data.loader import IGNORED, Batch, Loader
from tests.data.conftest import counts_of, write_texts

SEQ_LEN = 32


def equal(one: Batch, other: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.tensors, other.tensors, strict=True))


def concat(parts: list[Batch]) -> Batch:
    return reduce(Batch.concat, parts)


def test_ranks_see_slices_of_the_same_batch(corpus):
    loader = Loader(corpus, SEQ_LEN, 16, seed=1)
    for step in (0, 3, 200):
        whole = loader.batch(step)
        assert equal(whole, concat([loader.batch(step, start, start + 2) for start in range(0, 16, 2)]))
        assert equal(whole, concat([whole.slice(start, start + 2) for start in range(0, 16, 2)]))
    assert not equal(loader.batch(0), concat([loader.batch(0, 8, 16), loader.batch(0, 0, 8)])), "control: another order"


def test_samples_come_in_the_order_they_are_asked_for(corpus):
    loader, ordinals = Loader(corpus, SEQ_LEN, 8, seed=1), [5000, 3, 3, 70_000, 1023, 1024]
    assert equal(loader.samples(ordinals), concat([loader.samples([ordinal]) for ordinal in ordinals]))
    assert loader.samples([]).tokens_BT.shape == (0, SEQ_LEN)


def test_a_fresh_loader_continues_exactly(corpus):
    weights = {"long": 3.0, "short": 1.0}
    first = [Loader(corpus, SEQ_LEN, 8, 1, "", weights).batch(step) for step in range(6)]
    again = Loader(open_corpus(corpus.directory), SEQ_LEN, 8, 1, "", weights)
    assert all(equal(again.batch(step), first[step]) for step in (5, 2, 4))


def test_everything_that_names_a_batch_changes_it(corpus):
    renamed = Corpus(corpus.directory, {**corpus.manifest, "note": "the same tokens, another manifest"})
    usual, phase = Loader(corpus, SEQ_LEN, 8, seed=1), Loader(corpus, SEQ_LEN, 8, seed=1, phase="long")
    others = [phase, Loader(corpus, SEQ_LEN, 8, seed=2), Loader(renamed, SEQ_LEN, 8, seed=1)]
    assert not any(equal(usual.batch(0), other) for other in [usual.batch(1), *(one.batch(0) for one in others)])


def test_each_epoch_and_source_has_its_own_order(make_corpus, tmp_path):
    folder = str(write_texts(tmp_path / "texts", 12))
    loader = Loader(make_corpus({"a": {"path": folder}, "b": {"path": folder}}), SEQ_LEN, 8, seed=1)
    count = loader._streams[0].num_sequences(SEQ_LEN)
    epochs = [np.arange(epoch * count, (epoch + 1) * count) for epoch in range(3)]
    orders = [loader._shuffled(source, epoch) for source in (0, 1) for epoch in epochs]
    assert all(np.array_equal(np.sort(order), np.arange(len(order))) for order in orders)
    assert all((one == other).mean() < 0.1 for one, other in itertools.combinations(orders, 2))


def test_sources_come_by_weight_and_are_named(corpus):
    loader = Loader(corpus, SEQ_LEN, 1024, seed=1, weights={"short": 1.0, "long": 3.0})
    batch = loader.batch(0)
    assert batch.sources_B.bincount().tolist() == [768, 256]  # in the order of the corpus, not of the weights
    row = int(torch.nonzero(batch.sources_B == 1)[0])
    stream = corpus.stream("short", TRAIN)
    windows = {tuple(stream.window(r * SEQ_LEN, SEQ_LEN).tolist()) for r in range(stream.num_sequences(SEQ_LEN))}
    assert tuple(batch.tokens_BT[row].tolist()) in windows


@pytest.mark.parametrize("settings", [{}, {"align": 64}, {"packing": "best_fit", "pack_seq_len": 128}], ids=str)
def test_labels_never_reach_another_document(mixed, settings):
    corpus = mixed(**settings)
    batch = Loader(corpus, 128, 64, seed=1).batch(0)
    tokens, labels = batch.tokens_BT, batch.labels_BT
    ends = tokens == corpus.tokenizer.eos_id  # ends of documents, and padding
    assert torch.equal(labels[:, :-1], torch.where(ends[:, :-1], IGNORED, tokens[:, 1:]))
    assert (labels[ends] == IGNORED).all() and ends.any() and not (labels == corpus.tokenizer.bos_id).any()
    assert (labels[:, -1] == IGNORED).all() == ("packing" in settings)


def test_the_last_label_is_the_next_sequences_first_token(corpus):
    loader = Loader(corpus, SEQ_LEN, 8, seed=1)
    batch = loader.held_out("long", 0, 5)
    for number in range(4):
        following = int(batch.tokens_BT[number + 1, 0])
        assert int(batch.labels_BT[number, -1]) == (IGNORED if following == corpus.tokenizer.bos_id else following)


def test_positions_restart_at_documents_and_sequences(corpus):
    bos = corpus.tokenizer.bos_id
    batch = Loader(corpus, 128, 64, seed=1).batch(0)
    for tokens, positions in zip(batch.tokens_BT.tolist(), batch.positions_BT.tolist(), strict=True):
        expected, place = [], 0
        for token in tokens:
            place = 0 if token == bos else place
            expected.append(place)
            place += 1
        assert positions == expected


def test_held_out_sequences_are_fixed_and_in_order(corpus):
    stream, count = corpus.stream("short", HELD_OUT), Loader(corpus, SEQ_LEN, 4, seed=1).num_held_out("short")
    assert count == stream.num_sequences(SEQ_LEN) > 2
    one, other = (Loader(corpus, SEQ_LEN, 4, seed=seed).held_out("short", 0, count) for seed in (1, 2))
    assert equal(one, other) and one.sources_B.tolist() == [1] * count
    assert all(tensor.dtype == torch.int64 for tensor in one.tensors)
    assert torch.equal(one.tokens_BT.reshape(-1), torch.from_numpy(stream.window(0, count * SEQ_LEN)))
    assert Loader(corpus, SEQ_LEN, 4, seed=1).held_out("short", 0, 0).tokens_BT.shape == (0, SEQ_LEN)


def test_wrong_sources_are_refused(corpus):
    tokens = len(corpus.stream("short", TRAIN))
    Loader(corpus, tokens - 1, 4, seed=1)
    reason = rf"data.sources.short: has {tokens} training tokens, less than one sequence of {tokens}"
    with pytest.raises(ConfigError, match=reason):
        Loader(corpus, tokens, 4, seed=1)
    with pytest.raises(ConfigError, match=r"data.sources.shrot: the corpus has no such source; try long or short"):
        Loader(corpus, SEQ_LEN, 4, seed=1, weights={"shrot": 1.0})


ALIGN = 64


def test_aligned_documents_do_not_cross_chunks(mixed):
    batch, plain = (Loader(mixed(align=align), 2 * ALIGN, 48, seed=1).batch(0) for align in (ALIGN, None))
    crossing, without = (int((one.positions_BT[:, ::ALIGN] % ALIGN != 0).sum()) for one in (batch, plain))
    assert crossing == 0 and without > 20, "control"
    inside = (batch.positions_BT == 0).sum() - (batch.positions_BT[:, ::ALIGN] == 0).sum()
    assert inside > 10, "short documents share a chunk"


def test_padding_is_counted_and_changes_nothing_else(mixed):
    corpus, plain = (mixed(align=align) for align in (ALIGN, None))
    eos = corpus.tokenizer.eos_id
    tokens, wanted = (s.window(0, len(s)) for s in (c.stream("a", TRAIN) for c in (corpus, plain)))
    padding = np.concatenate([[False], (tokens[1:] == eos) & (tokens[:-1] == eos)])
    assert np.array_equal(tokens[~padding], wanted)
    assert counts_of(corpus, "a")["padding"] == padding.sum() > 0
    assert corpus.padding("a") == padding.mean() and plain.padding("a") == 0

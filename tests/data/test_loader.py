"""Batches as a pure function of the step: the same for any number of ranks and for a fresh process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import ConfigError
from data.corpus import HELD_OUT, TRAIN, Corpus, open_corpus, prepare
from data.loader import IGNORED, Batch, Loader
from tests.data.conftest import counts_of, make_config, write_texts

SEQ_LEN = 32


def equal(one: Batch, other: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True))


def concat(parts: list[Batch]) -> Batch:
    return Batch(*(torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])))


@pytest.mark.parametrize("ranks", [1, 8])
def test_ranks_see_slices_of_the_same_batch(corpus: Corpus, ranks: int) -> None:
    loader, share = Loader(corpus, SEQ_LEN, 16, seed=1), 16 // ranks
    for step in (0, 3, 200):
        whole = loader.batch(step)
        assert equal(whole, concat([loader.batch(step, r * share, (r + 1) * share) for r in range(ranks)]))
        assert equal(whole, concat([whole.slice(r * share, (r + 1) * share) for r in range(ranks)]))
    assert not equal(loader.batch(0), concat([loader.batch(0, 8, 16), loader.batch(0, 0, 8)])), "control: another order"


def test_samples_come_in_the_order_they_are_asked_for(corpus: Corpus) -> None:
    loader, ordinals = Loader(corpus, SEQ_LEN, 8, seed=1), [5000, 3, 3, 70_000, 1023, 1024]
    assert equal(loader.samples(ordinals), concat([loader.samples([ordinal]) for ordinal in ordinals]))
    assert loader.samples([]).tokens_BT.shape == (0, SEQ_LEN)


def test_a_fresh_loader_continues_exactly(corpus: Corpus) -> None:
    weights = {"long": 3.0, "short": 1.0}
    first = [Loader(corpus, SEQ_LEN, 8, 1, "", weights).batch(step) for step in range(6)]
    again = Loader(open_corpus(corpus.directory), SEQ_LEN, 8, 1, "", weights)
    assert all(equal(again.batch(step), first[step]) for step in (5, 2, 4))


def test_everything_that_names_a_batch_changes_it(
    corpus: Corpus, make_corpus: Callable[..., Corpus], tmp_path: Path
) -> None:
    usual = Loader(corpus, SEQ_LEN, 8, seed=1).batch(0)
    others = {
        "seed": Loader(corpus, SEQ_LEN, 8, seed=2),
        "phase": Loader(corpus, SEQ_LEN, 8, seed=1, phase="long"),
        "generation": Loader(corpus, SEQ_LEN, 8, seed=1, generation=1),
    }
    for name, loader in others.items():
        assert not equal(usual, loader.batch(0)), name
    assert not equal(usual, Loader(corpus, SEQ_LEN, 8, seed=1).batch(1))
    renamed = Corpus(corpus.directory, {**corpus.manifest, "note": "the same tokens, another manifest"})
    assert not equal(usual, Loader(renamed, SEQ_LEN, 8, seed=1).batch(0))
    sources = {"long": {"path": str(write_texts(tmp_path / "other", 60, seed=3))}}
    assert make_corpus(sources).fingerprint != corpus.fingerprint


def epoch_order(loader: Loader, source: int, epoch: int) -> np.ndarray:
    count = loader._streams[source].num_sequences(SEQ_LEN)
    return loader._shuffled(source, np.arange(epoch * count, (epoch + 1) * count))


def test_each_epoch_has_its_own_order_of_all_sequences(corpus: Corpus) -> None:
    loader = Loader(corpus, SEQ_LEN, 8, seed=1)
    for source in (0, 1):
        count = loader._streams[source].num_sequences(SEQ_LEN)
        epochs = [epoch_order(loader, source, epoch) for epoch in range(3)]
        assert all(np.array_equal(np.sort(order), np.arange(count)) for order in epochs)
        assert (epochs[0] == epochs[1]).mean() < 0.1 and (epochs[1] == epochs[2]).mean() < 0.1


def test_sources_of_one_size_have_their_own_orders(make_corpus: Callable[..., Corpus], tmp_path: Path) -> None:
    folder = str(write_texts(tmp_path / "texts", 12))
    loader = Loader(make_corpus({"a": {"path": folder}, "b": {"path": folder}}), SEQ_LEN, 8, seed=1)
    assert (epoch_order(loader, 0, 0) == epoch_order(loader, 1, 0)).mean() < 0.1


def test_one_epoch_of_batches_covers_a_source_once(make_corpus: Callable[..., Corpus], tmp_path: Path) -> None:
    corpus = make_corpus({"a": {"path": str(write_texts(tmp_path / "a", 12))}})
    loader, stream = Loader(corpus, SEQ_LEN, 1, seed=1), corpus.stream("a", TRAIN)
    seen = [tuple(loader.batch(step).tokens_BT[0].tolist()) for step in range(stream.num_sequences(SEQ_LEN))]
    wanted = [tuple(stream.window(row * SEQ_LEN, SEQ_LEN).tolist()) for row in range(stream.num_sequences(SEQ_LEN))]
    assert Counter(seen) == Counter(wanted) and seen != wanted


def test_sources_come_by_weight_and_are_named(corpus: Corpus) -> None:
    loader = Loader(corpus, SEQ_LEN, 1024, seed=1, weights={"short": 1.0, "long": 3.0})
    batch = loader.batch(0)
    assert batch.sources_B.bincount().tolist() == [768, 256]  # in the corpus's order, not that of the weights
    row = int(torch.nonzero(batch.sources_B == 1)[0])
    stream = corpus.stream("short", TRAIN)
    windows = {tuple(stream.window(r * SEQ_LEN, SEQ_LEN).tolist()) for r in range(stream.num_sequences(SEQ_LEN))}
    assert tuple(batch.tokens_BT[row].tolist()) in windows


def test_labels_never_reach_the_next_document(corpus: Corpus) -> None:
    bos, eos = corpus.tokenizer.bos_id, corpus.tokenizer.eos_id
    batch = Loader(corpus, 128, 64, seed=1).batch(0)
    tokens, labels = batch.tokens_BT, batch.labels_BT
    inner, following = labels[:, :-1], tokens[:, 1:]
    assert torch.equal(inner[following != bos], following[following != bos])
    assert bool((inner[following == bos] == IGNORED).all()) and bool((following == bos).any())
    assert not bool((labels == bos).any()) and bool((labels == eos).any())
    ends = tokens == eos
    assert bool((labels[ends] == IGNORED).all()) and int((labels == IGNORED).sum()) == int(ends.sum())


def test_the_last_label_is_the_next_sequences_first_token(corpus: Corpus) -> None:
    loader = Loader(corpus, SEQ_LEN, 8, seed=1)
    batch = loader.held_out("long", 0, 5)
    for number in range(4):
        following = int(batch.tokens_BT[number + 1, 0])
        assert int(batch.labels_BT[number, -1]) == (IGNORED if following == corpus.tokenizer.bos_id else following)


def test_positions_restart_at_documents_and_sequences(corpus: Corpus) -> None:
    bos = corpus.tokenizer.bos_id
    batch = Loader(corpus, 128, 64, seed=1).batch(0)
    for tokens, positions in zip(batch.tokens_BT.tolist(), batch.positions_BT.tolist(), strict=True):
        expected, place = [], 0
        for token in tokens:
            place = 0 if token == bos else place
            expected.append(place)
            place += 1
        assert positions == expected


def test_batches_are_int64(corpus: Corpus) -> None:
    loader = Loader(corpus, SEQ_LEN, 4, seed=1)
    for batch in (loader.batch(0), loader.held_out("long", 0, 2)):
        assert all(tensor.dtype == torch.int64 for tensor in vars(batch).values())
        assert batch.tokens_BT.shape == batch.labels_BT.shape == batch.positions_BT.shape


def test_held_out_sequences_are_fixed_and_in_order(corpus: Corpus) -> None:
    stream, count = corpus.stream("short", HELD_OUT), Loader(corpus, SEQ_LEN, 4, seed=1).num_held_out("short")
    assert count == stream.num_sequences(SEQ_LEN) > 2
    one, other = (Loader(corpus, SEQ_LEN, 4, seed=seed).held_out("short", 0, count) for seed in (1, 2))
    assert equal(one, other) and one.sources_B.tolist() == [1] * count
    assert torch.equal(one.tokens_BT.reshape(-1), torch.from_numpy(stream.window(0, count * SEQ_LEN)))
    assert Loader(corpus, SEQ_LEN, 4, seed=1).held_out("short", 0, 0).tokens_BT.shape == (0, SEQ_LEN)


def test_wrong_sources_are_refused(corpus: Corpus) -> None:
    tokens = len(corpus.stream("short", TRAIN))
    Loader(corpus, tokens - 1, 4, seed=1)
    reason = rf"data.sources.short: has {tokens} training tokens, less than one sequence of {tokens}"
    with pytest.raises(ConfigError, match=reason):
        Loader(corpus, tokens, 4, seed=1)
    with pytest.raises(ConfigError, match=r"data.sources.shrot: the corpus has no such source; try long or short"):
        Loader(corpus, SEQ_LEN, 4, seed=1, weights={"shrot": 1.0})


ALIGN = 64


def aligned(make_corpus: Callable[..., Corpus], tmp_path: Path, align: int | None = ALIGN) -> Corpus:
    """Documents of 12 to 100 words, some shorter than a chunk."""
    path = tmp_path / "documents"
    if not path.exists():
        for words in (2, 5, 40):
            write_texts(path / str(words), 20, words, seed=words)
    return make_corpus({"a": {"path": str(path)}}, align=align)


def crossing(batch: Batch) -> int:
    """How many documents cross a multiple of `ALIGN` in a sequence."""
    starts = batch.positions_BT % ALIGN == 0
    return int((~starts[:, ::ALIGN]).sum())


def test_aligned_documents_do_not_cross_chunks(make_corpus: Callable[..., Corpus], tmp_path: Path) -> None:
    corpus = aligned(make_corpus, tmp_path)
    batches = [Loader(corpus, 2 * ALIGN, 8, seed=1).batch(step) for step in range(6)]
    assert sum(map(crossing, batches)) == 0
    inside = sum(
        int((batch.positions_BT == 0).sum() - (batch.positions_BT[:, ::ALIGN] == 0).sum()) for batch in batches
    )
    assert inside > 20, "short documents share a chunk"
    plain = Loader(aligned(make_corpus, tmp_path, None), 2 * ALIGN, 8, seed=1)
    assert sum(crossing(plain.batch(step)) for step in range(6)) > 20, "control"


def test_padding_is_counted_and_has_no_labels(make_corpus: Callable[..., Corpus], tmp_path: Path) -> None:
    corpus, plain = (aligned(make_corpus, tmp_path, align) for align in (ALIGN, None))
    eos = corpus.tokenizer.eos_id
    stream, other = (c.stream("a", TRAIN) for c in (corpus, plain))
    tokens, wanted = (s.window(0, len(s)) for s in (stream, other))
    padding = np.concatenate([[False], (tokens[1:] == eos) & (tokens[:-1] == eos)])
    assert np.array_equal(tokens[~padding], wanted), "nothing else changes"
    assert counts_of(corpus, "a")["padding"] == padding.sum() > 0
    assert corpus.padding("a") == padding.mean() and plain.padding("a") == 0
    batch = Loader(corpus, 2 * ALIGN, 8, seed=1).batch(0)
    after = batch.tokens_BT == eos
    assert (batch.labels_BT[after] == IGNORED).all() and after.any()
    kept = batch.labels_BT != IGNORED
    assert torch.equal(batch.labels_BT[:, :-1][kept[:, :-1]], batch.tokens_BT[:, 1:][kept[:, :-1]])
    ends = (batch.labels_BT == eos).sum(1)
    assert (ends <= (batch.positions_BT == 0).sum(1)).all(), "each document's end is a label once"


def test_alignment_is_in_the_fingerprint_and_reported(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "texts", 30, 50)
    said: list[str] = []
    found = [
        prepare(make_config(tmp_path / "cache", {"a": {"path": str(path)}}, align=align), said.append)
        for align in (None, 8, 16, 16)
    ]
    assert len({corpus.fingerprint for corpus in found}) == len({corpus.directory for corpus in found}) == 3
    lines = [line for line in said if "padding" in line]
    assert len(lines) == 3 and lines[1] == lines[2], "also of a corpus from the cache"
    assert lines[1] == f"documents aligned to 16 tokens: padding {found[2].padding('a'):.1%} of a"

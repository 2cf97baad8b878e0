"""A run that was trained on the records that it should score is refused; any other run is accepted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from core.errors import ConfigError
from data.filter.input.records import Record
from data.tokens import Shard, TokenStream, TokenWriter, token_dtype
from tests.support.tiny import trainer
from train.eval.contamination import check_unseen, every, seen_by, spread


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_corpus) -> Path:
    """Return the directory of an untrained run, since only its data matter here."""
    root = tmp_path_factory.mktemp("seen")
    trainer(root, "run", small_corpus)
    return root / "run"


@pytest.fixture
def own(small_corpus) -> list[str]:
    """Return the texts of the run's first source."""
    folder = Path(small_corpus[1].partition("=")[2])
    return [path.read_text() for path in sorted(folder.glob("*.txt"))]


def records(texts: list[str]) -> list[Record]:
    return [Record(str(i), "d", "s", text) for i, text in enumerate(texts)]


def test_its_own_corpus_is_refused_and_other_text_is_not(run, own):
    with pytest.raises(ConfigError, match=r"trained on about (9\d|100)% of the records"):
        check_unseen(str(run), records([f"\n{text} " for text in own]))
    assert check_unseen(str(run), records([text + " more" for text in own])) is None


def test_few_known_records_among_many_are_a_warning(run, own):
    seen = seen_by(run)
    learnt = [text for text in own if seen.share(records([text])) > 0]
    assert 50 <= len(learnt) < 60, "held-out texts were not learnt"
    assert all(seen.share(records([text])) == 0 for text in own if text not in learnt)
    warning = check_unseen(str(run), records([*learnt[:2], *(f"{i} new" for i in range(98))]))
    assert warning is not None and "about 2.00% of the records" in warning
    with pytest.raises(ConfigError, match="about 6%"):
        check_unseen(str(run), records([*learnt[:6], *(f"{i} new" for i in range(94))]))


def test_a_sample_tells_the_share_too(run, own):
    seen = seen_by(run, size=40)
    assert 20 <= seen.sampled <= 42 < seen.documents
    assert 0.6 < seen.share(records(own)) <= 1
    assert seen.share(records([text + " more" for text in own])) == 0


def test_of_a_stranger_nothing_is_known(tmp_path):
    assert "cannot be known" in str(check_unseen(str(tmp_path), records(["a"])))


@pytest.mark.parametrize("specials", [(1, 2), (1, 1)])
def test_documents_come_back_out_of_a_stream_with_padding(tmp_path, specials):
    bos, eos = specials
    lengths = np.random.default_rng(0).integers(1, 40, 300).tolist()
    documents = [[3 + i % 200] * length for i, length in enumerate(lengths)]
    writer = TokenWriter(tmp_path, "a", token_dtype(300), shard_tokens=1000)
    for i, document in enumerate(documents):
        writer.add([eos] * (i % 3) + [bos, *document, eos])
    stream = TokenStream(tmp_path, [Shard(s.file, s.tokens, s.sha256) for s in writer.close()], token_dtype(300))
    marks = np.array(specials)
    assert [found.tolist() for found in every(stream, marks)] == documents
    some = [found.tolist() for found in spread(stream, marks, 50)]
    assert 45 <= len(some) <= 50 and all(one in documents for one in some)
    mean, size = np.mean([len(one) for one in some]), np.mean(lengths)
    assert abs(mean - size) < 5, "long documents are not drawn more often"

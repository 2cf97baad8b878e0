"""Token shards: what was written is read back, across shards. test_corpus.py has the tests of damaged shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.tokens import Shard, TokenStream, TokenWriter, token_dtype


def write(folder: Path, vocab_size: int = 300, shard_tokens: int = 64) -> tuple[np.ndarray, list[Shard]]:
    chance = np.random.default_rng(0)
    documents = [chance.integers(0, vocab_size, length).tolist() for length in (5, 0, 200, 64, 3, 1)]
    writer = TokenWriter(folder, "a", token_dtype(vocab_size), shard_tokens)
    for document in documents:
        writer.add(document)
    shards = writer.close()
    assert writer.tokens == sum(map(len, documents))
    return np.concatenate([np.array(d, np.int64) for d in documents]), shards


@pytest.mark.parametrize("vocab_size", [300, 65_536, 202_048])
@pytest.mark.parametrize("shard_tokens", [7, 64, 1000])
def test_windows_cross_shards(tmp_path, vocab_size, shard_tokens):
    written, shards = write(tmp_path, vocab_size, shard_tokens)
    stream = TokenStream(tmp_path, shards, token_dtype(vocab_size))
    assert len(stream) == len(written) == sum(shard.tokens for shard in shards)
    assert all(shard.tokens <= shard_tokens for shard in shards)
    for start, length in [(0, len(written)), (0, 1), (60, 10), (len(written) - 1, 1), (10, 0), (len(written), 0)]:
        window = stream.window(start, length)
        assert window.dtype == np.int64 and np.array_equal(window, written[start : start + length])
    for start, length in [(-1, 2), (len(written), 1), (0, len(written) + 1)]:
        with pytest.raises(IndexError, match="outside"):
            stream.window(start, length)


def test_an_id_that_does_not_fit_is_refused(tmp_path):
    """NumPy integers are refused too, since they would wrap around silently."""
    for document in ([70_000], [-1], [np.int64(70_000)], np.array([1, 70_000]), np.array([-1])):
        with pytest.raises(OverflowError, match="token id"):
            TokenWriter(tmp_path, "a", token_dtype(300)).add(document)
    TokenWriter(tmp_path, "a", token_dtype(300)).add([0, 65_535])
    assert token_dtype(65_536).itemsize == 2 and token_dtype(65_537).itemsize == 4


def test_sequences_leave_a_token_for_the_last_label(tmp_path):
    written, shards = write(tmp_path)
    stream = TokenStream(tmp_path, shards, token_dtype(300))
    for seq_len in (34, 39, len(written) - 1, len(written)):  # 39 divides the length, so the last label is missing
        count = stream.num_sequences(seq_len)
        assert count * seq_len + 1 <= len(written) < (count + 1) * seq_len + 1
    assert len(written) % 39 == 0 and TokenStream(tmp_path, [], token_dtype(300)).num_sequences(39) == 0

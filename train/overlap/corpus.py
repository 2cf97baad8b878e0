"""Stream the text of a training corpus or of files, with a limit on the tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from core.errors import ConfigError
from data.corpus import TRAIN, Corpus, find_corpus, open_corpus
from data.files import UnreadableFile, find_files
from data.filter.screen.contamination import file_texts
from train.checkpoint.index import read_progress
from train.config import TrainConfig, phases
from train.corpus import source_weights
from train.eval.contamination import text_of
from train.run_directory import RunDirectory, committed, load_config

BLOCK = 1 << 17
"""Tokens that are read at once."""
_OVERLAP = 256
"""Tokens of the next block that are read too, so that no n-gram is cut in two."""
CHARACTERS_PER_TOKEN = 4
"""By which the limit on tokens is applied to files of text."""


def trained_sources(config: TrainConfig, corpus: Corpus) -> list[str]:
    """Return the sources of a corpus with a weight in a phase of the run."""
    usual = source_weights(config, corpus)
    weights = [phase.weights or usual for phase in phases(config)]
    return [name for name in corpus.sources if any(one.get(name, 0) > 0 for one in weights)]


def blocks(corpus: Corpus, sources: Sequence[str], limit: int) -> list[tuple[str, int]]:
    """Return the source and the first token of the blocks to read: all of them if the sources have at most `limit`
    tokens in training documents, else as many as fit the limit (at least one of each source), evenly spread.
    """
    sizes = {name: len(corpus.stream(name, TRAIN)) for name in sources}
    share = min(1.0, limit / max(sum(sizes.values()), 1))
    found = []
    for name, size in sizes.items():
        count = -(-size // BLOCK)
        kept = count if share == 1 else min(count, max(1, int(count * share)))
        found += [(name, place * count // kept * BLOCK) for place in range(kept)]
    return found


def block_size(corpus: Corpus, source: str, start: int) -> int:
    """Return the number of tokens of a block."""
    return min(BLOCK, len(corpus.stream(source, TRAIN)) - start)


def block_texts(corpus: Corpus, source: str, start: int) -> Iterator[str]:
    """Yield the texts of the documents, or parts of documents, in a block."""
    stream, tokenizer = corpus.stream(source, TRAIN), corpus.tokenizer
    ids = stream.window(start, min(BLOCK + _OVERLAP, len(stream) - start))
    marks = np.flatnonzero(np.isin(ids, [tokenizer.bos_id, tokenizer.eos_id]))
    for begin, end in zip([0, *(marks + 1).tolist()], [*marks.tolist(), len(ids)], strict=True):
        if begin < end:
            yield text_of(ids[begin:end], corpus)


def run_corpus(run: Path) -> tuple[Corpus, list[str]] | None:
    """Open the corpus of a run and name the sources that it was trained on; None if its tokens are not where they were.
    Nothing is made, and hashes are not verified.
    """
    config = load_config(run)
    done = committed(RunDirectory(run, config.checkpoint.directory).checkpoints)
    wanted = read_progress(done[-1].path).get("corpus", "") if done else ""
    if config.data.tokens is not None:
        place = Path(config.data.tokens).expanduser()
        corpus = open_corpus(place) if place.is_dir() else None
    else:
        corpus = find_corpus(Path(config.data.cache), wanted)
    if corpus is None or corpus.fingerprint != wanted:
        return None
    return corpus, trained_sources(config, corpus)


def texts_of_files(pattern: str) -> Iterator[str]:
    """Yield every string in jsonl, parquet and text files. Raises `ConfigError` (key `corpus`)."""
    try:
        for _, path in find_files(pattern):
            yield from file_texts(path)
    except ConfigError as error:
        raise error.under("corpus") from None
    except UnreadableFile as error:
        raise ConfigError("corpus", pattern, f"cannot be read: {error}") from None

"""Find records that have an n-gram of words in common with an evaluation set (Brown et al. 2020, appendix C: 13 words).

A set is stored as the sorted 64-bit hashes of its n-grams of words, eight bytes each. Chance matches are rarer than one
in 10^9 lookups even for 10^10 n-grams.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError
from data.files import UnreadableFile, find_files, read_rows
from data.filter.config import ContaminationConfig
from data.filter.screen.duplicates import ngram_hashes
from data.filter.screen.normalise import words


class EvaluationSets:
    """The word n-grams of all evaluation sets. A call returns the name of the first set with an n-gram of a text.

    Every string of a set's record counts, also nested ones: the question as well as the answers. Texts of fewer than
    `words` words cannot match. Raises `ConfigError` with the key `contamination.sets.NAME` if no text of a set has so
    many words, and if a file is missing or unreadable.
    """

    def __init__(self, config: ContaminationConfig) -> None:
        self._words = config.words
        self._ngrams = {name: _ngrams(name, path, config.words) for name, path in config.sets.items()}

    def __call__(self, text: str) -> str | None:
        if not self._ngrams:
            return None
        wanted = ngram_hashes(words(text), self._words)
        return next((name for name, ngrams in self._ngrams.items() if _any_in(wanted, ngrams)), None)


def _any_in(wanted_W: NDArray[np.uint64], sorted_N: NDArray[np.uint64]) -> bool:
    return bool((sorted_N.take(np.searchsorted(sorted_N, wanted_W), mode="clip") == wanted_W).any())


def _ngrams(name: str, path: str, length: int) -> NDArray[np.uint64]:
    """Return the distinct n-gram hashes of a set, sorted."""
    key = f"contamination.sets.{name}"
    try:
        files = [file for _, file in find_files(path)]
        found = [np.unique(ngram_hashes(words(text), length)) for file in files for text in _texts(file)]
    except ConfigError as error:
        raise error.under(key) from None
    except UnreadableFile as error:
        raise ConfigError(key, path, f"cannot be read: {error}") from None
    ngrams = np.unique(np.concatenate([*found, np.empty(0, np.uint64)]))
    if not len(ngrams):
        raise ConfigError(key, path, f"has no text of {length} words, so nothing could match; lower `words`")
    return ngrams


def _texts(path: Path) -> Iterator[str]:
    for number, row in read_rows(path):
        try:
            yield from _strings(json.loads(row) if isinstance(row, bytes) else row)
        except (ValueError, RecursionError) as error:
            raise UnreadableFile(f"line {number} is not JSON ({error})") from None


def _strings(value: Any) -> Iterator[str]:
    """Yield every string in nested lists and objects, except keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)

"""Find records that have an n-gram of words in common with an evaluation set (Brown et al. 2020, appendix C: 13 words),
and questions that have one in common with training text.

A set is stored as the sorted 64-bit hashes of its n-grams of words, eight bytes each. Chance matches are rarer than one
in 10^9 lookups even for 10^10 n-grams.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
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


class QuestionSearch:
    """Finds the questions that share an n-gram of words with a text, by the method that drops records.

    `questions`: the strings of each question, by a name; any of them counts. `too_short_Q`: whether the first string,
    the question itself, has fewer than `words` words. `found_Q`: whether a text that was added has an n-gram of it.
    Both are in the order of the names.
    """

    def __init__(self, questions: Mapping[Any, Sequence[str]], words: int = ContaminationConfig.words) -> None:
        self._words = words
        parts = [[np.empty(0, np.uint64), *(self._ngrams(text) for text in texts)] for texts in questions.values()]
        ngrams = [np.unique(np.concatenate(one)) for one in parts]
        sizes = [len(one) for one in ngrams]
        self.too_short_Q = np.array([not any(map(len, one[1:2])) for one in parts], np.bool_)
        self.found_Q = np.zeros(len(sizes), np.bool_)
        every = np.concatenate([np.empty(0, np.uint64), *ngrams])
        order = np.argsort(every, kind="stable")
        self._sorted_N, self._owner_N = every[order], np.repeat(np.arange(len(sizes)), sizes)[order]

    def add(self, text: str) -> None:
        """Look for all questions in a text."""
        if not len(self._sorted_N):
            return
        here_W = np.unique(self._ngrams(text))
        first, last = (np.searchsorted(self._sorted_N, here_W, side) for side in ("left", "right"))
        for begin, end in zip(first[first < last].tolist(), last[first < last].tolist(), strict=True):
            self.found_Q[self._owner_N[begin:end]] = True

    def _ngrams(self, text: str) -> NDArray[np.uint64]:
        return ngram_hashes(words(text), self._words)


def _any_in(wanted_W: NDArray[np.uint64], sorted_N: NDArray[np.uint64]) -> bool:
    return bool((sorted_N.take(np.searchsorted(sorted_N, wanted_W), mode="clip") == wanted_W).any())


def _ngrams(name: str, path: str, length: int) -> NDArray[np.uint64]:
    """Return the distinct n-gram hashes of a set, sorted."""
    key = f"contamination.sets.{name}"
    try:
        files = [file for _, file in find_files(path)]
        found = [np.unique(ngram_hashes(words(text), length)) for file in files for text in file_texts(file)]
    except ConfigError as error:
        raise error.under(key) from None
    except UnreadableFile as error:
        raise ConfigError(key, path, f"cannot be read: {error}") from None
    ngrams = np.unique(np.concatenate([*found, np.empty(0, np.uint64)]))
    if not len(ngrams):
        raise ConfigError(key, path, f"has no text of {length} words, so nothing could match; lower `words`")
    return ngrams


def file_texts(path: Path) -> Iterator[str]:
    """Yield every string of each record of a file. Raises `UnreadableFile`."""
    for number, row in read_rows(path):
        try:
            yield from strings_of(json.loads(row) if isinstance(row, bytes) else row)
        except (ValueError, RecursionError) as error:
            raise UnreadableFile(f"line {number} is not JSON ({error})") from None


def strings_of(value: Any) -> Iterator[str]:
    """Yield every string in nested lists and objects, except keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings_of(inner)

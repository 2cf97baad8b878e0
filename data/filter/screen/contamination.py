"""Whether a record shares a passage with an evaluation set: a run of words, after normalisation, as GPT-3's authors
looked for it (Brown et al. 2020, appendix C, 13 words).

A set is kept as the sorted 64-bit hashes of its runs, eight bytes for each. Chance matches of hashes are rarer than one
in 10^9 lookups even for 10^10 runs.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError
from core.files import locate, unzipped
from data.filter.config import ContaminationConfig
from data.filter.screen.duplicates import run_hashes
from data.filter.screen.normalise import words

_SUFFIXES = [".jsonl", ".jsonl.gz", ".parquet", ".txt", ".md"]


class EvaluationSets:
    """The runs of words of all named sets, read once. Calling it with a text gives the name of the first set, in the
    configuration's order, that shares a run with it, or None.

    Every string of a record counts, in nested values too: the question as well as the answers. A text of a set with
    fewer than `words` words cannot match; a set of which that holds for all texts is refused. Raises `ConfigError` with
    the key `contamination.sets.NAME` for it and for a file that is missing or unreadable.
    """

    def __init__(self, config: ContaminationConfig) -> None:
        self._words = config.words
        self._runs = {name: _runs(name, path, config.words) for name, path in config.sets.items()}

    def __call__(self, text: str) -> str | None:
        if not self._runs:
            return None
        wanted = run_hashes(words(text), self._words)
        return next((name for name, runs in self._runs.items() if _any_in(wanted, runs)), None)


def _any_in(wanted_W: NDArray[np.uint64], sorted_R: NDArray[np.uint64]) -> bool:
    places = np.searchsorted(sorted_R, wanted_W)
    places[places == len(sorted_R)] = 0
    return bool((sorted_R[places] == wanted_W).any())


def _runs(name: str, path: str, length: int) -> NDArray[np.uint64]:
    """The distinct runs of a set, sorted."""
    key = f"contamination.sets.{name}"
    try:
        place = locate(path)
    except ConfigError as error:
        raise error.under(key) from None
    if not place.is_file():
        raise ConfigError(key, path, "no such file")
    try:
        found = [np.unique(run_hashes(words(text), length)) for text in _texts(key, place)]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, ValueError, RecursionError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(key, path, f"cannot be read: {reason}") from None
    runs = np.unique(np.concatenate([*found, np.empty(0, np.uint64)]))
    if not len(runs):
        raise ConfigError(key, path, f"has no text of {length} words, so that nothing could match; lower `words`")
    return runs


def _texts(key: str, place: Path) -> Iterator[str]:
    if place.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _json_lines(place)
    elif place.suffix == ".parquet":
        yield from _parquet(place)
    elif place.suffix in (".txt", ".md"):
        yield place.read_text(encoding="utf-8")
    else:
        raise ConfigError(key, str(place), "unknown suffix", _SUFFIXES)


def _json_lines(place: Path) -> Iterator[str]:
    with unzipped(place) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    value = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number} is not JSON ({error})") from None
                yield from _strings(value)


def _parquet(place: Path) -> Iterator[str]:
    import pyarrow.parquet

    with place.open("rb") as raw:
        for batch in pyarrow.parquet.ParquetFile(raw).iter_batches():
            for column in batch.columns:
                for value in column.to_pylist():
                    yield from _strings(value)


def _strings(value: Any) -> Iterator[str]:
    """Every string in nested lists and objects; keys are the format's, not the set's."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)

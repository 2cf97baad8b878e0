"""Say which questions are in the text that a model was trained on, and how it scores on these and on the others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.config import plain
from core.errors import ConfigError, LeviathanError, UnreadableFileError
from core.files import read_json, sha256_text, write_json
from data.corpus import Corpus
from data.filter.config import ContaminationConfig
from data.filter.screen.contamination import QuestionSearch, strings_of
from train.exam.base import Exam
from train.exam.results import IN_PART, NOT_LOOKED_FOR
from train.overlap.corpus import CHARACTERS_PER_TOKEN, block_size, block_texts, blocks, run_corpus, texts_of_files

WORDS = ContaminationConfig.words
OVERLAPS = "overlaps.json"
"""File in a run's directory with the results of searches, so that a search is not repeated."""
_VERSION = 2
"""Changes with what a search finds, so that stored results of an older one are not taken."""
_SHAPE = {str: {"found": [str], "too_short": [str], "searched_tokens": int, "corpus_tokens": (int, None)}}

Questions = Mapping[str, Sequence[str]]
"""The strings of each question, by its id. The first is the question itself, which decides whether it is too short."""


@dataclass(frozen=True)
class Overlap:
    """The ids of the questions of one examination that share an n-gram of `WORDS` words with the text, and of the
    others that have too few words to be found. `searched_tokens` of `corpus_tokens` (None: unknown) were read.
    """

    found: list[str] = field(default_factory=list)
    too_short: list[str] = field(default_factory=list)
    searched_tokens: int = 0
    corpus_tokens: int | None = None

    def beside(self, scores: Mapping[str, float | None]) -> dict[str, Any]:
        """Return what stands beside a score. `scores`: those of the questions by id, None without one."""
        found, short = set(self.found), set(self.too_short)
        of_found = [scores[one] for one in scores if one in found]
        of_clean = [scores[one] for one in scores if one not in found | short]
        return {
            "status": self.status(len(scores)),
            "words": WORDS,
            "searched_tokens": self.searched_tokens,
            "corpus_tokens": self.corpus_tokens,
            "found": len(of_found),
            "clean": len(of_clean),
            "too_short": len(scores) - len(of_found) - len(of_clean),
            "score_found": _mean(of_found),
            "score_clean": _mean(of_clean),
            "ids_found": sorted(found & scores.keys()),
        }

    def status(self, questions: int) -> str:
        if len(self.too_short) >= questions:
            return f"no question has {WORDS} words: none can be found"
        if self.corpus_tokens is None or self.searched_tokens < self.corpus_tokens:
            return IN_PART
        return "searched"


def _mean(scores: Sequence[float | None]) -> float | None:
    values = [score for score in scores if score is not None]
    return sum(values) / len(values) if values else None


def not_looked_for(why: str) -> dict[str, Any]:
    """Return what stands beside a score if no text was searched."""
    return {"status": NOT_LOOKED_FOR, "why": why}


def texts_of_exam(exam: Exam) -> dict[str, list[str]]:
    """Return the strings of each question: its own text and those of its reference."""
    return {
        one.id: [one.prompt if one.own_text is None else one.own_text, *strings_of(plain(one.reference))]
        for one in exam.questions()
    }


class Searches(QuestionSearch):
    """The questions of several examinations, looked for in one pass over the text."""

    def __init__(self, exams: Mapping[str, Questions]) -> None:
        self._ids = [(label, one) for label, questions in exams.items() for one in questions]
        super().__init__({(label, one): exams[label][one] for label, one in self._ids}, WORDS)

    @property
    def needed(self) -> bool:
        """Whether a string of a question has enough words to be found."""
        return bool(len(self._sorted_N))

    def read(self, corpus: Corpus, chosen: Sequence[tuple[str, int]]) -> None:
        """Look for the questions in blocks of a corpus, which are not read if none can be found."""
        for source, start in chosen if self.needed else ():
            for text in block_texts(corpus, source, start):
                self.add(text)

    def overlaps(self, found_Q: NDArray[np.bool_], searched: int, total: int | None) -> dict[str, Overlap]:
        """Return the result of each examination, from `found_Q` of all ranks."""
        results = {label: Overlap([], [], searched, total) for label, _ in self._ids}
        for (label, one), is_found, is_short in zip(self._ids, found_Q, self.too_short_Q, strict=True):
            if is_found:
                results[label].found.append(one)
            elif is_short:
                results[label].too_short.append(one)
        return results


def search_corpus(
    exams: Mapping[str, Questions], corpus: Corpus, sources: Sequence[str], limit: int
) -> dict[str, Overlap]:
    """Look for the questions in the training documents of a corpus, in `limit` tokens of it at most."""
    searches, chosen = Searches(exams), blocks(corpus, sources, limit)
    searches.read(corpus, chosen)
    return searches.overlaps(searches.found_Q, *sizes(corpus, sources, chosen, searches))


def sizes(
    corpus: Corpus, sources: Sequence[str], chosen: Sequence[tuple[str, int]], searches: Searches
) -> tuple[int, int]:
    """Return the number of tokens of the chosen blocks, if they need to be read, and of the corpus."""
    searched = sum(block_size(corpus, source, start) for source, start in chosen) if searches.needed else 0
    return searched, sum(block_size(corpus, source, start) for source, start in blocks(corpus, sources, 1 << 62))


def search_files(exams: Mapping[str, Questions], pattern: str, limit: int) -> dict[str, Overlap]:
    """Look for the questions in files, in the first `limit` tokens of 4 characters. Raises `ConfigError` (key
    `corpus`) for files that cannot be read, or without text.
    """
    check_files(pattern)
    searches, left, ended = Searches(exams), limit * CHARACTERS_PER_TOKEN, True
    for text in _bounded(texts_of_files(pattern), left):
        searches.add(text)
        left -= len(text)
        ended = left > 0
    searched = limit - left // CHARACTERS_PER_TOKEN
    return searches.overlaps(searches.found_Q, searched, searched if ended else None)


def check_files(pattern: str) -> None:
    """Raise `ConfigError` (key `corpus`) unless files can be read up to their first text."""
    if not any(text.strip() for text in texts_of_files(pattern)):
        raise ConfigError("corpus", pattern, "has no text in which to look for questions; name files with text")


def _bounded(texts: Iterator[str], characters: int) -> Iterator[str]:
    """Yield texts until they have this many characters in all. The last one is cut."""
    for text in texts:
        yield text[:characters]
        characters -= len(text)
        if characters <= 0:
            return


def search_for_model(
    texts: Mapping[str, Questions], model: Path, files: str | None, limit: int
) -> tuple[dict[str, Overlap], str]:
    """Look for the questions of examinations in files or, without, in the corpus of a run. Returns no results and the
    reason if there is nothing to search. Raises `ConfigError` (key `corpus`) for files that cannot be read, or without
    text.

    `model`: the directory of a run, which keeps the results, or of another model.
    """
    if not limit:
        return {}, "search_tokens=0"
    if files is not None:
        return search_files(texts, files, limit), ""
    opened, why = corpus_of(model)
    if opened is None:
        return {}, why
    corpus, sources = opened
    cache = SearchCache(model)
    keys = {label: cache.key(questions, corpus, sources, limit) for label, questions in texts.items()}
    missing = {label: texts[label] for label, key in keys.items() if cache.get(key) is None}
    if missing:
        found = search_corpus(missing, corpus, sources, limit)
        cache.put({keys[label]: one for label, one in found.items()})
    return {label: one for label, key in keys.items() if (one := cache.get(key)) is not None}, ""


def corpus_of(model: Path) -> tuple[tuple[Corpus, list[str]] | None, str]:
    """Return the training corpus of a run with its sources, or None and why there is none to search."""
    if not (model / "config.yaml").exists():
        return None, "the model is not a run: name the text that it was trained on (corpus=FILES)"
    try:
        found = run_corpus(model)
    except LeviathanError as error:
        return None, str(error)
    return found, "" if found else "the tokens of the run are not where they were: name its text (corpus=FILES)"


class SearchCache:
    """Results of earlier searches in a run's directory. A damaged file is made again."""

    def __init__(self, run: Path) -> None:
        self.path = run / OVERLAPS
        try:
            stored = read_json(self.path, _SHAPE) if self.path.exists() else {}
        except (OSError, UnreadableFileError):
            stored = {}
        self._stored = {key: Overlap(**{name: one[name] for name in asdict(Overlap())}) for key, one in stored.items()}

    @staticmethod
    def key(questions: Questions, corpus: Corpus, sources: Sequence[str], limit: int) -> str:
        """Return the name of a search: equal names have equal results."""
        what = json.dumps(questions, sort_keys=True), corpus.fingerprint, json.dumps(list(sources))
        return sha256_text(*what, str(limit), str(WORDS), str(_VERSION))[:32]

    def get(self, key: str) -> Overlap | None:
        return self._stored.get(key)

    def put(self, found: Mapping[str, Overlap]) -> None:
        """Store results, also in the file if it can be written."""
        self._stored |= found
        with suppress(OSError):
            write_json(self.path, {key: asdict(one) for key, one in self._stored.items()})


def put_beside(line: Mapping[str, Any], overlaps: Mapping[str, Overlap], why: str = "") -> None:
    """Add to each result of a suite whether its questions are in the text. `why` one is not looked for."""
    for label, result in line["exams"].items():
        scores = {one["id"]: one["score"] for one in result["answers"]}
        overlap = overlaps.get(label)
        result["contamination"] = not_looked_for(why) if overlap is None else overlap.beside(scores)

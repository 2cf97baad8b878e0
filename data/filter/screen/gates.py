"""Reject text that is not worth scoring, by statistics of the text alone.

Garbage has a very high or a very low loss. Selection by score would keep the former, and would drop the latter in place
of easy text. The gates need no statistics of any language. A loop repeats long windows (`repeated_share`). In text,
three characters occur together about ten times as often as their frequencies predict; in shuffled text, as often as
predicted (`triple_excess`, Friedman's coincidence count of 1922). Random characters change between letters, capitals,
digits and punctuation at every other position (`restless`).

Thresholds were chosen on half of the files of the standard library; the tests measure the error rates on the other
half, which had an influence once: on the choice of trigrams over bigrams. On unseen text (1,284 files of installed
packages) no clean piece of 200, 500 or 2,000 characters was rejected. The rates hold for texts of at least
`PROMISED_CHARACTERS`. In texts shorter than `_FEWEST`, only length and broken characters are checked.

The gates do not find shuffled words, letters shuffled inside each word (in half of the texts of 500 characters), a loop
in less than two thirds of a text, or shuffled tables of numbers. They reject long lists of names, DNA and base64, which
may be wanted.
"""

from __future__ import annotations

import difflib
import math
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError
from data.filter.config import GateConfig
from data.filter.input.records import Reason, Record

PROMISED_CHARACTERS = 200
"""From this length on 99% of shuffled text, random bytes and loops are rejected, and 99% of clean text is kept."""
_FEWEST = 120
_JUDGED = 1 << 20
"""Maximum number of characters to check, from the start of a text. Each takes about 30 bytes of memory."""
_WINDOW, _LONG_TEXT, _LONG_WINDOW = 16, 1000, 64
"""Window of `repeated_share` in characters, for short and long texts. Long code repeats short pieces: with 16 at every
length, 1.1% of the files of installed packages were rejected, most of them generated headers; with 64, none.
"""
_REPEATED = 0.68
_ALPHABET = 128
"""Code points are taken modulo this: ASCII does not change, and no two letters of an alphabet collide."""
_CODES = 0x40000
"""Code points from here on are private, unassigned or invisible. A table of kinds with them took 0.7 s to build."""
_BROKEN = 0.05
"""Largest fraction of control, replacement and unassigned characters. Random bytes as Latin-1 have a quarter."""
_RESTLESS = 0.58
_NO_ORDER, _LITTLE_ORDER = 0.85, 1.4
"""Bounds of `Order.of_all`: below the first, text is shuffled; below the second, `restless` decides. In 200 characters,
99% of clean text has 1.3 or more and shuffled text has 0.78 or less; in 500 characters, 1.8 or more and 0.5 or less.
"""
_LONG, _NO_ORDER_IN_DOUBT = 400, 0.5
"""The bound `_NO_ORDER_IN_DOUBT` is for text with few letters, for non-ASCII text shorter than `_LONG`, and for prompts
and answers shorter than `PROMISED_CHARACTERS`. Of the pieces of 200 characters of Hungarian, Estonian and Korean, about
4% are below 0.85 and 1% below 0.5; with 500 characters, text in 18 languages has 1.1 or more. Of pieces of 120
characters of English and of mathematics, 3% to 5% are below 0.85 and 0.6% to 2% below 0.5; with shuffled letters, 98%
and 88%. Short documents keep the first bound, since a change would change the samples of existing training runs.
"""
_MANY_PAIRS, _NO_LETTER_ORDER = 300, 0.22
"""Minimum pairs of letters to check `Order.of_letters`, and its lower bound. English has 0.43 or more, Finnish 0.25 or
more; with the letters of each word shuffled, half of the English texts have 0.14 or less.
"""
_LETTERS, _CAPITAL, _DIGIT, _SPACE, _SIGN, _NO_CHARACTER = range(6)


class Gates:
    """The gates of a configuration. A call returns why a record is rejected, or None.

    A prompt and its response are also checked separately, because a long one would hide garbage in the other. The text
    of a record with pictures may be short.
    Raises `ConfigError` if `py3langid` is missing or does not know a language.
    """

    def __init__(self, config: GateConfig) -> None:
        self.config = config
        self._kinds = _kinds_of_characters()
        self._in_language = (lambda text: True) if config.languages is None else _in_any_of(config.languages)

    def __call__(self, record: Record) -> Reason | None:
        config, text = self.config, record.text.strip()
        if not text:
            return Reason.empty
        if config.min_characters is not None and len(text) < config.min_characters and not record.pictures:
            return Reason.too_short
        if config.max_characters is not None and len(text) > config.max_characters:
            return Reason.too_long
        parts = [text]
        if record.answer_start is not None:
            parts += [record.prompt.strip(), record.answer.strip()]
        if not all(parts):
            return Reason.empty
        certain = _FEWEST if record.answer_start is None else PROMISED_CHARACTERS
        found = (self._by_characters(part[:_JUDGED], certain) for part in parts)
        reason = next((reason for reason in found if reason), None)
        return reason or (None if self._in_language(text) else Reason.language)

    def _by_characters(self, text: str, certain: int) -> Reason | None:
        config, length = self.config, len(text)
        text = " ".join(text.split())
        codes = code_points(text)
        kinds = self._kinds[np.minimum(codes, _CODES - 1)]
        if config.non_text and np.count_nonzero(kinds == _NO_CHARACTER) > _BROKEN * len(kinds):
            return Reason.non_text
        if length < _FEWEST:
            return None
        if config.repetition and (len(text) < length / 8 or repeated_share(codes) > _REPEATED):
            return Reason.repetitive
        if not (config.non_text or config.scrambled):
            return None
        order = order_of(text, kinds)
        if config.non_text and order.of_all < _LITTLE_ORDER and restless(kinds):
            return Reason.non_text
        return Reason.scrambled if config.scrambled and shuffled(text, codes, kinds, order, certain) else None


def code_points(text: str) -> NDArray[np.uint32]:
    """Return one number per character, including halves of surrogate pairs."""
    if text.isascii():
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint32)


def repeated_share(codes_N: NDArray[np.uint32]) -> float:
    """Return the fraction of windows of characters that occur earlier in the text: 1 - 1/k for k rounds of a loop."""
    window = _WINDOW if len(codes_N) < _LONG_TEXT else _LONG_WINDOW
    count = len(codes_N) - window + 1
    if count < 2:
        return 0.0
    bytes_N = np.concatenate([codes_N.astype(np.uint8), np.zeros(8, np.uint8)])
    eights_N = np.empty(len(codes_N), np.uint64)  # the eight characters from each index on, as one number
    for shift in range(8):
        places = eights_N[shift::8]
        places[:] = bytes_N[shift : shift + 8 * len(places)].view("<u8")
    mixed_W = eights_N[:count] * np.uint64(0x9E3779B97F4A7C15)
    for start in range(8, window, 8):
        mixed_W ^= mixed_W >> np.uint64(29)
        mixed_W += eights_N[start : count + start]
        mixed_W *= np.uint64(0xBF58476D1CE4E5B9)
    mixed_W.sort()
    return float(np.count_nonzero(mixed_W[1:] == mixed_W[:-1])) / count


@dataclass(frozen=True)
class Order:
    """How far the order of characters is from random, in nats: about 0 for shuffled text.

    `of_all` is for trigrams of characters; 200 characters of text have about 2.5. `of_letters` is for pairs of letters,
    and detects text in which only the letters were shuffled.
    """

    of_all: float
    of_letters: float
    letter_pairs: int


def order_of(text: str, kinds_N: NDArray[np.uint8]) -> Order:
    folded_N = code_points(text.lower())
    if len(folded_N) != len(kinds_N):  # a few capitals become two characters in lower case
        folded_N = code_points(text)
    codes_N = (folded_N % _ALPHABET).astype(np.intp)
    letters_N = kinds_N <= _CAPITAL
    both = letters_N[:-1] & letters_N[1:]
    pairs_P = (codes_N[:-1] * _ALPHABET + codes_N[1:])[both]
    return Order(math.log(triple_excess(codes_N)), math.log(pair_excess(pairs_P)), len(pairs_P))


def triple_excess(codes_N: NDArray[np.intp]) -> float:
    """Return the number of pairs of equal trigrams, divided by the number expected for the same characters at random.

    If character a occurs c_a times in N, two positions agree with probability p = sum of c_a (c_a - 1) / (N (N - 1)),
    and two trigrams with about p^3. Both numbers are increased by 2, so that a few trigrams have little effect.
    """
    count = len(codes_N)
    if count < 4:
        return 1.0
    triples_T = (codes_N[:-2] * _ALPHABET + codes_N[1:-1]) * _ALPHABET + codes_N[2:]
    triples_T.sort()
    places = np.flatnonzero(np.r_[True, triples_T[1:] != triples_T[:-1], True])
    observed = _coincidences(np.diff(places))
    agree = _coincidences(np.bincount(codes_N)) / (count * (count - 1.0))
    return (observed + 2) / ((count - 2) * (count - 3.0) * agree**3 + 2)


def pair_excess(pairs_P: NDArray[np.intp]) -> float:
    """Return the sum of c_ab (c_ab - 1), divided by its value expected at random, where pair (a, b) occurs c_ab times.

    If a is the first letter of r_a of the P pairs, and b the second letter of s_b, a term has the expectation
    r_a (r_a - 1) s_b (s_b - 1) / (P (P - 1)), without bias at any length. Both sums are increased by 2.
    """
    total = len(pairs_P)
    if total < 2:
        return 1.0
    counts_AB = np.bincount(pairs_P, minlength=_ALPHABET * _ALPHABET).reshape(_ALPHABET, _ALPHABET)
    by_chance = _coincidences(counts_AB.sum(1)) * _coincidences(counts_AB.sum(0)) / (total * (total - 1.0))
    return (_coincidences(counts_AB.ravel()) + 2) / (by_chance + 2)


def _coincidences(counts: NDArray[np.intp]) -> float:
    return float(counts @ (counts - 1))


def restless(kinds_N: NDArray[np.uint8]) -> bool:
    """Decide whether the kind of character changes as often as in random text, and words have capitals inside.

    The kind also changes as often in formulas and tables of single digits, but these have no capitals inside words.
    """
    changes = np.count_nonzero(kinds_N[1:] != kinds_N[:-1])
    rises = np.count_nonzero((kinds_N[:-1] == _LETTERS) & (kinds_N[1:] == _CAPITAL))
    return bool(changes > _RESTLESS * len(kinds_N) and rises > 0.02 * len(kinds_N))


def shuffled(text: str, codes_N: NDArray[np.uint32], kinds_N: NDArray[np.uint8], order: Order, certain: int) -> bool:
    """Decide whether the letters are in random order. Tables of numbers, even hexadecimal ones, are not checked.
    `certain`: the length from which the bound for ASCII text is `_NO_ORDER`.
    """
    letters_N = kinds_N <= _CAPITAL
    share = int(np.count_nonzero(letters_N)) / max(1, int(np.count_nonzero(kinds_N != _SPACE)))
    if share < 0.15 or np.count_nonzero(np.bincount(codes_N[letters_N] % _ALPHABET)) < 10:
        return False
    in_doubt = share < 0.45 or len(text) < (certain if text.isascii() else _LONG)
    without = order.of_all < (_NO_ORDER_IN_DOUBT if in_doubt else _NO_ORDER)
    return without or (order.letter_pairs >= _MANY_PAIRS and order.of_letters < _NO_LETTER_ORDER)


def _kinds_of_characters() -> NDArray[np.uint8]:
    """Return the kind of every code point below `_CODES`. Code points unknown to this Python are not characters."""
    first = {"L": _LETTERS, "M": _LETTERS, "N": _DIGIT, "P": _SIGN, "S": _SIGN, "Z": _SPACE, "C": _NO_CHARACTER}
    exceptions = {"Lu": _CAPITAL, "Lt": _CAPITAL, "Cf": _LETTERS}  # joiners are inside words
    kinds = {f"{a}{b}": first[a] for a in first for b in "acdefiklmnopstu"} | exceptions
    table = np.array([kinds[unicodedata.category(chr(code))] for code in range(_CODES)], np.uint8)
    table[[9, 10, 11, 12, 13]] = _SPACE
    table[0xFFFD] = _NO_CHARACTER  # decoders write it in place of invalid bytes
    return table


def _in_any_of(wanted: list[str]) -> Callable[[str], bool]:
    """Return a function that decides whether a text is in one of the languages, by its first 4,000 characters."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise ConfigError("gates.languages", wanted, "needs py3langid: pip install 'leviathan[filter]'") from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    known = sorted(identifier.labels)
    for language in wanted:
        if language not in known:
            near = difflib.get_close_matches(language.lower(), known, cutoff=0.5) or ["en"]
            reason = "py3langid does not know it; name a two-letter code (ISO 639-1)"
            raise ConfigError("gates.languages", language, reason, near)
    return lambda text: identifier.classify(text[:4000])[0] in wanted

"""Normalise text for comparison. The text of a record is never changed.

`canonical` is for exact duplicates and keeps every sign: "2 + 3" and "2 - 3" are two prompts. `words` is for passages
in common and drops punctuation and typography: quotes, dashes, mark-up and line breaks cannot hide a duplicate.
"""

from __future__ import annotations

import re
import unicodedata

_SEPARATE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese have no spaces between words: each character counts as a word."""
_SIGNS = r"\s!-/:-@\[-`{-~\u00a1-\u00bf\u2000-\u206f\u20a0-\u20cf\u2190-\u2bff\u2e00-\u2e7f\u3000-\u303f"
"""White space and punctuation by range. Not `\\W`, which includes combining marks: they are parts of words in Hindi."""
_WORDS = re.compile(f"[{_SEPARATE}]|[^{_SIGNS}{_SEPARATE}]+")
_ASCII_WORDS = re.compile("[0-9a-z]+")
"""Equal to `_WORDS` on lower-case ASCII, except for control characters, and a third faster."""


def canonical(text: str) -> str:
    """Fold case, apply NFC and make white space single spaces. Not NFKC, which would turn a superscript 2 into 2."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    return " ".join(text.lower().split()) if text.isascii() else " ".join(text.split())


def words(text: str) -> list[str]:
    """Return the words without punctuation, in NFKC (which resolves ligatures) and with case folded."""
    if text.isascii():
        return _ASCII_WORDS.findall(text.lower())
    return _WORDS.findall(unicodedata.normalize("NFKC", text).casefold())

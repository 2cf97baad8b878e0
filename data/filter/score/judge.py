"""Grade a record from 1 to 5 by a language model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from core.errors import ConfigError, UnreadableFileError
from core.files import read_text, sha256_text
from data.filter.config import RUBRICS, ScorerConfig
from data.filter.input.records import Record
from data.filter.score.endpoint import UnusableAnswer
from data.filter.score.requests import EndpointScorer, Request
from data.filter.score.scorer import Direction

SHOWN_CHARACTERS = 12_000
"""Maximum characters of a text to send: of a longer text, two thirds from its beginning and a third from its end."""
_CUT = "\n[... {count} characters left out ...]\n"
_FORM = 'Answer with exactly one JSON object, {"grade": N}, with a whole number N from 1 to 5. Nothing else.'


class JudgeScorer(EndpointScorer):
    """Grade records from 1 to 5 by a rubric, at temperature 0. A grade is one of five values, so ties are common.

    A rubric is a text with `{prompt}` where the prompt of a record goes, or `{text}` where the whole record goes. It is
    part of the key of an answer, as are the model and what is shown of the record.
    """

    name = "judge"

    def __init__(self, config: ScorerConfig, pause: Callable[[float], object] | None = None) -> None:
        """Raises `ConfigError` for a rubric that cannot be read or has no place for the record."""
        super().__init__(config, pause)
        self.rubric = rubric_text(config.rubric)
        self.of_prompt = "{prompt}" in self.rubric
        is_difficulty, what = config.rubric == "difficulty", "prompt" if self.of_prompt else "text"
        self.direction = Direction.hard if is_difficulty else Direction.quality
        self.measures = f"{config.rubric if config.rubric in RUBRICS else 'grade'} of the {what} by the judge, 1 to 5"
        self.fingerprint = sha256_text("judge", self.model, self.rubric, _FORM)

    def requests(self, record: Record) -> dict[str, Request]:
        shown = shortened(record.prompt if self.of_prompt else record.text)
        if not shown.strip():
            return {}
        content = self.rubric.replace("{prompt}" if self.of_prompt else "{text}", shown) + _FORM
        options = {"temperature": 0, "response_format": {"type": "json_object"}}
        key = sha256_text("judge", self.model, content)
        return {key: Request(content, parse_grade, len('{"grade": 3}'), _FORM, options)}

    def score_from(self, record: Record, answers: Sequence[Any]) -> float:
        if not answers:
            raise UnusableAnswer("no prompt to grade; for documents: scorer.rubric=quality")
        return float(answers[0])


def rubric_text(name: str) -> str:
    """Return a rubric of this package, or that of a file of the user's. Raises `ConfigError`."""
    own = Path(__file__).with_name("rubrics") / f"{name}.txt" if name in RUBRICS else Path(name).expanduser()
    try:
        text = read_text(own)
    except (OSError, UnreadableFileError) as error:
        raise ConfigError("rubric", name, f"cannot be read ({error})", [*RUBRICS, "FILE"]) from None
    if ("{prompt}" in text) == ("{text}" in text):
        raise ConfigError("rubric", name, "must have {prompt} or {text}, and not both, where a record is to be shown")
    return text.rstrip() + "\n\n"


def shortened(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """Keep `limit` characters of a longer text: replace its middle with a note of how many characters are left out."""
    if len(text) <= limit:
        return text
    begin, end = limit * 2 // 3, limit - limit * 2 // 3
    return text[:begin] + _CUT.format(count=len(text) - limit) + text[len(text) - end :]


def parse_grade(answer: str) -> int:
    """Return N from an answer that is exactly `{"grade": N}`, with an integer N from 1 to 5. Raises `UnusableAnswer`
    for any other answer: prose, strings, fractions and several objects are not interpreted.
    """
    try:
        pairs = json.loads(answer, object_pairs_hook=tuple)  # a dictionary would hide duplicate names
    except (ValueError, RecursionError):
        raise UnusableAnswer(f"not JSON: {answer[:80]!r}") from None
    if not isinstance(pairs, tuple) or [name for name, _ in pairs] != ["grade"]:
        raise UnusableAnswer(f'not {{"grade": N}}: {answer[:80]!r}')
    value = pairs[0][1]
    if type(value) is not int or not 1 <= value <= 5:  # True is an int to Python
        raise UnusableAnswer(f"not an integer from 1 to 5: {answer[:80]!r}")
    return value

"""How often a model fails at a record's prompt, by the word of the user's own verifier: difficulty without a proxy."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError
from core.files import sha256_file, sha256_text
from data.filter.config import ScorerConfig
from data.filter.input.records import Record
from data.filter.score.endpoint import Unusable
from data.filter.score.judge import make_asker
from data.filter.score.requests import Question
from data.filter.score.scorer import Direction

Verifier = Callable[[Record, str], Any]
"""Whether an answer to the record's prompt is right; must return a bool."""


class PassRateScorer:
    """Share of `samples` answers, drawn at temperature 1 with seeds 0, 1, ..., that the verifier rejects: 0 solved each
    time, 1 never. NaN with the reason in `reasons`, by the record's id, for a record without a prompt, with an answer
    that could not be had, or at which the verifier raised or returned no bool.

    Answers are cached by model, prompt and seed; verdicts are not, so that a mended verifier costs no question. The
    verifier is called in one thread, in the records' order.
    """

    name = "pass_rate"
    direction = Direction.hard

    def __init__(self, config: ScorerConfig, cache: Path, pause: Callable[[float], object] | None = None) -> None:
        """Raises `ConfigError` where `verifier` names no function that can be imported."""
        self.verifier, code = load_verifier(config.verifier or "")
        self.model, self.samples = config.judge or "", config.samples
        self.asker = make_asker(config, cache, pause)
        self.measures = f"share of {self.samples} answers that {config.verifier} rejects"
        self.fingerprint = sha256_text("pass_rate", self.model, str(self.samples), config.verifier or "", code)
        self.reasons: dict[str, str] = {}

    def fit(self, records: Callable[[], Iterable[Record]]) -> None:
        return  # nothing here learns

    def score(self, records: Sequence[Record]) -> NDArray[np.float64]:
        questions = {
            self._key(record, seed): Question(record.prompt, str, options={"temperature": 1, "seed": seed})
            for record in records
            if record.prompt.strip()
            for seed in range(self.samples)
        }
        answers = self.asker.answers(questions)
        scores = np.full(len(records), np.nan)
        for place, record in enumerate(records):
            try:
                if not record.prompt.strip():
                    raise Unusable("no prompt to answer")
                scores[place] = self._rejected(record, [answers[self._key(record, s)] for s in range(self.samples)])
            except Unusable as error:
                self.reasons[record.id] = str(error)
        return scores

    def _key(self, record: Record, seed: int) -> str:
        return sha256_text("answer", self.model, record.prompt, str(seed))

    def _rejected(self, record: Record, answers: list[Any]) -> float:
        """Share of these answers that are wrong. Raises `Unusable` where it cannot be told."""
        wrong = 0
        for answer in answers:
            if isinstance(answer, Unusable):
                raise answer
            try:
                right = self.verifier(record, answer)
            except Exception as error:  # somebody else's code: one record must not end the run
                raise Unusable(f"the verifier raised {type(error).__name__}: {error}") from error
            if not isinstance(right, bool | np.bool_):
                raise Unusable(f"the verifier returned {type(right).__name__}, not bool")
            wrong += not right
        return wrong / len(answers)


def load_verifier(name: str) -> tuple[Verifier, str]:
    """The function that "module:function" names, and a hash of its module's file. Raises `ConfigError`."""
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        raise ConfigError("verifier", name, "is not of the form module:function", ["checks:is_right"])
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module does when it is imported
        cause = f"{type(error).__name__}: {error}"
        reason = f"cannot be imported ({cause}); its folder must be on PYTHONPATH"
        raise ConfigError("verifier", name, reason) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        legal = [f"{module_name}:{key}" for key, value in _functions(module).items()][:5]
        raise ConfigError("verifier", name, "the module has no such function", legal)
    file = getattr(module, "__file__", None)
    return function, sha256_file(Path(file)) if file and Path(file).is_file() else ""


def _functions(module: ModuleType) -> dict[str, Any]:
    own = {key: value for key, value in vars(module).items() if not key.startswith("_") and callable(value)}
    return {key: value for key, value in own.items() if getattr(value, "__module__", None) == module.__name__}

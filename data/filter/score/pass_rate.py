"""Score difficulty as the rate at which a model's answers to a record's prompt fail the user's verifier."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core.files import sha256_file, sha256_text
from core.import_path import load
from data.filter.config import ScorerConfig
from data.filter.input.records import Record
from data.filter.score.endpoint import UnusableAnswer
from data.filter.score.requests import EndpointScorer, Request
from data.filter.score.scorer import Direction

Verifier = Callable[[Record, str], Any]
"""Decides whether an answer to the record's prompt is right; must return a bool."""


class PassRateScorer(EndpointScorer):
    """Score by the fraction of `samples` answers, sampled at temperature 1 with seeds 0, 1, ..., that the verifier
    rejects: 0 if all are right, 1 if none is. NaN with the reason in `reasons` for a record without a prompt or with a
    missing answer, and if the verifier raised an exception or did not return a bool.

    Answers are cached by model, prompt and seed. Verdicts are not cached, so a correction of the verifier costs no
    request. The verifier runs in one thread, in the order of the records.
    """

    name = "pass_rate"
    direction = Direction.hard

    def __init__(self, config: ScorerConfig, pause: Callable[[float], object] | None = None) -> None:
        """Raises `ConfigError` if `verifier` cannot be imported."""
        self.verifier, code = load_verifier(config.verifier or "")
        super().__init__(config, pause)
        self.samples = config.samples
        self.measures = f"fraction of {self.samples} answers that {config.verifier} rejects"
        self.fingerprint = sha256_text("pass_rate", self.model, str(self.samples), config.verifier or "", code)

    def requests(self, record: Record) -> dict[str, Request]:
        size = len(record.answer.encode())
        seeds = range(self.samples if record.prompt.strip() else 0)
        requests = [Request(record.prompt, str, size, options={"temperature": 1, "seed": seed}) for seed in seeds]
        return {sha256_text("answer", self.model, record.prompt, str(seed)): requests[seed] for seed in seeds}

    def score_from(self, record: Record, answers: Sequence[Any]) -> float:
        if not answers:
            raise UnusableAnswer("no prompt to answer")
        wrong = 0
        for answer in answers:
            try:
                right = self.verifier(record, answer)
            except Exception as error:  # the user's code: one record must not end the run
                raise UnusableAnswer(f"the verifier raised {type(error).__name__}: {error}") from error
            if not isinstance(right, bool | np.bool_):
                raise UnusableAnswer(f"the verifier returned {type(right).__name__}, not bool")
            wrong += not right
        return wrong / len(answers)


def load_verifier(name: str) -> tuple[Verifier, str]:
    """Import "module:function". Return the function and a hash of the module's file. Raises `ConfigError`."""
    function = load(name, "verifier", "record", "answer")
    file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    return function, sha256_file(Path(file)) if file and Path(file).is_file() else ""

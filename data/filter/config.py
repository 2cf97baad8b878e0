"""What the filter does: the rules that `leviathan filter` and a run's `data.filter` share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from core.config import plain
from core.errors import ConfigError
from core.import_path import check_options


class KeepUnit(Enum):
    """What `keep` is a share of. Where score and length go together, the two differ widely."""

    documents = "documents"
    tokens = "tokens"


class OnError(Enum):
    """What becomes of a record that cannot be read or scored: in, out, or stop."""

    keep = "keep"
    drop = "drop"
    fail = "fail"


class ScorerKind(Enum):
    ngram = "ngram"
    """Loss under a byte n-gram model fitted to the other fold of the same data: seconds, no model."""
    loss = "loss"
    """Mean loss of a reference model."""
    excess = "excess"
    """Loss of one model less that of a better one: learnable, not hard."""
    ifd = "ifd"
    """Instruction-following difficulty: loss of the answer given its prompt over its loss alone."""
    judge = "judge"
    """A model behind an OpenAI-compatible endpoint says how hard it is."""
    pass_rate = "pass_rate"
    """Share of sampled answers that a verifier rejects."""
    ensemble = "ensemble"
    """Mean rank under several scorers."""
    random = "random"
    """A lot for each record: the control."""
    length = "length"
    """Bytes of the answer: the control that a scorer must beat."""


@dataclass(frozen=True)
class ScorerConfig:
    """`window`: take the mean over the hardest so many tokens in a row (bytes, for ngram) instead of all; null: all.
    `model`, `reference`: runs of ours or Hugging Face folders or names, for loss, ifd and excess (`reference` is the
    better one). `members`: of an ensemble. The rest is for `judge` (`url` is the endpoint's base, `/v1` included; the
    key is read from the environment variable `key_variable`) and `pass_rate` (`samples` answers by the same endpoint,
    checked by `verifier`, "module:function" of (record, answer) -> bool).
    """

    kind: ScorerKind | str = ScorerKind.ngram
    """A name, or the import path of a class with the interface of `data.filter.score.scorer.Scorer`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of an imported class."""
    window: int | None = None
    order: int = 5
    model: str | None = None
    reference: str | None = None
    seq_len: int = 1024
    batch_size: int = 8
    members: list[ScorerConfig] = field(default_factory=list)
    url: str | None = None
    judge: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout_s: float = 60.0
    retries: int = 5
    samples: int = 4
    verifier: str | None = None

    def __post_init__(self) -> None:
        for key in ("window", "order", "seq_len", "batch_size", "concurrency", "samples"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(key, value, "must be positive")
        if self.retries < 0:
            raise ConfigError("retries", self.retries, "must not be negative")
        if not (math.isfinite(self.timeout_s) and self.timeout_s > 0):
            raise ConfigError("timeout_s", self.timeout_s, "must be positive")
        needs: dict[ScorerKind, tuple[str, ...]] = {
            ScorerKind.loss: ("model",),
            ScorerKind.ifd: ("model",),
            ScorerKind.excess: ("model", "reference"),
            ScorerKind.judge: ("url", "judge"),
            ScorerKind.pass_rate: ("url", "judge", "verifier"),
        }
        check_options(self.kind, self.options)
        for key in () if isinstance(self.kind, str) else needs.get(self.kind, ()):
            if not getattr(self, key):
                raise ConfigError(key, None, f"the scorer {self.kind_name} needs it")
        if self.kind is ScorerKind.ensemble and len(self.members) < 2:
            raise ConfigError("members", None, "an ensemble needs two scorers or more")

    @property
    def kind_name(self) -> str:
        return self.kind if isinstance(self.kind, str) else self.kind.name

    def import_paths(self, key: str) -> dict[str, object]:
        """Return the kinds and verifiers of this scorer and its members by key."""
        found: dict[str, object] = {f"{key}.kind": self.kind, f"{key}.verifier": self.verifier}
        for place, member in enumerate(self.members):
            found |= member.import_paths(f"{key}.members[{place}]")
        return found


_WAYS = ("url", "key_variable", "concurrency", "timeout_s", "retries")
"""Where a server is and how it is asked: no score depends on it."""


@dataclass(frozen=True)
class GateConfig:
    """What is no text worth scoring, before any quantile is taken; null or false: no such gate."""

    min_characters: int | None = 20
    max_characters: int | None = None
    repetition: bool = True
    non_text: bool = True
    scrambled: bool = True
    languages: list[str] | None = None
    """ISO codes of languages to keep; null: all. Needs `py3langid` (pip install 'leviathan[filter]')."""


@dataclass(frozen=True)
class DuplicateConfig:
    """`near`: Jaccard similarity of word 5-grams from which two records are one (MinHash, Broder 1997); null: only
    exact copies after normalisation.
    """

    exact: bool = True
    near: float | None = 0.8

    def __post_init__(self) -> None:
        if self.near is not None and not 0.3 <= self.near < 1:
            raise ConfigError("near", self.near, "must lie in [0.3, 1)", [0.7, 0.8, 0.9])


@dataclass(frozen=True)
class ContaminationConfig:
    """`sets`: name -> path of an evaluation set (jsonl, parquet or text). A record that shares a run of `words` words
    with one is left out.
    """

    sets: dict[str, str] = field(default_factory=dict)
    words: int = 13

    def __post_init__(self) -> None:
        if self.words < 3:
            raise ConfigError("words", self.words, "would match everything; at least 3", [8, 13])


@dataclass(frozen=True)
class SelectConfig:
    """How records are chosen by score, in each domain by itself.

    `domains`: keep rate of single domains, in place of `keep`. `floor`: no domain is left with fewer records than this
    (or than it has). `protect`: domains that are kept whole. `revive`: share of what is kept that is drawn by lot from
    the easy part. `length_buckets`: quantiles of the length of what is scored (the answer, where there is one) inside
    which records compete; 1: one competition. `clean`: path of clean reference text; what scores above its
    `noise_quantile` is noise. null: no upper cut.
    """

    domains: dict[str, float] = field(default_factory=dict)
    floor: int = 0
    protect: list[str] = field(default_factory=list)
    revive: float = 0.0
    length_buckets: int = 8
    clean: str | None = None
    noise_quantile: float = 0.99

    def __post_init__(self) -> None:
        for name, share in self.domains.items():
            if not 0 <= share <= 1:
                raise ConfigError(f"domains.{name}", share, "must lie in [0, 1]")
        if not 0 <= self.revive < 1:
            raise ConfigError("revive", self.revive, "must lie in [0, 1)", [0.0, 0.05])
        if not 0.5 < self.noise_quantile <= 1:
            raise ConfigError("noise_quantile", self.noise_quantile, "must lie in (0.5, 1]", [0.99])
        if self.floor < 0:
            raise ConfigError("floor", self.floor, "must not be negative")
        if not 1 <= self.length_buckets <= 64:
            raise ConfigError("length_buckets", self.length_buckets, "must lie in [1, 64]", [1, 8])


@dataclass(frozen=True)
class FilterRules:
    """`keep`: share of `unit` that stays, of what passes the gates. `seed`: of ties and lots."""

    keep: float = 0.5
    unit: KeepUnit = KeepUnit.tokens
    scorer: ScorerConfig = field(default_factory=ScorerConfig)
    gates: GateConfig = field(default_factory=GateConfig)
    duplicates: DuplicateConfig = field(default_factory=DuplicateConfig)
    contamination: ContaminationConfig = field(default_factory=ContaminationConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    on_error: OnError = OnError.drop
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ConfigError("keep", self.keep, "must lie in (0, 1]", [0.5])


def deciding(rules: FilterRules) -> dict[str, Any]:
    """All that decides what is kept, as plain values: the rules without where a server is and how it is asked."""
    found: dict[str, Any] = plain(rules)
    scorers = [found["scorer"]]
    while scorers:
        scorer = scorers.pop()
        for key in _WAYS:
            del scorer[key]
        if not scorer["options"]:  # keeps the digests of the time before there were options
            del scorer["options"]
        scorers += scorer["members"]
    return found

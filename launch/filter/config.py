"""Configuration of the verb `filter`, and the command that repeats a filter."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any

from core.config import differences, plain
from core.errors import ConfigError, check_numbers
from core.overrides import quoted
from data.filter.config import FilterRules, InputConfig, OnError, ScorerConfig, ScorerKind

_OWN_DATA = """'ablate.train=["data=files","data.sources.text.path=FOLDER"]'"""
_SOURCES_OF_LABELS = ("label_key=COLUMN", "scorer.labeler={kind:judge,url:URL,judge:MODEL}", "scorer.kind=ngram")
_BARE_WORD = re.compile(r"(?!(?:null|true|false|nan|inf)$)[a-z_/.][\w./-]*", re.IGNORECASE)
_SCORER = plain(ScorerConfig())
_INPUT_KEYS = tuple(one.name for one in fields(InputConfig))


@dataclass(frozen=True)
class AblateConfig:
    seeds: int = 3
    """Seeds per arm, from 2 to 8."""
    steps: int = 200
    """Training steps of each run."""
    sequences: int = 64
    """Largest number of held-out sequences per source."""
    train: list[str] = field(default_factory=lambda: ["experiment=smoke"])
    """Overrides of `leviathan train`."""

    def __post_init__(self) -> None:
        if not 2 <= self.seeds <= 8:
            raise ConfigError("seeds", self.seeds, "must be from 2 to 8 for error bars", [3, 5])
        check_numbers(self, positive=("steps", "sequences"))


class FilterAction(Enum):
    filter = "filter"
    ablate = "ablate"
    """Compare training on the filtered corpus of `ablate.train` with training on controls, at equal tokens."""
    stream = "stream"
    """Filter JSON lines from standard input as they arrive."""


_UNNAMED = ScorerConfig(ScorerKind.auto)


@dataclass(frozen=True)
class FilterConfig(FilterRules, InputConfig):
    scorer: ScorerConfig = _UNNAMED
    out: str = "filtered"
    """Output directory. If it exists, its filter run is resumed."""
    tokenizer: str | None = None
    """Tokenizer that counts tokens: a tokenizer.json or a folder with one. null: each byte counts as a token."""
    processes: int = 1
    """Number of processes on this machine."""
    oversubscribe: bool = False
    """Allow more processes than this machine can run well."""
    explain: str | None = None
    """Id of a record. Explain what the filter run in `out` decided about it, and do nothing else."""
    run: str | None = None
    """With `explain` or `step`: the directory of a training run. The record is followed through the run's filter to the
    training steps that used it.
    """
    step: int | None = None
    """With `run`: a training step, from 0. List the pictures that were in its sequences, and do nothing else."""
    action: FilterAction = FilterAction.filter
    """`filter`, `stream` (lines of JSON from standard input), or `ablate` (train on filtered data and controls)."""
    ablate: AblateConfig = field(default_factory=AblateConfig)

    def __post_init__(self) -> None:
        FilterRules.__post_init__(self)
        if self.explain is None and self.step is None and self.action is FilterAction.filter:
            InputConfig.__post_init__(self)
        if self.images is not None and self.on_error is OnError.keep:
            reason = "would keep documents whose pictures cannot be used"
            raise ConfigError("on_error", self.on_error, reason, [OnError.drop, OnError.fail])
        if self.action is FilterAction.ablate:
            keys = (*(key for key in _INPUT_KEYS if key != "parts"), "tokenizer", "processes", "explain", "run", "step")
            self._refuse(keys, "whose data are those of leviathan train (docs/filter.md)", [_OWN_DATA])
        if self.action is FilterAction.stream:
            keys = ("input", "dataset", "subset", "split", "images", "processes", "explain", "run", "step")
            self._refuse(keys, "which reads JSON lines from standard input", ["< FILE"])
            from data.filter.select.lines import check_rules

            check_rules(self.rules())
            self.lines()
        if self.explain is None and self.step is None and not (self.prompt_key or self.messages_key):
            self.scorer.check_documents("scorer")
        if self.run is not None and self.explain is None and self.step is None:
            raise ConfigError("run", self.run, "requires the id of a record to explain", ["explain=ID"])
        if self.step is not None and (self.run is None or self.explain is not None):
            reason = "lists the pictures of a step of a run: name the run, and no record to explain"
            raise ConfigError("step", self.step, reason, ["run=RUN"])
        check_numbers(self, positive=("processes",), not_negative=("step",))
        if self.explain is None and self.step is None:
            self.rules()

    def _refuse(self, keys: Sequence[str], why: str, instead: Sequence[str]) -> None:
        """Raise `ConfigError` for the first of these keys that is set, since the action ignores it."""
        for one in fields(FilterConfig):
            if one.name in keys and (value := getattr(self, one.name)) != one.default:
                raise ConfigError(one.name, value, f"has no effect on filter {self.action.name}, {why}", instead)

    def lines(self) -> InputConfig:
        """Return the input settings for lines of standard input."""
        return InputConfig(**{**{key: getattr(self, key) for key in _INPUT_KEYS}, "input": "-"})

    def rules(self) -> FilterRules:
        return FilterRules(
            **{one.name: getattr(self, one.name) for one in fields(FilterRules)} | {"scorer": self._named()}
        )

    def _named(self) -> ScorerConfig:
        """Return the scorer with its kind. Raises `ConfigError` for prompts if nothing says how to score them."""
        if self.scorer.kind is not ScorerKind.auto:
            return self.scorer
        if not (self.prompt_key or self.messages_key):
            return replace(self.scorer, kind=ScorerKind.ngram)
        if not (self.label_key or self.scorer.labeler or self.scorer.model):
            reason = "no scorer tells hard prompts from easy without labels (docs/filter.md): name a column with labels"
            reason += " of some records, let a judge label a sample, or choose a scorer"
            raise ConfigError("scorer.kind", ScorerKind.auto, reason, _SOURCES_OF_LABELS)
        return replace(self.scorer, kind=ScorerKind.learned)


def command_of(config: FilterConfig) -> str:
    """Return the command that repeats the filter."""
    values, inputs = plain(config), ("input", "dataset")
    changed = {key: new for key, (_, new) in differences(plain(FilterConfig(input="")), values).items()}
    given = {key: values[key] for key in inputs if values[key]}
    shown = {key: value for key, value in (given | changed).items() if key in given or key not in inputs}
    # Hydra sets a key of a dictionary that is empty by default only with +
    added = ("select.domains.", "contamination.sets.", "images")
    nested = ("scorer.members", "scorer.labeler")
    shown = {key: _without_defaults(value) if key in nested else value for key, value in shown.items()}
    words = [f"{'+' if key.startswith(added) else ''}{key}={_override(value)}" for key, value in shown.items()]
    return " ".join(["leviathan filter", *map(shlex.quote, words)])


def _without_defaults(scorer: Any) -> Any:
    """Return a plain scorer, or a list of scorers, without the settings that have their defaults."""
    if isinstance(scorer, list):
        return list(map(_without_defaults, scorer))
    if scorer is None:
        return None
    settings, default = {**scorer, **{key: _without_defaults(scorer[key]) for key in ("members", "labeler")}}, _SCORER
    return {key: value for key, value in settings.items() if key == "kind" or value != default[key]}


def _override(value: Any) -> str:
    """Write a value in Hydra's override grammar."""
    if isinstance(value, list):
        return f"[{','.join(map(_override, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}: {_override(part)}" for key, part in value.items()) + "}"
    if isinstance(value, str):
        return value if _BARE_WORD.fullmatch(value) else quoted(value)
    return json.dumps(value)

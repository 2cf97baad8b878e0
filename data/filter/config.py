"""Configuration of the filter, shared by `leviathan filter` and a run's `data.filter`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any

from core.config import plain
from core.errors import ConfigError, check_numbers
from core.import_path import check_options
from data.images.config import ImagesConfig
from data.images.parts import PartsConfig

FARTHEST = 11
"""Most bits in which perceptual hashes may differ. `data.images.phash` searches at most two bits around each of four
bands.
"""

LEAST_LABELS, MOST_LABELS = 30, 5000
"""Numbers of labels to learn from. Fewer teach nothing, and the time to learn grows with their cube."""


@contextmanager
def under(key: str) -> Iterator[None]:
    """Prepend `key.` to the key of a `ConfigError` that the block raises."""
    try:
        yield
    except ConfigError as error:
        raise error.under(key) from None


RUBRICS = ("difficulty", "quality")
"""Rubrics of the judge that are in `score/rubrics`."""
ANSWERS = "~/.cache/leviathan/answers"


class KeepUnit(Enum):
    """The unit of the fraction `keep`. The choice matters most if scores correlate with length."""

    documents = "documents"
    tokens = "tokens"


class OnError(Enum):
    """Policy for a record that cannot be read or scored."""

    keep = "keep"
    drop = "drop"
    fail = "fail"


class BucketRule(Enum):
    """Whether records of a domain compete in buckets of similar length."""

    length = "length"
    domain = "domain"
    """No length buckets: all records of a domain compete with each other."""
    auto = "auto"
    """For prompts with a learned score: no length buckets in domains whose labels say that longer answers are harder
    (the lower bound of the AUC of the length exceeds 0.55).
    """


class FeatureKind(Enum):
    """The features from which the scorer `learned` predicts labels."""

    ngrams = "ngrams"
    """Words, pairs of words and figures of the text."""
    embeddings = "embeddings"
    """Those, and the mean and maximum of the input embeddings of a reference model over the tokens."""
    hidden = "hidden"
    """Those of `ngrams`, and the mean and maximum of the hidden states after the middle layer of a reference model."""


class ScorerKind(Enum):
    auto = "auto"
    """`learned` for the prompts of `leviathan filter`, which needs labels; `ngram` for all other text."""
    ngram = "ngram"
    """Improbable: loss under a byte n-gram model that is fitted to the half of the data without the record."""
    loss = "loss"
    """Improbable: mean loss of a reference model."""
    excess = "excess"
    """Loss of a model minus that of a better one. Favours text that can be learnt over text that is merely hard."""
    ifd = "ifd"
    """How little the prompt helps: loss of the answer given its prompt, divided by its loss without the prompt."""
    judge = "judge"
    """Difficulty of a prompt or quality of a text, as graded by a model behind an OpenAI-compatible endpoint."""
    pass_rate = "pass_rate"
    """One minus the pass rate: the fraction of sampled answers that a verifier rejects."""
    learned = "learned"
    """Difficulty as a linear model predicts it, learned from labels of the input (`label_key`) or of a `labeler`."""
    ensemble = "ensemble"
    """Mean of a record's ranks under several scorers."""
    random = "random"
    """A random number for each record: the control that drops at random."""
    length = "length"
    """Length of the answer in bytes: the control that a scorer must beat."""

    @property
    def traits(self) -> ScorerTraits:
        return _TRAITS[self]


@dataclass(frozen=True)
class ScorerTraits:
    path: str
    """Import path of the class, below `data.filter.score`."""
    needs: tuple[str, ...] = ()
    """Keys of `ScorerConfig` that must be set."""
    takes_window: bool = False
    reads_all_first: bool = False
    """Whether the scorer must see all records before it scores the first."""


_NGRAM = ScorerTraits("ngram:NgramScorer", takes_window=True, reads_all_first=True)
_TRAITS = {
    ScorerKind.auto: _NGRAM,
    ScorerKind.ngram: _NGRAM,
    ScorerKind.loss: ScorerTraits("losses:LossScorer", ("model",), takes_window=True),
    ScorerKind.excess: ScorerTraits("losses:ExcessScorer", ("model", "reference")),
    ScorerKind.ifd: ScorerTraits("losses:DifficultyOfFollowing", ("model",)),
    ScorerKind.judge: ScorerTraits("judge:JudgeScorer", ("url", "judge")),
    ScorerKind.pass_rate: ScorerTraits("pass_rate:PassRateScorer", ("url", "judge", "verifier")),
    ScorerKind.learned: ScorerTraits("learned:LearnedScorer", reads_all_first=True),
    ScorerKind.ensemble: ScorerTraits("ensemble:EnsembleScorer", reads_all_first=True),
    ScorerKind.random: ScorerTraits("baselines:RandomScorer"),
    ScorerKind.length: ScorerTraits("baselines:LengthScorer"),
}
"""The traits of each kind. `factory.py` builds the arguments of its class."""


@dataclass(frozen=True)
class ScorerConfig:
    kind: ScorerKind | str = ScorerKind.ngram
    """A name, or the import path of a class with the interface of `data.filter.score.scorer.Scorer`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of an imported class."""
    window: int | None = None
    """The score is the mean over the hardest `window` consecutive tokens (bytes for ngram); null: over all tokens."""
    order: int = 5
    """For ngram: length of the n-grams in bytes."""
    model: str | None = None
    """For loss, ifd and excess: the directory of a run, or a Hugging Face folder or name. For learned: the output
    directory of a filter whose learned scorer is used as it is.
    """
    reference: str | None = None
    """For excess: the better model. For learned with `features`: the model that computes them."""
    seq_len: int = 1024
    """For loss, excess and ifd: length in tokens of the windows that the model reads, or the model's own if shorter.
    For learned with hidden states: the tokens of a record that the model reads.
    """
    batch_size: int = 8
    """For loss, excess and ifd: number of windows per forward pass. Raise it until memory is full."""
    members: list[ScorerConfig] = field(default_factory=list)
    """Scorers of an ensemble."""
    labels: int = 500
    """For learned: number of records to learn from, drawn at random in each domain; from 30 to 5,000."""
    labeler: ScorerConfig | None = None
    """For learned: the scorer that grades the sample, such as judge; null: labels are those of `label_key`."""
    features: FeatureKind = FeatureKind.ngrams
    """For learned: n-grams alone, or with embeddings or hidden states of the model `reference`."""
    url: str | None = None
    """For judge and pass_rate: base URL of the endpoint, with `/v1`."""
    judge: str | None = None
    """Name of the model at the endpoint."""
    rubric: str = RUBRICS[0]
    """For judge: `difficulty` of a prompt, `quality` of a text, or a file with your rubric for grades from 1 to 5, with
    `{prompt}` or `{text}` where a record's prompt or all of its text goes.
    """
    answers: str = ANSWERS
    """For judge and pass_rate: the folder where all commands look for answers, and store them."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the endpoint's key."""
    concurrency: int = 8
    """For judge and pass_rate: number of requests sent at the same time."""
    timeout_s: float = 60.0
    """For judge and pass_rate: seconds after which an attempt without a complete answer fails."""
    retries: int = 5
    """For judge and pass_rate: number of further attempts after one failed; 0: none."""
    samples: int = 4
    """For pass_rate: number of answers to sample for each record."""
    verifier: str | None = None
    """For pass_rate: "module:function" of (record, answer) -> bool."""

    def __post_init__(self) -> None:
        positive = ("window", "order", "seq_len", "batch_size", "concurrency", "timeout_s", "samples")
        check_numbers(self, positive, not_negative=("retries",))
        check_options(self.kind, self.options)
        if isinstance(self.kind, ScorerKind):
            for key in self.kind.traits.needs:
                if not getattr(self, key):
                    raise ConfigError(key, None, f"the scorer {self.kind.name} needs it")
        if self.kind is ScorerKind.ensemble and len(self.members) < 2:
            raise ConfigError("members", None, "an ensemble needs two scorers or more")
        if not LEAST_LABELS <= self.labels <= MOST_LABELS:
            raise ConfigError("labels", self.labels, f"must lie in [{LEAST_LABELS}, {MOST_LABELS}]", [500])
        learns = self.kind in (ScorerKind.learned, ScorerKind.auto)
        if self.features is not FeatureKind.ngrams:
            if not learns:
                raise ConfigError("features", self.features, "only the scorer learned has features", ["ngrams"])
            if not self.reference:
                reason = f"features={self.features.name} needs a model: a run directory or a Hugging Face model"
                raise ConfigError("reference", None, reason)
        if self.labeler is not None:
            if self.model or not learns:
                reason = "a stored scorer" if self.model else "a scorer other than learned"
                raise ConfigError("labeler", None, f"has no effect on {reason}", ["null"])
            if self.labeler.reads_all_first:
                raise ConfigError(
                    "labeler.kind", self.labeler.kind, "cannot grade a sample alone", ["judge", "pass_rate"]
                )

    @property
    def reads_all_first(self) -> bool:
        """Whether the scorer must see all records before it scores the first."""
        is_stored = self.kind is ScorerKind.learned and self.model is not None
        return isinstance(self.kind, ScorerKind) and self.kind.traits.reads_all_first and not is_stored

    def parts(self, key: str) -> Iterator[tuple[str, ScorerConfig]]:
        """Yield this scorer, its members and its labeler, with their configuration keys."""
        yield key, self
        if self.labeler is not None:
            yield from self.labeler.parts(f"{key}.labeler")
        for place, member in enumerate(self.members):
            yield from member.parts(f"{key}.members[{place}]")

    def import_paths(self, key: str) -> dict[str, object]:
        """Return, by configuration key, the kinds and verifiers of this scorer and its members."""
        parts = list(self.parts(key))
        return {f"{k}.kind": one.kind for k, one in parts} | {f"{k}.verifier": one.verifier for k, one in parts}

    def rubric_files(self) -> list[str]:
        return [one.rubric for _, one in self.parts("") if one.rubric not in RUBRICS]

    def check_documents(self, key: str) -> None:
        """Raise `ConfigError` if the scorer or a member requires prompts, which plain documents do not have."""
        need = "requires prompts: set prompt_key and response_key, or messages_key"
        for place, one in self.parts(key):
            if one.kind is ScorerKind.judge and one.rubric == "difficulty":
                raise ConfigError(f"{place}.rubric", one.rubric, f"{need}; for plain documents", ["quality"])
            if one.kind is ScorerKind.pass_rate:
                raise ConfigError(f"{place}.kind", one.kind, need)


_CONNECTION = ("url", "key_variable", "concurrency", "timeout_s", "retries", "answers")
"""Settings on which no score depends."""
_HASHED_AS = {"seq_len": "context", "batch_size": "batch"}


@dataclass(frozen=True)
class GateConfig:
    """Gates reject garbage before it is scored. Null or false disables a gate."""

    min_characters: int | None = 20
    """Drop records with fewer characters, without whitespace at the ends. Records with pictures may have fewer."""
    max_characters: int | None = None
    """Drop records with more characters, without whitespace at the ends."""
    repetition: bool = True
    """Drop text that repeats itself or is mostly whitespace. Text below 120 characters always passes."""
    non_text: bool = True
    """Drop binary data, random characters and text with more than 5% control or replacement characters."""
    scrambled: bool = True
    """Drop text whose letters or words are in random order. Text below 120 characters always passes."""
    languages: list[str] | None = None
    """ISO codes of languages to keep; null: all. Needs `py3langid` (pip install 'leviathan[filter]')."""


@dataclass(frozen=True)
class DuplicateConfig:
    exact: bool = True
    """Drop exact duplicates, compared after normalisation."""
    near: float | None = 0.8
    """Records whose word 5-grams have at least this Jaccard similarity are near-duplicates (MinHash, Broder 1997).
    null: keep near-duplicates.
    """
    pictures: int | None = 8
    """Drop a document if each of its pictures resembles one of an earlier document: of the 64 bits of their perceptual
    hashes at most this many differ, and their colours are close. null: compare no pictures.
    """

    def __post_init__(self) -> None:
        if self.pictures is not None and not 0 <= self.pictures <= FARTHEST:
            raise ConfigError("pictures", self.pictures, f"must be from 0 to {FARTHEST}", [8])
        if self.near is not None and not 0.3 <= self.near < 1:
            raise ConfigError("near", self.near, "must lie in [0.3, 1)", [0.7, 0.8, 0.9])


@dataclass(frozen=True)
class ContaminationConfig:
    """Drop records that share an n-gram of `words` words with an evaluation set."""

    sets: dict[str, str] = field(default_factory=dict)
    """Name -> path of an evaluation set: jsonl, parquet or text files."""
    words: int = 13
    """Length of the n-gram in words. Fewer words drop more records, also by chance; at least 3."""

    def __post_init__(self) -> None:
        if self.words < 3:
            raise ConfigError("words", self.words, "would match everything; must be at least 3", [8, 13])


@dataclass(frozen=True)
class SelectConfig:
    """Selection by score, separate for each domain."""

    domains: dict[str, float] = field(default_factory=dict)
    """Domain -> fraction to keep of it, in place of `keep`."""
    floor: int = 0
    """Minimum number of records to keep of each domain. Noise and unscored records are never added to reach it."""
    protect: list[str] = field(default_factory=list)
    """Domains of which no record is dropped for its score."""
    revive: float = 0.0
    """Fraction of the kept records that is drawn at random from those that the score alone would drop as easy."""
    length_buckets: int = 8
    """Maximum number of length buckets per domain (quantiles of scored bytes). A record competes inside its bucket."""
    clean: str | None = None
    """Path of clean reference text, whose scores set the limit above which a record is noise; null: no limit."""
    noise_quantile: float = 0.99
    """The limit is this quantile of the scores of `clean`."""
    buckets: BucketRule = BucketRule.length
    """Whether `length_buckets` are used."""
    require_auc: float | None = None
    """Refuse to select unless the lower bound of the AUC of the score against labels is at least this; null: warn."""

    def __post_init__(self) -> None:
        for name, share in self.domains.items():
            if not 0 <= share <= 1:
                raise ConfigError(f"domains.{name}", share, "must lie in [0, 1]")
        if not 0 <= self.revive < 1:
            raise ConfigError("revive", self.revive, "must lie in [0, 1)", [0.0, 0.05])
        if not 0.5 < self.noise_quantile <= 1:
            raise ConfigError("noise_quantile", self.noise_quantile, "must lie in (0.5, 1]", [0.99])
        check_numbers(self, not_negative=("floor",))
        if not 1 <= self.length_buckets <= 64:
            raise ConfigError("length_buckets", self.length_buckets, "must lie in [1, 64]", [1, 8])
        if self.require_auc is not None and not 0.5 <= self.require_auc < 1:
            raise ConfigError("require_auc", self.require_auc, "must lie in [0.5, 1)", [0.55, 0.6])


@dataclass(frozen=True)
class FilterRules:
    keep: float = 0.5
    """Fraction to keep of the records that pass gates, deduplication and decontamination, counted in `unit`. Those
    without a score count too.
    """
    unit: KeepUnit = KeepUnit.tokens
    scorer: ScorerConfig = field(default_factory=ScorerConfig)
    gates: GateConfig = field(default_factory=GateConfig)
    duplicates: DuplicateConfig = field(default_factory=DuplicateConfig)
    contamination: ContaminationConfig = field(default_factory=ContaminationConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    on_error: OnError = OnError.drop
    seed: int = 0
    """Seed for breaking ties and for random draws."""

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ConfigError("keep", self.keep, "must lie in (0, 1]", [0.5])


def decisive_settings(rules: FilterRules) -> dict[str, Any]:
    """Return the settings that decide what is kept, as plain values: all rules except `_CONNECTION` of the scorers
    and `select.require_auc`.

    The order of training samples depends on their hash, so a renamed key keeps its old name here (`_HASHED_AS`), and a
    new one is omitted where it has its default.
    """
    rules = replace(rules, select=replace(rules.select, require_auc=None))
    return without_defaults({**plain(rules), "scorer": _decisive(plain(rules.scorer))})


_NEW: dict[str, dict[str, Any]] = {
    "duplicates": {"pictures": 8},
    "select": {"buckets": BucketRule.length.value, "require_auc": None},
    "scorer": {"labels": 500, "labeler": None, "features": "ngrams", "rubric": RUBRICS[0], "answers": ANSWERS},
}
"""Settings that older versions did not have, with their defaults."""


def without_defaults(rules: dict[str, Any]) -> dict[str, Any]:
    """Return plain rules without the keys that older versions did not have, where they have their defaults."""
    return rules | {group: _without_new(group, rules[group]) for group in _NEW}


def _without_new(group: str, rules: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in rules.items() if key not in _NEW[group] or value != _NEW[group][key]}
    return kept if group != "scorer" else kept | {"members": [_without_new(group, one) for one in kept["members"]]}


def _decisive(scorer: dict[str, Any]) -> dict[str, Any]:
    kept = {_HASHED_AS.get(key, key): value for key, value in scorer.items() if key not in _CONNECTION}
    if not kept["options"]:
        del kept["options"]
    if kept["labeler"]:
        kept["labeler"] = _without_new("scorer", _decisive(kept["labeler"]))
    return kept | {"members": [_decisive(member) for member in kept["members"]]}


RECORD_KEYS = (
    "text_key",
    "prompt_key",
    "response_key",
    "messages_key",
    "id_key",
    "domain_key",
    "label_key",
    "template",
)
"""Settings of an input that decide what a record is. Documents with pictures do not have them."""


@dataclass(frozen=True)
class InputConfig:
    """A record is made from `messages_key` if set, else from `prompt_key` and `response_key`, else from `text_key`.
    With `images` it is a document of text, pictures and videos, whose columns `parts` names.
    """

    input: str | None = None
    """A file, a folder or a glob pattern of jsonl (also .gz, .zst), parquet or text files."""
    dataset: str | None = None
    """Instead of `input`: a name or folder for the `datasets` library."""
    subset: str | None = None
    """For `dataset`: its configuration, such as a language; null: its default."""
    split: str = "train"
    """For `dataset`: the split to filter."""
    text_key: str = "text"
    """Column with the text."""
    prompt_key: str | None = None
    """Column with the prompt; needs `response_key`. Null: not used."""
    response_key: str | None = None
    """Column with the response; needs `prompt_key`. Null: not used."""
    messages_key: str | None = None
    """Column with a list of {"role", "content"}. The last message of the assistant is the response."""
    id_key: str | None = None
    """Column with the id; null: the id is file and line."""
    domain_key: str | None = None
    """Column with the domain; null: all records are of one domain."""
    label_key: str | None = None
    """Column with a number where a record is labelled (higher: harder), null or absent elsewhere; null: no labels."""
    template: str = "{prompt}\n\n{response}"
    """How prompt and response are joined to one text."""
    images: ImagesConfig | None = None
    """Read documents of text, pictures and videos: jsonl, parquet or WebDataset tars. null: records are text."""
    parts: PartsConfig = field(default_factory=PartsConfig)
    """With `images`: the columns of text, pictures and videos."""

    def __post_init__(self) -> None:
        if (self.input is None) == (self.dataset is None):
            raise ConfigError("input", self.input, "name a file or folder (input=...), or a data set (dataset=...)")
        for key in RECORD_KEYS[:-1]:  # an override such as label_key=true arrives as a text
            if getattr(self, key) in ("", "True", "False"):
                raise ConfigError(key, getattr(self, key), "must be the name of a column")
        if (self.prompt_key is None) != (self.response_key is None):
            raise ConfigError("response_key", self.response_key, "prompt_key and response_key go together")
        if self.prompt_key and self.messages_key:
            raise ConfigError("messages_key", self.messages_key, "set it, or prompt_key and response_key, but not both")
        if self.images is None and self.parts != PartsConfig():
            raise ConfigError("parts", None, "has no effect without pictures", ["+images={}"])
        for one in fields(InputConfig) if self.images is not None else ():
            if one.name in ("dataset", *RECORD_KEYS) and (value := getattr(self, one.name)) != one.default:
                reason = "has no effect on documents with pictures (images), whose columns are those of parts"
                raise ConfigError(one.name, value, reason)
        before, found, after = self.template.partition("{response}")
        if not found or "{prompt}" not in before or "{" in after:
            raise ConfigError("template", self.template, "needs {prompt} and, after it, {response}")

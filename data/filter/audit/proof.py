"""Hold scores against labels: does a scorer tell hard from easy records, or good from bad ones, in this input?

Labels are numbers of any scale; higher is harder (or better). In each domain, records with labels in the upper two
fifths count as hard and those in the lower two fifths as easy; equal labels stay together (`halves`). The AUC is the
probability that of a hard and an easy record of one domain and similar length the hard one has the higher score.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from core.errors import ConfigError
from data.filter.audit.separation import Estimate, Numbers, auc, length_buckets, rank_correlation, spearman
from data.filter.audit.tally import OTHER, first_of_each, rounded
from data.filter.config import BucketRule
from data.filter.score.scorer import Direction, Scorer

LABEL = "label"
ANSWER, PROMPT, WHOLE, RANDOM = "length of the answer", "length of the prompt", "length", "random"
_SAMPLE, _RESAMPLES, _BUCKETS = 10_000, 500, 8
_FIFTHS = 0.4
_ENOUGH = 20
"""Labelled records per length bucket, and at least in all, for a verdict."""
_DIFFICULT = 0.55
"""`select.buckets=auto`: length is difficulty in a domain where the lower bound of its AUC exceeds this."""
_LEARNED = "learned"


class Proof:
    """Take the labelled records shard by shard (`add`), then hold the scorers against a sample of them (`figures`)."""

    def __init__(self, scorer: Scorer, source: str) -> None:
        """`source`: where the labels are from, "input" or "scorer"."""
        self.scorer, self.source = scorer, source
        self._sample: Any = None
        self._texts: list[Any] = []
        self._records = 0

    def add(self, labels: Numbers, *tables: Any) -> None:
        """Add the records of a shard: their labels, NaN for no label, and tables with the columns exact (hash of the
        text), domain, bytes, scored_bytes, tie, score, "score:NAME" of other scorers, and reason, null for a record
        that competes.
        """
        import pyarrow

        columns = {name: table[name] for table in tables for name in table.column_names}
        table = pyarrow.table({**columns, LABEL: labels}).filter(pyarrow.array(np.isfinite(labels)))
        self._texts.append(table.select(["exact", LABEL]))
        names = ("domain", "bytes", "scored_bytes", "tie", LABEL, "score")
        others = [name for name in columns if name.startswith(OTHER)]
        table = table.filter(table["reason"].is_null()).select([*names, *others])
        self._records += len(table)
        table = table if self._sample is None else pyarrow.concat_tables([self._sample, table])
        self._sample = first_of_each(table, [], [("tie", "ascending")], _SAMPLE)

    def figures(self) -> dict[str, Any] | None:
        """Return the figures, ready for JSON; None if no record that competes has a label. The first of `scorers` is
        the score; without comparable records there are none. `lead`: the AUC of the score minus that of each length.
        """
        if not self._records:
            return None
        sample = self._sample
        label, length, size = (sample[name].to_numpy().astype(np.float64) for name in (LABEL, "scored_bytes", "bytes"))
        names, domain = np.unique(np.asarray(sample["domain"]).astype(str), return_inverse=True)
        rows = [np.flatnonzero(domain == place) for place in range(len(names))]
        hard, buckets = np.full(len(label), np.nan), np.zeros(len(label), np.int64)
        for place, mine in enumerate(rows):
            hard[mine] = halves(label[mine])
            count = int(np.clip(len(mine) // _ENOUGH, 1, _BUCKETS))
            buckets[mine] = place * _BUCKETS + length_buckets(length[mine].astype(np.int64), count)
        prompts = bool((size > length).any())
        lengths = {ANSWER: length, PROMPT: size - length} if prompts else {WHOLE: length}
        others = {name.removeprefix(OTHER): sample[name].to_numpy() for name in sample.column_names if OTHER in name}
        others = {name: found for name, found in others.items() if name not in (LABEL, WHOLE, RANDOM)}
        controls = lengths | {RANDOM: sample["tie"].to_numpy().astype(np.float64)}
        score = {self.scorer.name: sample["score"].to_numpy()}
        scores = score | others | controls | score  # a scorer may have the name of a control
        used = np.isfinite(hard)
        return {
            "scorer": self.scorer.name,
            "prompts": prompts,
            "direction": self.scorer.direction.name,
            "labels": {
                "source": self.source,
                "records": self._records,
                "sample": len(label),
                "hard": int((hard == 1).sum()),
                "easy": int((hard == 0).sum()),
                "distinct": len(np.unique(label)),
                "contradictory": self._contradictory(),
                "length": rounded(spearman(label, length) if len(names) == 1 else _inside(length, label, domain)),
            },
            "domains": {
                str(name): {"labels": len(mine), "length": _length_alone(length[mine], hard[mine])}
                for name, mine in zip(names, rows, strict=True)
            },
            **_scorers(scores, lengths, label, hard, buckets, used),
        }

    def _contradictory(self) -> int:
        """Return the number of labelled records with the text of another one that has a different label."""
        import pyarrow

        texts = pyarrow.concat_tables(self._texts).group_by("exact")
        found = texts.aggregate([(LABEL, "min"), (LABEL, "max"), (LABEL, "count")])
        differ = found[f"{LABEL}_min"].to_numpy() < found[f"{LABEL}_max"].to_numpy()
        return int(found[f"{LABEL}_count"].to_numpy()[differ].sum())


def halves(label: Numbers) -> Numbers:
    """Return 1 for hard, 0 for easy and NaN for the records between them: 4 and 5 against 1 and 2 of five equally
    frequent levels, 1 against 0 of two.

    The mid-rank of a label is the share of records with a lower one plus half of that with an equal one. Easy labels
    have mid-ranks below 0.4, hard ones above 0.6. Where most labels are equal, the lowest are easy and the highest are
    hard. Constant labels are neither.
    """
    _, place, count = np.unique(label, return_inverse=True, return_counts=True)
    middle = (np.cumsum(count) - count / 2) / max(len(label), 1)
    if len(middle) < 2:
        return np.full(len(label), np.nan)
    found = np.full(len(middle), np.nan)
    found[(middle < _FIFTHS) | (middle == middle[0])] = 0
    found[(middle > 1 - _FIFTHS) | (middle == middle[-1])] = 1
    return found[place]


def _inside(first: Numbers, second: Numbers, buckets: Any) -> float:
    return rank_correlation({"": first}, second, buckets, 0)[""].value


def _length_alone(length: Numbers, hard: Numbers) -> dict[str, Any] | None:
    """Return the AUC of the length in a whole domain; None with fewer labels than two buckets need."""
    used = np.isfinite(hard)
    if used.sum() < 2 * _ENOUGH:
        return None
    return _shown(auc({"": length[used]}, hard[used], np.zeros(used.sum(), np.int64), _RESAMPLES)[""], "auc")


def _scorers(
    scores: Mapping[str, Numbers],
    lengths: Mapping[str, Numbers],
    label: Numbers,
    hard: Numbers,
    buckets: Any,
    used: Any,
) -> dict[str, Any]:
    try:
        areas = auc({n: s[used] for n, s in scores.items()}, hard[used], buckets[used], _RESAMPLES)
    except ValueError:
        return {"buckets": 0, "scorers": [], "lead": []}
    ranks = rank_correlation(scores, label, buckets, _RESAMPLES)
    score = next(iter(scores))
    return {
        "buckets": len(np.unique(buckets[used])),
        "scorers": [
            {"name": name, **_shown(areas[name], "auc"), **_shown(ranks[name], "correlation", "correlation_")}
            for name in scores
        ],
        "lead": [{"over": name, **_shown(areas[score].minus(areas[name]), "auc")} for name in lengths],
    }


def _shown(found: Estimate, name: str, prefix: str = "") -> dict[str, Any]:
    numbers = {name: found.value, f"{prefix}low": found.low, f"{prefix}high": found.high}
    return {key: rounded(value) for key, value in numbers.items()}


def verdict(proof: dict[str, Any]) -> str:
    """Return "proven" if the lower bounds of the AUC and of its lead over every length exceed 0.5 and 0; else what it
    does not exceed, "chance" or "length"; or "unknown" with too few comparable labels.
    """
    if not proof["scorers"] or proof["labels"]["hard"] + proof["labels"]["easy"] < _ENOUGH:
        return "unknown"
    if proof["scorers"][0]["low"] <= 0.5:
        return "chance"
    return "proven" if all(lead["low"] > 0 for lead in proof["lead"]) else "length"


def by_length(rule: BucketRule, scorer: str, proof: dict[str, Any] | None, domain: str) -> bool:
    """Return whether a domain's records compete in length buckets."""
    if rule is not BucketRule.auto:
        return rule is BucketRule.length
    found = proof["domains"].get(domain, {}).get("length") if proof is not None and proof["prompts"] else None
    return scorer != _LEARNED or found is None or found["low"] <= _DIFFICULT


def check_auc(proof: dict[str, Any] | None, bar: float) -> None:
    """Raise `ConfigError` unless the lower bound of the score's AUC is at least `bar`."""
    key = "select.require_auc"
    if proof is None:
        raise ConfigError(key, bar, "no record has a label to hold the score against", ["label_key=", "null"])
    if verdict(proof) == "unknown" or proof["scorers"][0]["low"] < bar:
        reason = f"not reached by the lower bound for {proof['scorer']}: {sentence(proof)}; {advice(proof)}"
        raise ConfigError(key, bar, f"{reason}, or rerun with a lower bar; what was computed is reused")


def sentence(proof: dict[str, Any]) -> str:
    """Return the figures of all scorers in one line."""
    labels = f"{proof['labels']['records']:,} labels"
    if not proof["scorers"]:
        return f"{labels}, but no two that differ among records of one domain and similar length"
    first, *rest = proof["scorers"]
    ranks = f"rank correlation {first['correlation'] or 0:+.2f}"
    others = ", ".join(f"{one['name']} {one['auc']:.2f}" for one in rest)
    return f"AUC {_interval(first)} and {ranks} inside domain and length buckets of {labels} ({others})"


def shortcoming(proof: dict[str, Any]) -> str | None:
    """Return in one line why the score is not proven and what to do; None if it is."""
    found = verdict(proof)
    if found == "proven":
        return None
    if found == "unknown":
        return f"It is unknown whether the score tells {apart(proof)} here: {sentence(proof)}; {advice(proof)}."
    why = ""
    if found == "length":
        lead = min(proof["lead"], key=lambda one: one["low"])
        why = f" better than the {lead['over']} does (lead {_interval(lead, '+.2f')})"
    return f"The score does not tell {apart(proof)} here{why}: {sentence(proof)}; {advice(proof)}."


def apart(proof: dict[str, Any]) -> str:
    return "hard from easy" if proof["prompts"] else "high labels from low ones"


def advice(proof: dict[str, Any]) -> str:
    """Say what to do about a score that is not proven."""
    if verdict(proof) == "unknown":
        return "a few hundred labels are needed"
    if proof["scorer"] == _LEARNED:
        return f"more labels may help (scorer.labels){_needed(proof)}"
    learnt = f"let scorer.kind=learned learn from labels{_needed(proof)}"
    is_learnable = proof["direction"] == Direction.learnable.name
    return f"high scores mean learnable text, which is often easier; {learnt}" if is_learnable else learnt


def _needed(proof: dict[str, Any]) -> str:
    """Say how many labels would suffice if the figures stayed and intervals shrank with their square root."""
    first, count = proof["scorers"][0], proof["labels"]["records"]
    gaps = [(first["auc"] - 0.5, first["auc"] - first["low"])]
    gaps += [(lead["auc"], lead["auc"] - lead["low"]) for lead in proof["lead"]]
    if min(gap for gap, _ in gaps) <= 0:
        return ""
    wanted = count * max(half / gap for gap, half in gaps) ** 2
    return f"; about {float(f'{wanted:.1g}'):,.0f} labels would show what {count:,} do not" if wanted < 1e6 else ""


def _interval(found: dict[str, Any], style: str = ".2f") -> str:
    return f"{found['auc']:{style}} ({found['low']:{style}} to {found['high']:{style}})"

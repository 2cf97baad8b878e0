"""Hold scores against labels: does a scorer tell hard from easy records, or good from bad ones, in this input?

Labels are numbers of any scale; higher is harder (or better). In each domain, records with labels in the upper two
fifths count as hard and those in the lower two fifths as easy; equal labels stay together (`hard_or_easy`). The AUC is
the probability that of a hard and an easy record of one domain and similar length the hard one has the higher score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from core.errors import ConfigError, counted
from data.filter.audit.separation import (
    FOLD,
    NO_SCORES,
    OTHER,
    Buckets,
    Estimate,
    Numbers,
    auc,
    first_of_each,
    length_buckets,
    rank_correlation,
    rounded,
)
from data.filter.config import BucketRule, SelectConfig
from data.filter.input.records import LABEL
from data.filter.score.linear import FOLDS
from data.filter.score.scorer import Direction, Scorer
from data.filter.store import StageStore

ANSWER, PROMPT, WHOLE, RANDOM = "length of the answer", "length of the prompt", "length", "random"
_SAMPLE, _RESAMPLES, _FIFTHS = 10_000, 500, 0.4
_BUCKETS, _IN_BUCKET = 8, 8
"""Most length buckets of a domain, and fewest labelled records in one. Of 60 records, three buckets of 20 left length
itself an AUC of 0.67 where labels follow it (correlation 0.5); seven of 8 leave it 0.57. Intervals cover as well.
"""
_IN_BUCKET_OF_FOLDS = 20
"""The same where only records of one fold compare: with 8 there are too few pairs for a verdict."""
_ENOUGH = 20
"""Hard, and easy, records for a verdict on length alone; half of each for one on the score."""
_DIFFICULT = 0.55
"""`select.buckets=auto`: length is difficulty in a domain where the lower bound of its AUC exceeds this."""
_LEARNED = "learned"
_FAR = 10
"""Largest ratio of an extrapolated number of labels to the number there is."""

ProofOf = Callable[[], dict[str, Any] | None]
"""Returns the result of `prove` where it is needed, since it takes seconds."""


def prove(
    scorer: Scorer,
    source: str | None,
    labels: Callable[[str], Numbers],
    means: Callable[[str], Numbers],
    records: StageStore,
    screened: StageStore,
    scored: StageStore,
) -> dict[str, Any] | None:
    """Hold the scores against the labels; None if no record that competes has one. `source`: "input", for the `labels`
    of a shard (NaN for none) and their `means` over copies of a text, "scorer" for those that the scorer has from its
    grader, or None for no labels.

    The result is ready for JSON. The first of its `scorers` is the score; there are none without comparable records.
    `lead` is the AUC of the score minus that of each length.
    """
    import pyarrow.compute

    texts, sample, count = [], None, 0
    for shard in records.shards if source else ():
        scores = scored.read(shard)
        label = labels(shard) if source == "input" else scores[OTHER + LABEL].to_numpy()
        mean = means(shard) if source == "input" else label
        names = ["reason", "score", *(name for name in scores.column_names if name.startswith(OTHER))]
        parts = [scores.select(names), records.read(shard, ["domain"])]
        parts.append(screened.read(shard, ["exact", "bytes", "scored_bytes", "tie"]))
        columns = {name: table[name] for table in parts for name in table.column_names}
        table = pyarrow.table({**columns, LABEL: label})
        texts.append(table.select(["exact", LABEL]).filter(pyarrow.array(np.isfinite(label))))
        table = table.set_column(table.column_names.index(LABEL), LABEL, pyarrow.array(mean))
        table = table.filter(pyarrow.array(np.isfinite(mean))).filter(pyarrow.compute.field("reason").is_null())
        table = table.drop_columns(["exact", "reason"])
        count += len(table)
        sample = first_of_each([sample, table], [], [("tie", "ascending")], _SAMPLE)
    if not count:
        return None
    found = {"scorer": scorer.name, "direction": scorer.direction.name, **_measured(sample, scorer.name)}
    found["labels"] |= {"source": source, "records": count, "contradictory": _contradictory(texts)}
    return found


def _contradictory(texts: list[Any]) -> int:
    """Return the number of labelled records with the text of another one that has a different label."""
    import pyarrow.compute

    how = [(LABEL, "min"), (LABEL, "max"), (LABEL, "count")]
    found = pyarrow.concat_tables(texts).group_by("exact").aggregate(how)
    least, most, count = (found[f"{name}_{function}"].to_numpy() for name, function in how)
    return int(count[least < most].sum())


def _measured(sample: Any, name: str) -> dict[str, Any]:
    """Hold the score `name`, other scorers and the controls against the labels of a sample."""
    label, length, size = (sample[one].to_numpy().astype(np.float64) for one in (LABEL, "scored_bytes", "bytes"))
    names, domain = np.unique(np.asarray(sample["domain"]).astype(str), return_inverse=True)
    folds = sample[OTHER + FOLD].to_numpy().astype(np.int64) if OTHER + FOLD in sample.column_names else None
    least = _IN_BUCKET if folds is None else _IN_BUCKET_OF_FOLDS
    hard, buckets, domains = np.full(len(label), np.nan), np.zeros(len(label), np.int64), {}
    for place, one in enumerate(names):
        mine = np.flatnonzero(domain == place)
        hard[mine] = hard_or_easy(label[mine])
        count = int(np.clip(len(mine) // least, 1, _BUCKETS))
        buckets[mine] = place * _BUCKETS + length_buckets(length[mine].astype(np.int64), count)
        domains[str(one)] = {"labels": len(mine), "length": _length_alone(length[mine], hard[mine])}
    prompts = bool((size > length).any())
    lengths = {ANSWER: length, PROMPT: size - length} if prompts else {WHOLE: length}
    others = [one for one in sample.column_names if one.startswith(OTHER) and one not in NO_SCORES]
    members = {one.removeprefix(OTHER): sample[one].to_numpy() for one in others}
    members = {one: found for one, found in members.items() if one not in (WHOLE, RANDOM)}
    score = {name: sample["score"].to_numpy()}
    # a scorer may have the name of a control
    scores = score | members | lengths | {RANDOM: sample["tie"].to_numpy().astype(np.float64)} | score
    labels = {
        "sample": len(label),
        "hard": int((hard == 1).sum()),
        "easy": int((hard == 0).sum()),
        "distinct": len(np.unique(label)),
        "scales": _scales(label),
        "learned": len(label) if folds is None else int((folds < FOLDS).sum()),
        "buckets": len(np.unique(buckets)),
        "length": rounded(rank_correlation({"": length}, label, domain, 0)[""].value),
    }
    found = _scorers(scores, lengths, label, hard, buckets, folds)
    return {"prompts": prompts, "labels": labels, "domains": domains, **found}


def _scales(label: Numbers) -> list[float] | None:
    """Return the bounds of a gap in the labels if it is ten times as wide as both sides, as between labels of 1 to 5
    and of 10,000 to 50,000; None without one. Each side has a tenth of the labels or more.
    """
    ordered = np.sort(label)
    places = np.flatnonzero(np.diff(ordered) > 0)
    places = places[(places + 1 >= len(label) / 10) & (places + 1 <= len(label) * 0.9)]
    for place in places:
        below, above = ordered[place], ordered[place + 1]
        sides = below - ordered[0], ordered[-1] - above
        if min(sides) > 0 and above - below > 10 * min(sides) and above > 10 * below > 0:
            return [float(below), float(above)]
    return None


def hard_or_easy(label: Numbers) -> Numbers:
    """Return 1 for hard, 0 for easy and NaN for the records between them: 4 and 5 against 1 and 2 of five equally
    frequent levels, 1 against 0 of two.

    The mid-rank of a label is the share of records with a lower one plus half of that with an equal one. Easy labels
    have mid-ranks below 0.4, hard ones above 0.6. Where most labels are equal, the lowest are easy and the highest are
    hard. Constant labels are neither.
    """
    _, place, count = np.unique(label, return_inverse=True, return_counts=True)
    middle = (np.cumsum(count) - count / 2) / max(len(label), 1)
    found = np.full(len(middle), np.nan)
    if len(middle) > 1:
        found[(middle < _FIFTHS) | (middle == middle[0])] = 0
        found[(middle > 1 - _FIFTHS) | (middle == middle[-1])] = 1
    return found[place]


def _length_alone(length: Numbers, hard: Numbers) -> dict[str, Any] | None:
    """Return the AUC of the length in a whole domain; None with fewer than `2 * _ENOUGH` hard and easy records."""
    used = np.isfinite(hard)
    if min((hard == 0).sum(), (hard == 1).sum()) < _ENOUGH:
        return None
    return _shown(auc({"": length[used]}, hard[used], np.zeros(used.sum(), np.int64), _RESAMPLES)[""])


def _scorers(
    scores: Mapping[str, Numbers],
    lengths: Mapping[str, Numbers],
    label: Numbers,
    hard: Numbers,
    buckets: Buckets,
    folds: Buckets | None,
) -> dict[str, Any]:
    used, name = np.isfinite(hard), next(iter(scores))
    found = {one: mine[used] for one, mine in scores.items()}
    folds_used = None if folds is None else folds[used]
    try:
        areas = auc(found, hard[used], buckets[used], _RESAMPLES, folds=folds_used)
    except ValueError:
        return {"scorers": [], "lead": []}
    ranks = rank_correlation(scores, label, buckets, _RESAMPLES, folds=folds)
    return {
        "scorers": [
            {"name": one, **_shown(areas[one]), **_shown(ranks[one], "correlation", "correlation_")} for one in scores
        ],
        "lead": [{"over": one, **_shown(areas[name].minus(areas[one]))} for one in lengths],
    }


def _shown(found: Estimate, name: str = "auc", prefix: str = "") -> dict[str, Any]:
    numbers = {name: found.value, f"{prefix}low": found.low, f"{prefix}high": found.high}
    return {key: rounded(value) for key, value in numbers.items()}


def by_length(select: SelectConfig, scorer: str, proof: ProofOf, domains: list[str]) -> list[bool]:
    """Return for each domain whether its records compete in length buckets."""
    if select.buckets is not BucketRule.auto:
        return [select.buckets is BucketRule.length] * len(domains)
    found = proof() if scorer == _LEARNED else None
    return [bool(why_by_length(scorer, found, name)) for name in domains]


def why_by_length(scorer: str, proof: dict[str, Any] | None, domain: str) -> str:
    """Return why a domain has length buckets with `select.buckets=auto`, in words; "" if it has none."""
    if scorer != _LEARNED:
        return f"{scorer} did not learn from labels"
    if proof is None or domain not in proof["domains"]:
        return "no record is labelled"
    if not proof["prompts"]:
        return "records have no prompts"
    if (alone := proof["domains"][domain]["length"]) is None:
        return f"there are fewer than {2 * _ENOUGH} hard and easy labels"
    if alone["low"] <= _DIFFICULT:
        return f"the lower bound of the AUC of length is not above {_DIFFICULT}"
    return ""


def check_auc(select: SelectConfig, proof: ProofOf) -> None:
    """Raise `ConfigError` unless the lower bound of the score's AUC is at least `select.require_auc`."""
    if (bar := select.require_auc) is None:
        return
    key, found = "select.require_auc", proof()
    if found is None:
        raise ConfigError(key, bar, "no record has a label to hold the score against", ["label_key=", "null"])
    if verdict(found) == "unknown" or found["scorers"][0]["low"] < bar:
        reason = f"not reached by the lower bound for {found['scorer']}: {sentence(found)}; {advice(found, bar)}"
        raise ConfigError(key, bar, f"{reason}, or rerun with a lower bar; what was computed is reused")


def verdict(proof: dict[str, Any]) -> str:
    """Return "proven" if the lower bounds of the AUC and of its lead over every length exceed 0.5 and 0; else what it
    does not exceed, "chance" or "length"; "reversed" if its upper bound is below 0.5; or "unknown" with too few
    comparable labels.
    """
    if not proof["scorers"] or min(proof["labels"]["hard"], proof["labels"]["easy"]) < _ENOUGH // 2:
        return "unknown"
    if proof["scorers"][0]["low"] <= 0.5:
        return "reversed" if proof["scorers"][0]["high"] < 0.5 else "chance"
    return "proven" if all(lead["low"] > 0 for lead in proof["lead"]) else "length"


def contrast(proof: dict[str, Any]) -> str:
    return "hard from easy" if proof["prompts"] else "high labels from low ones"


def sentence(proof: dict[str, Any]) -> str:
    """Return the figures of the scorers but for the random control in one line."""
    labels = counted(proof["labels"]["records"], "label")
    if not proof["scorers"]:
        return f"{labels}, but no two that differ among records of one domain and similar length"
    first, *rest = proof["scorers"]
    ranks = f"rank correlation {first['correlation'] or 0:+.2f}"
    others = ", ".join(f"{one['name']} {one['auc']:.2f}" for one in rest if one["name"] != RANDOM)
    where = f"in {counted(proof['labels']['buckets'], 'bucket')} by domain and length of {labels}"
    return f"AUC {_interval(first)} and {ranks} {where}" + (f" ({others})" if others else "")


def shortcoming(proof: dict[str, Any]) -> Iterator[str]:
    """Yield, in one line, why the score is not proven and what to do; nothing if it is."""
    claim = {
        "unknown": "It is unknown whether the score tells {} here",
        "chance": "The score is not shown to tell {} here",
        "reversed": "The score tells {} the wrong way round here",
        "length": "The score is not shown to tell {} here better than the {over} does (lead {lead})",
    }.get(verdict(proof))
    if claim:
        least = min(proof["lead"], key=lambda one: one["low"], default={"over": "", "auc": 0, "low": 0, "high": 0})
        words = {"over": least["over"], "lead": _interval(least, "+.2f")}
        yield f"{claim.format(contrast(proof), **words)}: {sentence(proof)}; {advice(proof)}."


def advice(proof: dict[str, Any], bar: float | None = None) -> str:
    """Say what to do about a score that is not proven, or whose lower bound is below `bar`, and how many labels would
    do if the figures stayed: intervals shrink with the square root of their number.
    """
    found, labels = verdict(proof), proof["labels"]
    if found == "unknown":
        return "a few hundred labels are needed" if proof["scorers"] else "labels that differ are needed"
    if (
        bar is None
        and found == "length"
        and any(one["length"] is not None and one["length"]["low"] > _DIFFICULT for one in proof["domains"].values())
    ):
        return "the labels say that length is difficulty: try select.buckets=auto"
    if proof["scorer"] == _LEARNED:
        if labels["source"] != "input":
            do = "raise scorer.labels"
        elif labels["learned"] < labels["records"]:
            do = f"learn from all labels (scorer.labels={labels['records']})"
        else:
            do = "label more records of this input and learn from them"
    else:
        do = "let scorer.kind=learned learn from labels"
        if proof["direction"] == Direction.learnable.name:
            do = f"high scores mean learnable text, which is often easier; {do}"
        elif found == "reversed":
            do = f"check that higher labels mean {'harder' if proof['prompts'] else 'better'}, or {do}"
    first = proof["scorers"][0]
    gaps = [(first["auc"] - (bar or 0.5), first["auc"] - first["low"])]
    gaps += [(one["auc"], one["auc"] - one["low"]) for one in proof["lead"] if bar is None]
    wanted = labels["sample"] * max(half / gap if gap > 0 else np.inf for gap, half in gaps) ** 2
    wanted = float(f"{wanted:.1g}")
    near = labels["records"] < wanted <= _FAR * labels["records"]
    return f"{do}; about {wanted:,.0f} labels would show it" if near else do


def _interval(found: dict[str, Any], style: str = ".2f") -> str:
    return f"{found['auc']:{style}} ({found['low']:{style}} to {found['high']:{style}})"

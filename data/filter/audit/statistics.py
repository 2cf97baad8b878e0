"""What a filter did, in figures: what went and why, what stays, and what someone should look at.

`Audit` takes the shards of the selection one at a time, in any order, and its figures are the same bytes for the same
decisions. It trusts nobody: rows are counted against what was read, and reasons must add up to the input.

Exact: all counts of documents, tokens and bytes. To 3e-5 of their size: histograms, means and quantiles of scores.
From a sample of 50,000 records by lot: correlations, and the picture of score against length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.config import plain
from core.errors import DataError
from data.filter.audit.findings import warnings
from data.filter.audit.tally import (
    Floats,
    Integers,
    Tally,
    counts,
    first_of_each,
    key_of,
    quantile,
    rounded,
    spearman,
    value_of,
)
from data.filter.config import FilterRules
from data.filter.input.records import Reason
from data.filter.score.scorer import Direction

FORMAT = 1
SHOWN_DOMAINS = 12
"""Domains with a histogram and samples of their own: those with the most tokens."""
OTHER = "score:"
"""What columns with the scores of other scorers are called, before the scorer's name."""
COMPETED = (Reason.hard, Reason.revived, Reason.protected, Reason.easy, Reason.noise, Reason.unscored)
"""What becomes of a record that has passed the gates; `keep` is a share of these."""

_SAMPLE, _SIDE, _EXAMPLES, _CHARACTERS = 50_000, 10, 5, 300
_BINS, _LENGTH_BINS, _SCORE_BINS = 40, 28, 24
_FEW = 30  # records in a length bucket under which a correlation says nothing
_OUTER = 0.0005  # share of scores at either end that the pictures do not make room for
_BY_LOT = (("tie", "ascending"), ("id", "ascending"), ("source", "ascending"))
_SIZES = {"documents": "sum", "tokens": "sum", "bytes": "sum"}
_COLUMNS = {
    "id": "string",
    "domain": "string",
    "source": "string",
    "score": "float64",
    "tokens": "int64",
    "bytes": "int64",
    "scored_bytes": "int64",
    "tie": "uint64",
    "bucket": "int32",
    "kept": "bool",
    "reason": "string",
    "detail": "string",
}

TextOf = Callable[[str, int], str]
"""A record's text, by shard and row; nothing where it has none."""


@dataclass(frozen=True)
class ScorerInfo:
    """What the audit says of the scorer; see `Scorer`."""

    name: str
    measures: str
    direction: Direction
    fingerprint: str


class Audit:
    """Takes every shard once (`add`), then gives the figures (`finish`)."""

    def __init__(
        self,
        rules: FilterRules,
        scorer: ScorerInfo,
        shards: Mapping[str, int],
        thresholds: Mapping[str, Any],
        input: str,
        tokens: int | None = None,
        parameters: int | None = None,
    ) -> None:
        """`shards`: rows of each as they were read, against which rows are counted. `thresholds`: of the selection
        (`Decision.thresholds`). `input`: its name, for people. `tokens`: of the whole input, where the reader counted
        them. `parameters`: of the model to be trained, for advice.
        """
        self.rules, self.scorer, self.shards, self.thresholds = rules, scorer, shards, thresholds
        self.input, self.tokens, self.parameters = input, tokens, parameters
        self._added: set[str] = set()
        spread = {"longest": "max", "least": "min", "most": "max", "scored": "sum"}
        self._counts = Tally(["domain", "reason"], _SIZES | spread)
        self._scores = Tally(["domain", "kept", "score_key"], {"documents": "sum"})
        self._lengths = Tally(["length_key", "kept"], _SIZES)
        self._sample: Any = None
        self._edges: Any = None
        self._examples: Any = None

    def add(self, shard: str, table: Any) -> None:
        """One shard of the selection, a `pyarrow.Table`. Raises `DataError` where it cannot be right."""
        from pyarrow import compute

        self._check(shard, table)
        self._added.add(shard)
        table = _prepared(shard, table)
        self._counts.add(table)
        self._examples = _joined(self._examples, table, ["reason"], _BY_LOT, _EXAMPLES)
        competed = table.filter(compute.is_in(table["reason"], _strings(reason.name for reason in COMPETED)))
        self._lengths.add(competed)
        scored = competed.filter(compute.is_valid(competed["score"]))
        self._scores.add(scored)
        self._sample = _joined(self._sample, scored, [], _BY_LOT, _SAMPLE)
        by_score = scored.filter(compute.is_in(scored["reason"], _strings(("hard", "easy"))))
        # the lowest scores of what was kept, the highest of what was not
        inward = np.where(np.asarray(by_score["kept"]), 1.0, -1.0) * np.asarray(by_score["score"])
        by_score = by_score.append_column("inward", _array(inward))
        groups, order = ["domain", "bucket", "kept"], (("inward", "ascending"), *_BY_LOT)
        self._edges = _joined(self._edges, by_score, groups, order, _SIDE)

    def finish(self, text_of: TextOf) -> dict[str, Any]:
        """The figures, ready for JSON. Raises `DataError` where they do not add up to the input."""
        missing = sorted(set(self.shards) - self._added)
        if missing:
            raise DataError(f"audit: {len(missing)} shards are missing, {missing[0]} among them")
        rows = self._counts.rows()
        total, reasons = _sizes(rows), _by_reason(rows)
        domains = {name: self._domain(found) for name, found in _grouped(rows, "domain").items()}
        _check_sums(total, reasons, domains, sum(self.shards.values()), self.tokens)
        for found in domains.values():
            found["share_before"] = _share(found["in"]["tokens"], total["tokens"])
        kept = _sizes(row for row in rows if Reason[row["reason"]].kept)
        for found in domains.values():
            found["share_after"] = _share(found["kept"]["tokens"], kept["tokens"])
        shown = sorted(domains, key=lambda name: (-domains[name]["in"]["tokens"], name))[:SHOWN_DOMAINS]
        competed = _sizes(row for row in rows if Reason[row["reason"]] in COMPETED)
        audit: dict[str, Any] = {
            "format": FORMAT,
            "input": self.input,
            "scorer": plain(self.scorer),
            "parameters": self.parameters,
            "totals": {"in": total, "competed": competed, "kept": kept},
            "warnings": [],
            "reasons": reasons,
            "domains": domains,
            "scores": _histograms(self._scores, shown),
            "length": _length_figures(self._sample, "scored_bytes") | {"picture": _score_by_length(self._sample)},
            "whole_length": _length_figures(self._sample, "bytes"),
            "agreement": _agreement(self._sample, self.scorer.name),
            "lot": self._lot(domains, competed, kept),
            "thresholds": self.thresholds,
            "rules": plain(self.rules),
            **self._records(shown, text_of),
        }
        audit["warnings"] = warnings(audit)
        return audit

    def _check(self, shard: str, table: Any) -> None:
        expected = self.shards.get(shard)
        if expected is None or shard in self._added:
            raise DataError(f"audit: the shard {shard!r} is {'unknown' if expected is None else 'there twice'}")
        if table.num_rows != expected:
            raise DataError(f"audit: {shard} has {table.num_rows:,} decisions for {expected:,} records that were read")
        pairs = zip(table["reason"].to_pylist(), table["kept"].to_pylist(), strict=True)
        for reason, kept in sorted(set(pairs), key=str):
            if reason not in Reason.__members__ or Reason[reason].kept != kept:
                raise DataError(f"audit: {shard} has a record with reason={reason} and kept={kept}")

    def _domain(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        name, select = rows[0]["domain"], self.rules.select
        competed = [row for row in rows if Reason[row["reason"]] in COMPETED]
        found = [row for row in competed if row["least"] is not None]
        return {
            "in": _sizes(rows),
            "competed": _sizes(competed),
            "kept": _sizes(row for row in rows if Reason[row["reason"]].kept),
            "target": 1.0 if name in select.protect else select.domains.get(name, self.rules.keep),
            "longest": max((row["longest"] for row in competed), default=0),
            "scored": sum(row["scored"] for row in competed),
            "least_score": rounded(min((row["least"] for row in found), default=None)),
            "most_score": rounded(max((row["most"] for row in found), default=None)),
            "constant": bool(found) and min(row["least"] for row in found) == max(row["most"] for row in found),
            "reasons": {reason: size for reason, size in _by_reason(rows).items() if size["documents"]},
        }

    def _lot(self, domains: dict[str, Any], competed: dict[str, int], kept: dict[str, int]) -> dict[str, Any]:
        """What a lot at the same rate would have kept of each group, which is the same share of all, against what
        was kept.
        """
        unit = self.rules.unit.name
        shares = {name: _share(found["kept"][unit], found["competed"][unit]) for name, found in domains.items()}
        return {
            "unit": unit,
            "rate": _share(kept[unit], competed[unit]),
            "domains": {name: share for name, share in shares.items() if domains[name]["competed"]["documents"]},
            "lengths": _length_quarters(self._lengths, unit),
            "mean_score": _mean_scores(self._scores),
        }

    def _records(self, shown: list[str], text_of: TextOf) -> dict[str, Any]:
        """Samples on either side of the thresholds, and examples of every reason, with their texts."""
        samples = {name: self._beside_threshold(name) for name in shown}
        examples = _grouped(self._examples.to_pylist() if self._examples else [], "reason")
        examples = {reason.name: examples[reason.name] for reason in Reason if reason.name in examples}
        lists = [rows for sides in samples.values() for rows in sides.values()] + list(examples.values())
        # in the order of the shards, so that one that is open serves all its records
        places = sorted({(row["shard"], row["row"]) for rows in lists for row in rows})
        texts = {place: _beginning(text_of(*place)) for place in places}
        for rows in lists:
            rows[:] = [_shown(row, texts[row["shard"], row["row"]]) for row in rows]
        return {"samples": samples, "examples": examples}

    def _beside_threshold(self, domain: str) -> dict[str, list[dict[str, Any]]]:
        """The records of a domain with the closest scores to the threshold of their bucket, kept and not."""
        from pyarrow import compute

        if self._edges is None:
            return {"kept": [], "dropped": []}
        rows = self._edges.filter(compute.equal(self._edges["domain"], domain)).to_pylist()
        given = self.thresholds.get("domains", {}).get(domain, {}).get("buckets", [])
        for bucket, found in _grouped(rows, "bucket").items():
            place = max(bucket, 0)
            threshold = given[place]["score"] if place < len(given) else None
            if threshold is None:  # the selection does not say: the lowest that was kept
                threshold = min((row["score"] for row in found if row["kept"]), default=None)
            for row in found:
                row["threshold"] = threshold
                row["distance"] = np.inf if threshold is None else abs(row["score"] - threshold)
        rows.sort(key=lambda row: (row["distance"], row["tie"], row["id"], row["source"]))
        return {
            "kept": [row for row in rows if row["kept"]][:_SIDE],
            "dropped": [row for row in rows if not row["kept"]][:_SIDE],
        }


def _prepared(shard: str, table: Any) -> Any:
    """The columns of a shard with their types, and what the figures need besides. No score is null, not NaN."""
    import pyarrow
    from pyarrow import compute

    others = [name for name in table.column_names if name.startswith(OTHER)]
    types = {name: pyarrow.type_for_alias(kind) for name, kind in _COLUMNS.items()}
    fields = types | {name: pyarrow.float64() for name in others}
    if "why" in table.column_names:  # there is no score
        fields["why"] = pyarrow.string()
    table = table.select(list(fields)).cast(pyarrow.schema(list(fields.items())))
    columns = {name: table[name] for name in fields}
    for name in ("id", "domain", "source"):  # a record that could not be read may have none
        columns[name] = compute.fill_null(columns[name], "")
    for name in ("score", *others):
        score = columns[name].to_numpy()
        columns[name] = pyarrow.array(score, mask=~np.isfinite(score))
    score, rows = table["score"].to_numpy(), np.arange(len(table))
    scored = np.isfinite(score)
    return pyarrow.table(
        columns
        | {
            "documents": np.ones(len(table), np.int64),
            "scored": scored.astype(np.int64),
            "least": columns["score"],
            "most": columns["score"],
            "longest": columns["tokens"],
            "score_key": pyarrow.array(key_of(np.where(scored, score, 0.0)), mask=~scored),
            "length_key": key_of(table["scored_bytes"].to_numpy().astype(np.float64)),
            "shard": pyarrow.array([shard] * len(table), pyarrow.string()),
            "row": rows,
        }
    )


def _joined(before: Any, table: Any, groups: list[str], order: Any, count: int) -> Any:
    import pyarrow

    tables = [table] if before is None else [before, table]
    return first_of_each(pyarrow.concat_tables(tables, promote_options="default"), groups, order, count)


def _strings(names: Any) -> Any:
    import pyarrow

    return pyarrow.array(list(names), pyarrow.string())


def _array(values: Floats) -> Any:
    import pyarrow

    return pyarrow.array(values)


def _sizes(rows: Any) -> dict[str, int]:
    rows = list(rows)
    return {name: sum(row[name] for row in rows) for name in _SIZES}


def _by_reason(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    return {reason.name: _sizes(row for row in rows if row["reason"] == reason.name) for reason in Reason}


def _grouped(rows: list[dict[str, Any]], key: str) -> dict[Any, list[dict[str, Any]]]:
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def _share(part: int, whole: int) -> float | None:
    return rounded(part / whole) if whole else None


def _check_sums(
    total: dict[str, int],
    reasons: dict[str, dict[str, int]],
    domains: dict[str, Any],
    documents: int,
    tokens: int | None,
) -> None:
    """Raises `DataError` where reasons or domains do not add up to what was read."""
    expected = {"documents": documents, "tokens": total["tokens"] if tokens is None else tokens}
    found = {"the reasons": reasons.values(), "the domains": [domain["in"] for domain in domains.values()]}
    for what, sizes in found.items():
        for unit, whole in expected.items():
            added = sum(size[unit] for size in sizes)
            if added != whole:
                raise DataError(f"audit: {what} add up to {added:,} {unit}, and {whole:,} were read")


def _histograms(tally: Tally, shown: list[str]) -> dict[str, Any]:
    """Documents by score, with the kept ones apart, over all and for the shown domains, on the same edges."""
    from pyarrow import compute

    if tally.table is None or not tally.table.num_rows:
        return {"edges": [], "overall": None, "domains": {}}
    _, values, documents = _of_scores(tally.table)
    order = np.argsort(values)
    edges = _score_edges(values[order], documents[order], _BINS)

    def histogram(table: Any) -> dict[str, Any]:
        kept, values, documents = _of_scores(table)
        order = np.argsort(values)
        return {
            "documents": counts(values, documents, edges).tolist(),
            "kept": counts(values[kept], documents[kept], edges).tolist(),
            "median": rounded(quantile(values[order], documents[order], 0.5)),
        }

    parts = {name: tally.table.filter(compute.equal(tally.table["domain"], name)) for name in shown}
    return {
        "edges": [rounded(float(edge)) for edge in edges],
        "overall": histogram(tally.table),
        "domains": {name: histogram(part) for name, part in parts.items() if part.num_rows},
    }


def _of_scores(table: Any) -> tuple[Any, Floats, Integers]:
    """Whether kept, score and documents of each row of the tally of scores."""
    return np.asarray(table["kept"]), value_of(table["score_key"].to_numpy()), table["documents"].to_numpy()


def _score_edges(values: Floats, weights: Integers, bins: int) -> Floats:
    low, high = quantile(values, weights, _OUTER), quantile(values, weights, 1 - _OUTER)
    if high <= low:
        room = max(0.5, abs(low) * 0.01)
        low, high = low - room, high + room
    return np.linspace(low, high, bins + 1)


def _mean_scores(tally: Tally) -> dict[str, float | None]:
    """Of all records that competed, which is what a lot would have kept, and of those that were kept."""
    if tally.table is None or not tally.table.num_rows:
        return {"lot": None, "kept": None}
    table = tally.sorted()
    kept, values, documents = _of_scores(table)

    def mean(mask: Any) -> float | None:
        weights = documents[mask].sum()
        return rounded(float((values[mask] * documents[mask]).sum() / weights)) if weights else None

    return {"lot": mean(np.ones(len(kept), bool)), "kept": mean(kept)}


def _length_quarters(tally: Tally, unit: str) -> list[dict[str, Any]]:
    """Quarters of the documents that competed, by length: from and to how many scored bytes, and the share that was
    kept.
    """
    if tally.table is None or not tally.table.num_rows:
        return []
    table = tally.sorted()
    length, documents = value_of(table["length_key"].to_numpy()), table["documents"].to_numpy()
    kept, sizes = np.asarray(table["kept"]), table[unit].to_numpy()
    limits = [quantile(length, documents, share) for share in (0.25, 0.5, 0.75)]
    quarter = np.searchsorted(limits, length, "left")
    return [
        {
            "from_bytes": int(length[mask].min()),
            "to_bytes": int(length[mask].max()),
            "documents": int(documents[mask].sum()),
            "kept": _share(int(sizes[mask & kept].sum()), int(sizes[mask].sum())),
        }
        for mask in (quarter == place for place in range(4))
        if mask.any()
    ]


def _length_figures(sample: Any, column: str) -> dict[str, Any]:
    """Correlation of score and this length in the sample, over all and inside the buckets in which records compete."""
    if sample is None or not sample.num_rows:
        return {"records": 0, "overall": None, "inside_buckets": None, "domains": {}}
    score, length = sample["score"].to_numpy(), sample[column].to_numpy().astype(np.float64)
    domain, bucket = np.asarray(sample["domain"]).astype(str), sample["bucket"].to_numpy()
    domains, weighted = {}, []
    for name in np.unique(domain):
        inside = []
        for place in np.unique(bucket[(domain == name)]):
            mask = (domain == name) & (bucket == place)
            found = spearman(score[mask], length[mask]) if mask.sum() >= _FEW else None
            if found is not None and place >= 0:
                inside.append((found, int(mask.sum())))
        weighted += inside
        mask = domain == name
        domains[str(name)] = {
            "records": int(mask.sum()),
            "overall": rounded(spearman(score[mask], length[mask])),
            "inside_buckets": _weighted_mean(inside),
        }
    return {
        "records": len(score),
        "overall": rounded(spearman(score, length)),
        "inside_buckets": _weighted_mean(weighted),
        "domains": domains,
    }


def _weighted_mean(found: list[tuple[float, int]]) -> float | None:
    weights = sum(weight for _, weight in found)
    return rounded(sum(value * weight for value, weight in found) / weights) if weights else None


def _score_by_length(sample: Any) -> dict[str, Any] | None:
    """Records and kept records [score, length] of the sample; length in equal steps of its logarithm."""
    if sample is None or not sample.num_rows:
        return None
    score, length = sample["score"].to_numpy(), sample["scored_bytes"].to_numpy().astype(np.float64)
    score_edges = _score_edges(np.sort(score), np.ones(len(score), np.int64), _SCORE_BINS)
    size = np.log2(np.maximum(length, 1))
    low, high = np.floor(size.min()), np.ceil(size.max())
    size_edges = np.linspace(low, max(high, low + 1), _LENGTH_BINS + 1)

    def grid(mask: Any) -> list[list[int]]:
        row = np.clip(np.searchsorted(score_edges, score[mask], "right") - 1, 0, _SCORE_BINS - 1)
        column = np.clip(np.searchsorted(size_edges, size[mask], "right") - 1, 0, _LENGTH_BINS - 1)
        cells = np.bincount(row * _LENGTH_BINS + column, minlength=_SCORE_BINS * _LENGTH_BINS)
        found: list[list[int]] = cells.reshape(_SCORE_BINS, _LENGTH_BINS).tolist()
        return found

    return {
        "score_edges": [rounded(float(edge)) for edge in score_edges],
        "bytes_edges": [rounded(float(2**edge)) for edge in size_edges],
        "documents": grid(np.ones(len(score), bool)),
        "kept": grid(np.asarray(sample["kept"])),
    }


def _agreement(sample: Any, name: str) -> list[dict[str, Any]]:
    """Rank correlation of every two scorers, over the records that both have scored."""
    if sample is None or not sample.num_rows:
        return []
    scores = {name: sample["score"].to_numpy()}
    scores |= {c.removeprefix(OTHER): sample[c].to_numpy() for c in sorted(sample.column_names) if c.startswith(OTHER)}
    names, found = list(scores), []
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            both = np.isfinite(scores[first]) & np.isfinite(scores[second])
            correlation = rounded(spearman(scores[first][both], scores[second][both]))
            found.append({"scorers": [first, second], "records": int(both.sum()), "correlation": correlation})
    return found


def _beginning(text: str) -> str:
    """The first characters, in what can be written to a file: half a surrogate pair cannot."""
    return text[:_CHARACTERS].encode("utf-8", "replace").decode()


def _shown(row: dict[str, Any], text: str) -> dict[str, Any]:
    names = ("id", "domain", "source", "reason", "detail", "tokens")
    numbers = {name: rounded(row[name]) for name in ("score", "threshold") if name in row}
    why = {} if row.get("why") is None else {"why": row["why"]}
    return {name: row[name] for name in names} | numbers | why | {"text": text}
